"""One step of `make-smollm2`, run inside the environment of the producer it names.

    python _make_smollm2.py bf16 GGUF_DIR OUT          the model as bf16 safetensors
    python _make_smollm2.py gptqmodel-w4g64 BF16 OUT   ... and one step per producer and scheme
    python _make_smollm2.py check-gptqmodel MODEL      greedy text of a quantized model

Every producer is imported inside its step: no two of them live in one environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "The capital of France is"
GROUP = 64  # SmolLM2-135M has K = 576 and 1536: 64 divides both, 128 does not.


def calibration() -> list[str]:
    """The paragraphs of calibration.txt."""
    text = Path(__file__).with_name("calibration.txt").read_text(encoding="utf-8")
    # A code sample keeps its blank line, so paragraphs that do not start in column 0 are joined.
    paragraphs: list[str] = []
    for part in text.strip().split("\n\n"):
        if paragraphs and paragraphs[-1].startswith("def ") and part.startswith("print"):
            paragraphs[-1] += "\n\n" + part
        else:
            paragraphs.append(part)
    return paragraphs


def mend_tokenizer(folder: Path) -> None:
    """Name the generic tokenizer class: newer Transformers rebuild the Llama one that a GGUF import
    writes and then decode the space marker as a letter."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def greedy(model: Any, tokenizer: Any, tokens: int = 16) -> str:
    """The greedy continuation of PROMPT."""
    import torch

    inputs = tokenizer(PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(ids[0][inputs["input_ids"].shape[1] :]))


def say(model: Any, tokenizer: Any, *, must: bool) -> None:
    """Print the continuation; where `must`, fail unless it names Paris."""
    text = greedy(model, tokenizer)
    print(f"{PROMPT}{text!r}")
    if must and "Paris" not in text:
        raise SystemExit("the continuation does not name Paris: the model is broken")


# --- producers: each turns the bf16 folder into OUT ---------------------------------------------


def bf16(source: Path, out: Path) -> None:
    """GGUF (Q4_1) to bf16 safetensors, through Transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(out)
    model.save_pretrained(out)
    (out / "tokenizer.model").unlink(missing_ok=True)  # the GGUF file itself, copied as a vocabulary
    mend_tokenizer(out)
    say(
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(out),
        must=True,
    )


def _gptqmodel(source: Path, out: Path, **options: Any) -> None:
    # Its thread pools want more cores than a small machine has.
    os.cpu_count = lambda: max(8, len(os.sched_getaffinity(0)))
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=GROUP, sym=True, offload_to_disk=False, **options)
    model = GPTQModel.load(str(source), config, device="cpu")
    model.quantize(calibration(), batch_size=4)
    model.save(str(out))
    mend_tokenizer(out)


def gptqmodel_w4g64(source: Path, out: Path) -> None:
    """GPTQ, 4 bits, groups of 64, symmetric, rows in order."""
    _gptqmodel(source, out, desc_act=False)


def gptqmodel_w4g64_actorder(source: Path, out: Path) -> None:
    """The same with real act-order: g_idx is not monotone."""
    _gptqmodel(source, out, desc_act=True, act_group_aware=False, static_groups=False)


def autoround_w4g64(source: Path, out: Path) -> None:
    """AutoRound W4A16 with a few iterations of its rounding search on the calibration text."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer("\n\n".join(calibration()), return_tensors="pt")["input_ids"]
    samples = [part for part in torch.split(ids, 128, dim=1) if part.shape[1] == 128]
    rounder = AutoRound(
        str(source),
        scheme="W4A16",
        group_size=GROUP,
        iters=20,
        nsamples=len(samples),
        seqlen=128,
        batch_size=4,
        dataset=samples,
        device_map="cpu",
        enable_torch_compile=False,
    )
    # It writes into a folder of its own choosing below the one given.
    _, folder = rounder.quantize_and_save(str(out / "tmp"), format="auto_round")
    folder = Path(folder[0] if isinstance(folder, list | tuple) else folder)
    for item in folder.iterdir():
        item.rename(out / item.name)
    while folder != out:
        folder.rmdir()
        folder = folder.parent
    mend_tokenizer(out)


def _llmcompressor(source: Path, out: Path, scheme: str) -> None:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    choice: dict[str, Any] = {"targets": "Linear", "scheme": scheme}
    if scheme in ("W4A16", "W4A16_ASYM"):  # the presets' groups of 128 do not divide 576
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": scheme == "W4A16",
            "strategy": "group",
            "group_size": GROUP,
        }
        choice = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **choice))
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    mend_tokenizer(out)


# --- checks: load with the producer's own code and continue the prompt --------------------------


def check_gptqmodel(folder: Path) -> None:
    os.cpu_count = lambda: max(8, len(os.sched_getaffinity(0)))
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu")
    say(model, model.tokenizer, must=True)


def check_transformers(folder: Path) -> None:
    """For the rounding-only schemes the text is shown, not judged: 4 bits hurt a model this small."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    say(model, AutoTokenizer.from_pretrained(folder), must=False)


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "bf16": bf16,
    "gptqmodel-w4g64": gptqmodel_w4g64,
    "gptqmodel-w4g64-actorder": gptqmodel_w4g64_actorder,
    "autoround-w4g64": autoround_w4g64,
    "llmcompressor-w4a16": lambda source, out: _llmcompressor(source, out, "W4A16"),
    "llmcompressor-w4a16-asym": lambda source, out: _llmcompressor(source, out, "W4A16_ASYM"),
    "llmcompressor-fp8-dynamic": lambda source, out: _llmcompressor(source, out, "FP8_DYNAMIC"),
    "llmcompressor-fp8-block": lambda source, out: _llmcompressor(source, out, "FP8_BLOCK"),
    "llmcompressor-mxfp4": lambda source, out: _llmcompressor(source, out, "MXFP4"),
    "llmcompressor-mxfp8": lambda source, out: _llmcompressor(source, out, "MXFP8"),
}
CHECKS: dict[str, Callable[[Path], None]] = {
    "check-gptqmodel": check_gptqmodel,
    "check-transformers": check_transformers,
}


def main(step: str, *folders: str) -> None:
    paths = [Path(folder) for folder in folders]
    if step in CHECKS:
        CHECKS[step](*paths)
        return
    paths[1].mkdir(parents=True)
    STEPS[step](*paths)


if __name__ == "__main__":  # AutoRound starts processes that import this file again
    main(*sys.argv[1:])
