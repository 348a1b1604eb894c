"""A converted repo loads wherever its unquantized twin does: under base-model names, in classes with another head or
none, with layers that are no `nn.Linear`, inside a multimodal model. Shown by logits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", minversion="5.0")

from support.families.catalogue import FAMILIES as SERVED  # noqa: E402
from support.families.models import tiny  # noqa: E402
from support.floats import Floats, block, expert_weights, fp8_tensors  # noqa: E402
from support.models import EXPERTS, FAMILIES, MOE, PACK, SCHEMES, write  # noqa: E402

import xpuquant  # noqa: E402
from xpuquant.errors import UnsupportedError  # noqa: E402
from xpuquant.formats.scheme import to_config  # noqa: E402

PROMPT = torch.tensor([[1, 17, 33, 250, 99, 4, 311, 8, 5, 5, 400, 12]])


@torch.no_grad()
def answer(folder: Path, auto: str = "AutoModelForCausalLM") -> torch.Tensor:
    """Logits, or hidden states of a class without a head."""
    model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32).eval()
    out = model(PROMPT)
    found: torch.Tensor = out["logits"] if "logits" in out else out[0]
    return found


def agree(converted: Path, plain: Path, auto: str = "AutoModelForCausalLM") -> None:
    wanted = answer(plain, auto)
    assert wanted.abs().max() > 1
    torch.testing.assert_close(answer(converted, auto), wanted, atol=1e-4, rtol=0)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Other names of tensors and of the modules in the config."""
    path = folder / "model.safetensors"
    save_file({change(name): t for name, t in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for scheme in config.get("quantization_config", {}).get("schemes", ()):
        scheme["modules"] = [change(name) for name in scheme["modules"]]
    (folder / "config.json").write_text(json.dumps(config))


def pair_of(family: str, folder: Path, **changes: Any) -> Any:
    return write(folder, family, SCHEMES["int4"], EXPERTS["int4"] if family in MOE else None, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_a_base_model(family: str, tmp_path: Path) -> None:
    """`layers.0...`, as Qwen3-Embedding and other embedding models are published, in a class with a head."""
    pair = pair_of(family, tmp_path, tie_word_embeddings=True)
    for folder in (pair.converted, pair.plain):
        rename(folder, lambda name: name.removeprefix("model."))
    assert "layers.0.self_attn.o_proj.qweight" in load_file(pair.converted / "model.safetensors")
    agree(pair.converted, pair.plain)
    agree(pair.converted, pair.plain, "AutoModel")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_a_class_with_a_head_in_one_without(family: str, tmp_path: Path) -> None:
    """A quantized head is then left out, as an unquantized one is."""
    pair = pair_of(family, tmp_path, others={"lm_head": SCHEMES["int4"]})
    assert "lm_head.qweight" in load_file(pair.converted / "model.safetensors")
    agree(pair.converted, pair.plain, "AutoModel")


def shorten(folder: Path) -> None:
    """One layer by the config; the file keeps two."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": 1}
    lists = {key: value[:1] for key, value in config.items() if key in ("layer_types", "mlp_layer_types")}
    path.write_text(json.dumps(config | lists))


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_beyond_the_last_are_left_out(family: str, bare: bool, tmp_path: Path) -> None:
    """Multi-token prediction lies there, whatever the number of the model's layers."""
    pair = pair_of(family, tmp_path)
    for folder in (pair.converted, pair.plain):
        shorten(folder)
        if bare:
            rename(folder, lambda name: name.removeprefix("model."))
    agree(pair.converted, pair.plain)


def test_names_of_no_part_of_the_model_are_refused(tmp_path: Path) -> None:
    """Transformers would go on with random weights, after a warning."""
    pair = pair_of("llama", tmp_path)
    rename(pair.converted, lambda name: f"nobody.{name}")
    with pytest.raises(
        UnsupportedError, match="LlamaForCausalLM has none of the quantized modules of the repo, such as"
    ):
        answer(pair.converted)


def test_another_head(tmp_path: Path) -> None:
    pair = pair_of("qwen3", tmp_path, others={"lm_head": SCHEMES["int4"]})
    model = transformers.AutoModelForTokenClassification.from_pretrained(pair.converted, dtype=torch.float32)
    body = transformers.AutoModel.from_pretrained(pair.plain, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model.model(PROMPT)[0], body(PROMPT)[0], atol=1e-4, rtol=0)


def convert_by_hand(model: Any, folder: Path, quantized: str, turned: bool = False) -> tuple[Path, Path]:
    """(converted, plain) of any model: every matrix whose saved name matches becomes int4; `turned` [K, N] ones."""
    converted, plain = folder / "converted", folder / "plain"
    for path in (plain, converted):
        model.save_pretrained(path)
    saved, stored = load_file(plain / "model.safetensors"), {}
    values = {name: tensor.float() for name, tensor in saved.items()}
    schemes = {}
    for name, tensor in saved.items():
        module = name.removesuffix(".weight")
        if not re.fullmatch(quantized, name):
            stored[name] = tensor
            continue
        upright = tensor.t() if turned else tensor
        schemes[module] = SCHEMES["int4-act-order"]
        tensors, decoded = PACK["int4_linear"](upright, schemes[module])
        stored |= {f"{module}.{suffix}": t.contiguous() for suffix, t in tensors.items()}
        values[name] = (decoded.t() if turned else decoded).contiguous()
    assert schemes
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, converted / "model.safetensors", {"format": "pt"})
    config = json.loads((converted / "config.json").read_text())
    config["quantization_config"] = to_config(schemes, "tests")
    (converted / "config.json").write_text(json.dumps(config))
    return converted, plain


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel"])
def test_conv1d(auto: str, tmp_path: Path) -> None:
    """GPT-2: GPTQ packs its `Conv1D` as the linear that it is (https://github.com/ModelCloud/GPTQModel/pull/912)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=2, n_positions=64, vocab_size=512, initializer_range=0.2
    )
    model = transformers.GPT2LMHeadModel(config).bfloat16()
    agree(*convert_by_hand(model, tmp_path, r".*\.(c_attn|c_proj|c_fc)\.weight", turned=True), auto)


def test_names_that_a_renaming_knows_by_the_dot_after_them(tmp_path: Path) -> None:
    """DeepSeek-V4: `\\.wo_a\\.` of the files is `o_a_proj`, which multiplies group by group in its own way."""
    model = tiny_family("deepseek_v4")
    agree(*convert_by_hand(model, tmp_path, r".*\.attn\.(wo_a|wo_b|wq_a|wq_b|wkv)\.weight"))


@pytest.mark.parametrize(
    ("family", "routers", "auto"),
    [
        ("llama4", r".*\.router\.weight", "AutoModelForImageTextToText"),
        ("phimoe", r".*\.block_sparse_moe\.(gate|router)\.weight", "AutoModelForCausalLM"),
        ("hunyuan_v1_moe", r".*\.gate\.wg\.weight", "AutoModelForCausalLM"),
    ],
)
def test_routers_that_are_linears_by_their_class(family: str, routers: str, auto: str, tmp_path: Path) -> None:
    """Llama 4's and Phi-MoE's return scores, Hunyuan's is asked for its weight's dtype; AutoRound's model-free export
    packs them."""
    agree(*convert_by_hand(tiny_family(family), tmp_path, routers), auto)


def tiny_family(name: str) -> Any:
    return tiny(next(family for family in SERVED if family.name == name))


def routed(folder: Path, scheme: str) -> Any:
    """A pair whose routers are quantized. `mlp.gate` of Qwen3-MoE is no linear in Transformers, and some quantize it:
    https://github.com/vllm-project/vllm/pull/17829."""
    routers = {f"model.layers.{n}.mlp.gate": SCHEMES[scheme] for n in range(2)}
    others = {**routers, "gate": SCHEMES[scheme]}
    pair = write(folder, "qwen3_moe", SCHEMES["int4"], EXPERTS["int4"], others=others)
    assert len(load_file(pair.converted / "model.safetensors")["model.layers.0.mlp.gate." + STORED[scheme]]) > 0
    return pair


STORED = {"int4": "qweight", "int4-act-order": "g_idx", "mxfp4": "weight_scale"}


@pytest.mark.parametrize("scheme", ["int4", "int4-act-order"])
def test_quantized_routers(scheme: str, tmp_path: Path) -> None:
    pair = routed(tmp_path, scheme)
    agree(pair.converted, pair.plain)


def test_routers_that_would_read_the_stored_weight_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="TopKRouter cannot be loaded as mxfp4_linear"):
        answer(routed(tmp_path, "mxfp4").converted)


def test_embeddings_are_refused(tmp_path: Path) -> None:
    pair = write(tmp_path, "llama", SCHEMES["int4"], others={"model.embed_tokens": SCHEMES["int4"]})
    with pytest.raises(UnsupportedError, match="a Embedding cannot be loaded"):
        answer(pair.converted)


TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def mistral3() -> Any:
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config={"model_type": "mistral", **TEXT},
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "image_size": 16,
                "head_dim": 32,
            },
        )
    )


