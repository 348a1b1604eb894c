"""One step of `make-fixtures`, run inside the environment of the producer it names.

    python _make_fixtures.py sources SOURCES              tiny random bf16 models, one per architecture
    python _make_fixtures.py PRODUCER SOURCES OUT [NAME]  the producer's fixtures that OUT does not have

Every model has one layer, hidden size 128 and a vocabulary of 64, so that a fixture is about 100 kB.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB = 64
SEED = 0

# --- sources --------------------------------------------------------------------------------------

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    # A third of every weight's rows positive: the asymmetric zero point of such a row is 0.
    "qwen3-positive": ("Qwen3Config", {"tie_word_embeddings": True}),
    # The same, smaller, for old generations.
    "qwen3-positive-64": ("Qwen3Config", {"tie_word_embeddings": True, "intermediate_size": 64}),
    # K = 96 in down_proj: a last group of 32 where g is 64.
    "qwen3-ragged": ("Qwen3Config", {"tie_word_embeddings": True, "intermediate_size": 96}),
    "qwen3-untied": ("Qwen3Config", {"tie_word_embeddings": False}),
    "qwen3moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "qwen3moe128": (
        "Qwen3MoeConfig",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 128},
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": None},
    ),
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    # Two whole blocks of 128 in both directions of the MLP.
    "llama-256": ("LlamaConfig", {"tie_word_embeddings": True, "intermediate_size": 256}),
    "llama-64": ("LlamaConfig", {"tie_word_embeddings": True, "intermediate_size": 64}),
    "llama-bias": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "gptoss": (
        "GptOssConfig",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 64, "sliding_window": 32},
    ),
}


def sources(folder: Path) -> None:
    """Write every source model, bf16, with a tiny word-level tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    for name, (kind, options) in _SOURCES.items():
        torch.manual_seed(SEED)
        config = getattr(transformers, kind)(**(_COMMON | options))
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(0, 0.02)
                elif key.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.startswith("qwen3-positive") and key.endswith("proj.weight"):
                    parameter[::3] = parameter[::3].abs() + 0.001
                elif name in ("llama", "llama-64") and key.endswith("down_proj.weight"):
                    parameter[5] = 0  # a row of zeros: the smallest scale there is
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _frequency() -> Any:
    """Words of unequal frequency, so that activations differ and act-order has an order."""
    import torch

    return torch.linspace(0, 4, VOCAB).exp()


# --- GPTQModel ------------------------------------------------------------------------------------


def _rtn(**options: Any) -> Any:
    """Round to nearest: needs no data."""
    from gptqmodel.quantization.config import RTNConfig

    settings = {"bits": 4, "group_size": 32, "sym": True, "format": "gptq", "offload_to_disk": False}
    return RTNConfig(**(settings | options))


def _gptq(**options: Any) -> Any:
    """GPTQ proper: calibrated."""
    from gptqmodel import QuantizeConfig

    settings = {"bits": 4, "group_size": 32, "sym": True, "offload_to_disk": False}
    return QuantizeConfig(**(settings | options))


_GPTQMODEL: dict[str, tuple[str, Callable[[], Any]]] = {
    "gptqmodel-qwen3-w4g32": ("qwen3", lambda: _rtn()),
    "gptqmodel-qwen3-w4g32-asym-v1": ("qwen3-positive", lambda: _rtn(sym=False)),
    "gptqmodel-qwen3-w4g32-asym-v2": ("qwen3-positive", lambda: _rtn(sym=False, format="gptq_v2")),
    "gptqmodel-qwen3-w4g32-v2": ("qwen3", lambda: _rtn(format="gptq_v2")),
    "gptqmodel-qwen3-w4g32-actorder": (
        "qwen3",
        lambda: _gptq(desc_act=True, act_group_aware=False, static_groups=False),
    ),
    "gptqmodel-qwen3-w4g32-actorder-static": (
        "qwen3",
        lambda: _gptq(desc_act=True, act_group_aware=False, static_groups=True),
    ),
    "gptqmodel-qwen3-w4-channel": ("qwen3", lambda: _rtn(group_size=-1)),
    "gptqmodel-qwen3-w4g64-ragged": ("qwen3-ragged", lambda: _rtn(group_size=64)),
    "gptqmodel-qwen3-w3g32-asym": ("qwen3-positive", lambda: _rtn(bits=3, sym=False)),
    "gptqmodel-qwen3-w3g32-planar": (
        "qwen3-positive",
        lambda: _rtn(bits=3, sym=False, format="gptq_p"),
    ),
    "gptqmodel-qwen3-w2g32": ("qwen3", lambda: _rtn(bits=2)),
    "gptqmodel-qwen3-w2g32-asym": ("qwen3-positive", lambda: _rtn(bits=2, sym=False)),
    # o_proj matches both rules and stays bf16: GPTQModel tries exclusions first, config.json sorts them last.
    "gptqmodel-qwen3-w4g32-dynamic": (
        "qwen3-untied",
        lambda: _rtn(lm_head=True, dynamic={r"-:.*\.o_proj": {}, r"+:.*[ko]_proj": {"group_size": 64}}),
    ),
    "gptqmodel-llama-bias-w4g32": ("llama-bias", lambda: _rtn()),
    "gptqmodel-qwen3moe-w4g32": ("qwen3moe", lambda: _rtn()),
    "gptqmodel-qwen3moe-w3g32-asym": ("qwen3moe", lambda: _rtn(bits=3, sym=False)),
    "gptqmodel-mixtral-w4g32": ("mixtral", lambda: _rtn()),
}


def gptqmodel(source: Path, out: Path, name: str) -> None:
    """One GPTQModel fixture."""
    # Its thread pools want more cores than a small machine has.
    os.cpu_count = lambda: max(8, len(os.sched_getaffinity(0)))
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import RTNConfig

    config = _GPTQMODEL[name][1]()
    model = GPTQModel.load(str(source), config, device="cpu")
    if isinstance(config, RTNConfig):
        model.quantize(None)
    else:
        torch.manual_seed(SEED)
        texts = [torch.multinomial(_frequency(), 64, replacement=True) for _ in range(32)]
        model.quantize(
            [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in texts],
            batch_size=1,
        )
    model.save(str(out))


# --- AutoRound ------------------------------------------------------------------------------------

_AUTOROUND: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # name: (source, scheme, format, options)
    "autoround-qwen3-w4g32": ("qwen3", "W4A16", "auto_round", {"group_size": 32}),
    "autoround-qwen3-w4g32-asym": (
        "qwen3-positive",
        "W4A16",
        "auto_round:gptqmodel",
        {"group_size": 32, "sym": False},
    ),
    "autoround-llama-w4g32-as-awq": ("llama", "W4A16", "auto_awq", {"group_size": 32}),
    "autoround-qwen3-w4g32-asym-as-awq": (
        "qwen3-positive",
        "W4A16",
        "auto_awq",
        {"group_size": 32, "sym": False},
    ),
    "autoround-qwen3moe-w4g32-as-awq": ("qwen3moe", "W4A16", "auto_awq", {"group_size": 32}),
    # Its model-free writer pads K = 96 to 128 inside qweight.
    "autoround-qwen3-w4g64-ragged": (
        "qwen3-ragged",
        "W4A16",
        "auto_round",
        {"group_size": 64, "model_free": True},
    ),
    "autoround-qwen3moe-fp8-block": ("qwen3moe128", "FP8_BLOCK", "auto_round", {}),
}


_AUTOROUND_015: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # Labelled as true zeros, stored minus one.
    "autoround-0.15-qwen3-w4g32-asym-model-free": (
        "qwen3-positive-64",
        "W4A16",
        "auto_round",
        {"group_size": 32, "sym": False, "model_free": True},
    ),
    # A true zero point of 0 destroys its neighbours.
    "autoround-0.15-qwen3-w3g32-asym-v1": (
        "qwen3-positive-64",
        "W3A16",
        "auto_round:auto_gptq",
        {"group_size": 32, "sym": False},
    ),
}


def autoround(source: Path, out: Path, name: str) -> None:
    """One AutoRound fixture: plain rounding, no data."""
    from auto_round import AutoRound

    _, scheme, layout, options = (_AUTOROUND | _AUTOROUND_015)[name]
    rounder = AutoRound(
        str(source),
        scheme=scheme,
        iters=0,
        disable_opt_rtn=True,
        disable_model_free=not options.get("model_free", False),
        device_map="cpu",
        **options,
    )
    _, folder = rounder.quantize_and_save(str(out / "tmp"), format=layout)
    # It writes into a folder of its own choosing below the one given.
    folder = Path(folder[0] if isinstance(folder, list | tuple) else folder)
    for item in folder.iterdir():
        item.rename(out / item.name)
    shutil.rmtree(out / "tmp")