def gemma3() -> Any:
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={"model_type": "gemma3_text", **TEXT, "sliding_window": 32},
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "image_size": 16,
            },
            mm_tokens_per_image=4,
        )
    )


def qwen3_vl() -> Any:
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            text_config={**TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
            vision_config={
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": 4,
                "deepstack_visual_indexes": [],
            },
        )
    )


@pytest.mark.parametrize("make", [mistral3, gemma3, qwen3_vl])
def test_nested_names_of_multimodal_models(make: Callable[[], Any], tmp_path: Path) -> None:
    """Names as they are published (https://github.com/vllm-project/vllm/pull/32673): Transformers has others."""
    torch.manual_seed(0)
    model = make().bfloat16()
    pair = convert_by_hand(model, tmp_path, r".*language_model.*layers\.\d+\.(self_attn|mlp)\..*_proj\.weight")
    agree(*pair, "AutoModelForImageTextToText")
    agree(*pair, "AutoModel")


def make_block(layer: int, N: int, K: int, seed: int) -> Floats:
    return block(N, K, 100 * layer + seed)


def test_granites_stacks(tmp_path: Path) -> None:
    """Experts as one 3-D `input_linear` and `output_linear`, FP8 in blocks: converted, loaded, computed."""
    torch.manual_seed(0)
    E, H, I = 4, 128, 128
    config = transformers.GraniteMoeConfig(
        **{**TEXT, "hidden_size": H, "intermediate_size": I, "num_attention_heads": 4},
        num_local_experts=E,
        num_experts_per_tok=2,
        logits_scaling=1.0,
    )
    plain = tmp_path / "plain"
    transformers.GraniteMoeForCausalLM(config).bfloat16().save_pretrained(plain)
    tensors = {name: tensor.float() for name, tensor in load_file(plain / "model.safetensors").items()}
    assert "model.layers.0.block_sparse_moe.input_linear.weight" in tensors, "names as published"
    source = dict(tensors)
    for layer in range(2):
        weights = expert_weights(partial(make_block, layer), H, I, E)
        for part, roles in (("input_linear", ("gate", "up")), ("output_linear", ("down",))):
            name = f"model.layers.{layer}.block_sparse_moe.{part}"
            members = [[fp8_tensors(weights[e, role]) for role in roles] for e in range(E)]
            values = [np.concatenate([weights[e, role].values for role in roles]) for e in range(E)]
            tensors[f"{name}.weight"] = torch.from_numpy(np.stack(values)).float()
            codes = np.stack([np.concatenate([m["weight"] for m in member]).view(np.uint8) for member in members])
            source[f"{name}.weight"] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            scales = np.stack([np.concatenate([m["weight_scale"] for m in member]) for member in members])
            source[f"{name}.weight_scale"] = torch.from_numpy(scales.astype(np.float32))
    (tmp_path / "source").mkdir()
    save_file(source, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    said = json.loads((plain / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(said))
    assert xpuquant.convert(tmp_path / "source", tmp_path / "converted").verdict.passed
    agree(tmp_path / "converted", plain)


def test_a_layer_dequantized_for_one_expert(tmp_path: Path) -> None:
    """A stack of which one expert stayed bf16 (https://github.com/ModelCloud/GPTQModel/issues/1680)."""
    from support.ints import Pico, gptq, gptq_config, ints

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
    )
    plain = tmp_path / "plain"
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    modules = {}
    for name in list(tensors):
        if ".experts." in name and ".experts.3." not in name:
            weight = ints(N=tensors[name].shape[0], K=tensors[name].shape[1], seed=len(modules))
            modules[name.removesuffix(".weight")] = gptq(weight)
            tensors[name] = torch.from_numpy(weight.values.astype(ml_dtypes.bfloat16).astype(np.float32)).bfloat16()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    kept = {
        name: tensor.float().numpy().astype(ml_dtypes.bfloat16)
        for name, tensor in tensors.items()
        if name.removesuffix(".weight") not in modules
    }
    said = json.loads((plain / "config.json").read_text())
    Pico(gptq_config(), modules, kept, said).write(tmp_path / "source")
    options: dict[str, Any] = {"on_unsupported": "dequantize"}
    assert xpuquant.convert(tmp_path / "source", tmp_path / "converted", **options).verdict.passed
    agree(tmp_path / "converted", plain)


def test_one_layer_of_experts_left_alone(tmp_path: Path) -> None:
    """`modules_to_not_convert: ["model.layers.0."]`: https://github.com/sgl-project/sglang/pull/20439."""
    pair = pair_of("qwen3_moe", tmp_path)
    stored, plain = (load_file(folder / "model.safetensors") for folder in (pair.converted, pair.plain))
    stack = "model.layers.0.mlp.experts"
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(stack)}
    kept |= {name: tensor.bfloat16() for name, tensor in plain.items() if name.startswith(stack)}
    plain |= {name: tensor.float() for name, tensor in kept.items() if name.startswith(stack)}
    save_file(kept, pair.converted / "model.safetensors", {"format": "pt"})
    save_file(plain, pair.plain / "model.safetensors", {"format": "pt"})
    config = json.loads((pair.converted / "config.json").read_text())
    for scheme in config["quantization_config"]["schemes"]:
        scheme["modules"] = [n.replace("{0-1}.mlp.experts", "1.mlp.experts") for n in scheme["modules"]]
    (pair.converted / "config.json").write_text(json.dumps(config))
    agree(pair.converted, pair.plain)


def test_unquantized_experts_beside_quantized_linears_are_saved(tmp_path: Path) -> None:
    """Their stacks are taken apart as Transformers does; with quantized ones beside them that cannot be."""
    others = dict.fromkeys(("gate_proj", "up_proj", "down_proj"))
    pair = write(tmp_path, "qwen3_moe", SCHEMES["int4"], others=others)
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.converted, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    stored, saved = (load_file(folder / "model.safetensors") for folder in (pair.converted, tmp_path / "saved"))
    assert stored.keys() == saved.keys() and any(".experts.0." in name for name in saved)
    assert all(torch.equal(stored[name], saved[name]) for name in stored)