# --- llm-compressor -------------------------------------------------------------------------------


def _int(bits: int, *, symmetric: bool = True, group: int | None = 32, **more: Any) -> dict[str, Any]:
    """A config group for weight-only integers; `group` None is one group per row."""
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy, **more}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def _preset(scheme: str) -> dict[str, Any]:
    return {"targets": "Linear", "scheme": scheme}


def _w4a8() -> dict[str, Any]:
    recipe = _int(4)
    recipe["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    return recipe


def _fp8_tensor() -> dict[str, Any]:
    """One weight scale per module, activations scaled at run time: no data needed."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = common | {"strategy": "tensor"}
    activations = common | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"config_groups": {"group_0": group}}


_LLMCOMPRESSOR: dict[str, tuple[str, dict[str, Any]]] = {
    "llmcompressor-llama-w4a16": ("llama", _int(4)),
    "llmcompressor-qwen3-w4a16-asym": ("qwen3-positive", _int(4, symmetric=False)),
    "llmcompressor-llama-w4a16-channel": ("llama", _int(4, group=None)),
    "llmcompressor-qwen3-w4a16-asym-channel": ("qwen3-positive", _int(4, symmetric=False, group=None)),
    "llmcompressor-llama-w3a16": ("llama", _int(3)),
    "llmcompressor-qwen3-w2a16-asym": ("qwen3-positive", _int(2, symmetric=False)),
    "llmcompressor-llama-w4a8": ("llama", _w4a8()),
    "llmcompressor-llama-fp8-dynamic": ("llama", _preset("FP8_DYNAMIC")),
    "llmcompressor-llama-fp8-static": ("llama", _preset("FP8")),
    "llmcompressor-llama-fp8-block": ("llama-256", _preset("FP8_BLOCK")),
    "llmcompressor-llama-fp8-block-ragged": ("llama", _preset("FP8_BLOCK")),
    "llmcompressor-llama-mxfp4": ("llama", _preset("MXFP4")),
    "llmcompressor-llama-mxfp8": ("llama", _preset("MXFP8")),
    "llmcompressor-llama-nvfp4a16": ("llama", _preset("NVFP4A16")),
    "llmcompressor-llama-w8a8": ("llama", _preset("W8A8")),
    "llmcompressor-gptoss-w4a16": ("gptoss", _int(4)),
    "llmcompressor-qwen3moe-w4a16": ("qwen3moe", _int(4)),
    "llmcompressor-qwen3moe-w4a16-asym": ("qwen3moe", _int(4, symmetric=False)),
    "llmcompressor-qwen3moe-fp8-tensor": ("qwen3moe128", _fp8_tensor()),
    "llmcompressor-qwen3moe-fp8-block": ("qwen3moe128", _preset("FP8_BLOCK")),
    "llmcompressor-qwen3moe-mxfp4": ("qwen3moe", _preset("MXFP4")),
}


# Old releases wrote other layouts; see the README of the fixtures.
_LLMCOMPRESSOR_012: dict[str, tuple[str, dict[str, Any]]] = {
    "llmcompressor-0.12-llama-w3a16": ("llama-64", _int(3)),
    "llmcompressor-0.12-gptoss-w4a16": ("gptoss", _int(4)),
}
_LLMCOMPRESSOR_09: dict[str, tuple[str, dict[str, Any]]] = {
    "llmcompressor-0.9-llama-w3a16": ("llama-64", _int(3)),
    "llmcompressor-0.9-llama-w4a16-actorder": ("llama-64", _int(4, actorder="group")),
    "llmcompressor-0.9-llama-mxfp4": ("llama", _preset("MXFP4")),
}


def llmcompressor(source: Path, out: Path, name: str) -> None:
    """One llm-compressor fixture; only static fp8 and act-order need (random) data."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if "moe" in name or "gptoss" in name:
        from llmcompressor.modeling.moe.linearize import linearize_moe

        linearize_moe(model)
    data: dict[str, Any] = {}
    actorder = name.endswith("actorder")
    if actorder or name.endswith("static"):
        from datasets import Dataset

        torch.manual_seed(SEED)
        if actorder:
            ids = torch.multinomial(_frequency().expand(32, VOCAB), 64, replacement=True)
        else:
            ids = torch.randint(4, VOCAB, (16, 32))
        rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        data = {"dataset": Dataset.from_dict(rows), "tokenizer": tokenizer}
        data["num_calibration_samples"] = len(ids)
    ignore = ["lm_head", "re:.*mlp.gate$", "re:.*mlp.router$"]
    recipe = (_LLMCOMPRESSOR | _LLMCOMPRESSOR_012 | _LLMCOMPRESSOR_09)[name][1]
    modifier = GPTQModifier if actorder else QuantizationModifier
    oneshot(model=model, recipe=modifier(ignore=ignore, **recipe), **data)
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


# --- gpt-oss, packed here -------------------------------------------------------------------------

_HANDPACKED = {"handpacked-gptoss-mxfp4": "gptoss"}


def handpacked(source: Path, out: Path, name: str) -> None:
    """gpt-oss as its authors publish it: MXFP4 experts, the rest bf16.

    Transformers can write these files only with a GPU kernel and only at the published sizes, so
    the experts are rounded and packed here (OCP Microscaling Formats 1.0, 5.3 and 6.3) and read back
    through Transformers' own dequantization, which must give exactly what was rounded to.
    """
    import json

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, Mxfp4Config

    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    tensors = load_file(source / "model.safetensors")
    exact: dict[str, torch.Tensor] = {}
    packed: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[key] = tensor
            continue
        weight = tensor.float().transpose(1, 2)  # [E, K, N] in bf16 files, [E, N, K] in MXFP4 ones
        blocks = weight.reshape(*weight.shape[:2], -1, 32)
        exponent = torch.frexp(blocks.abs().amax(-1))[1] - 1 - 2  # floor(log2(max)) - emax of E2M1
        scaled = torch.ldexp(blocks, -exponent[..., None])
        index = (scaled.abs()[..., None] - levels).abs().argmin(-1)
        code = (index | (torch.signbit(scaled) << 3)).to(torch.uint8)
        packed[f"{key}_blocks"] = code[..., 0::2] | (code[..., 1::2] << 4)
        packed[f"{key}_scales"] = (exponent + 127).to(torch.uint8)
        value = torch.ldexp(levels[index] * torch.where(torch.signbit(scaled), -1, 1), exponent[..., None])
        exact[key] = value.reshape(weight.shape).transpose(1, 2)
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for item in source.iterdir():
        if item.name not in ("config.json", "model.safetensors"):
            shutil.copy(item, out)
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    loaded = model.state_dict()
    for key, value in exact.items():
        if not torch.equal(loaded[key].float(), value):
            raise SystemExit(f"{name}: Transformers reads {key} differently")


# --- main -----------------------------------------------------------------------------------------

_PRODUCERS: dict[str, tuple[dict[str, Any], Callable[[Path, Path, str], None]]] = {
    "gptqmodel": (_GPTQMODEL, gptqmodel),
    "autoround": (_AUTOROUND, autoround),
    "llmcompressor": (_LLMCOMPRESSOR, llmcompressor),
    "handpacked": (_HANDPACKED, handpacked),
    "autoround-0.15": (_AUTOROUND_015, autoround),
    "llmcompressor-0.12": (_LLMCOMPRESSOR_012, llmcompressor),
    "llmcompressor-0.9": (_LLMCOMPRESSOR_09, llmcompressor),
}


def main(step: str, *arguments: str) -> None:
    if step == "sources":
        sources(Path(arguments[0]))
        return
    folder, out, wanted = Path(arguments[0]), Path(arguments[1]), arguments[2:]
    fixtures, make = _PRODUCERS[step]
    for name, entry in fixtures.items():
        if (out / name).exists() or (wanted and name not in wanted):
            continue
        partial = out / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(folder / (entry if isinstance(entry, str) else entry[0]), partial, name)
        for item in partial.rglob("*"):  # umask, not the mode of a temporary file
            item.chmod(0o755 if item.is_dir() else 0o644)
        partial.rename(out / name)
        print(f"made {name}")


if __name__ == "__main__":  # AutoRound starts processes that import this file again
    main(*sys.argv[1:])
