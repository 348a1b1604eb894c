"""Arithmetic beside the weights, leftovers and lookup tables, as people publish them.

Each case is rebuilt small from the public report or the source named beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.floats import FP8, random
from support.ints import (
    DOWN,
    Array,
    Pico,
    Q,
    Tensors,
    awq,
    awq_config,
    convert,
    ct_config,
    gptq,
    gptq_config,
    ints,
    pack_quantized,
    refusal,
)

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.errors import UnsupportedError, UsageError
from xpuquant.formats.architecture import is_embedding

BF16 = ml_dtypes.bfloat16
WEIGHT = ints()


def ones(*shape: int, dtype: Any = np.float16) -> Array:
    return np.ones(shape, dtype)


def fp8_tensors() -> Tensors:
    return {"weight": np.full((16, 64), 56, np.uint8).view(FP8["e4m3"]), "weight_scale": ones(dtype=np.float32)}


def nvfp4_tensors() -> Tensors:
    """ModelOpt's names (modelopt/torch/export/quant_utils.py)."""
    codes = random("e2m1", 16, 64, 1, 16)
    scales = np.full((16, 4), 56, np.uint8).view(FP8["e4m3"])
    return {"weight": codes.packed, "weight_scale": scales, "weight_scale_2": ones(dtype=np.float32)}


def mxfp4_tensors() -> Tensors:
    codes = random("e2m1", 16, 64, 1, 32, scale=np.uint8)
    return {"weight_packed": codes.packed, "weight_scale": codes.scales}


KINDS: dict[str, tuple[dict[str, Any], Tensors]] = {
    "gptq": (gptq_config(), gptq(WEIGHT)),
    "awq": (awq_config(), awq(WEIGHT)),
    "packed": (ct_config(), pack_quantized(WEIGHT, zeros="none")),
    "fp8": ({"quant_method": "fp8"}, fp8_tensors()),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4_tensors()),
    "mxfp4": ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp", "group_size": 32}, mxfp4_tensors()),
}


def module(kind: str, beside: Tensors | None = None, **keys: Any) -> Pico:
    """One quantized module, with more tensors in it and more keys in its config."""
    config, tensors = KINDS[kind]
    return Pico({**config, **keys}, {DOWN: {**tensors, **(beside or {})}})


ROTATIONS: list[tuple[str, dict[str, Any], str]] = [
    # intel/auto-round#1515, #1933, vllm-project/vllm#54006.
    (
        "mxfp4",
        {"rotation_config": {"algorithm": "hadamard", "backend": "transform", "block_size": 32}},
        "rotation_config",
    ),
    # intel/auto-round#1607: the key before it was rotation_config.
    ("mxfp4", {"hadamard_config": {"hadamard_type": "random_hadamard", "block_size": 64}}, "hadamard_config"),
    # intel/auto-round#1515: the key before that, without compressed-tensors' groups.
    ("mxfp4", {"transform_config": {"transform_block_size": 32, "transform_type": "hadamard"}}, "transform_config"),
    # intel/auto-round#1884: a name for a set of them.
    ("gptq", {"rotation_config": "quarot"}, "rotation_config"),
    # intel/auto-round schemes.py: one layer alone may have it.
    (
        "mxfp4",
        {"extra_config": {DOWN: {"bits": 4, "rotation_config": {"block_size": 32}}}},
        f"extra_config.{DOWN}.rotation_config",
    ),
    # ModelCloud/GPTQModel#2980: online before down_proj.
    ("gptq", {"rotation": "hadamard"}, "rotation"),
    # ModelCloud/GPTQModel config.py: EoRA's low-rank term.
    ("gptq", {"adapter": {"name": "lora", "rank": 32}}, "adapter"),
    # vllm-project/vllm#29047, #15162: Quark.
    ("fp8", {"online_rotations": {"R4": "hadamard"}}, "online_rotations"),
    # vllm-project/vllm#32272: Quark exports the algorithms that were applied.
    ("fp8", {"algo_config": [{"name": "rotation", "r1": True, "online_r1_rotation": True}]}, "algo_config: rotation"),
    ("fp8", {"algo_config": [{"name": "quarot", "r1": True, "r2": True, "r4": True}]}, "algo_config: quarot"),
    # vllm-project/compressed-tensors transform/transform_config.py.
    ("packed", {"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}, "transform_config"),
    ("nvfp4", {"spinquant_config": {"r3": True}}, "spinquant_config"),
    # spcl/QuaRot: names of its own code.
    ("awq", {"online_full_had": True}, "online_full_had"),
    ("fp8", {"svdquant": {"rank": 32}}, "svdquant"),
    ("packed", {"smoothquant": {"alpha": 0.5}}, "smoothquant"),
    # Nobody writes these yet.
    ("gptq", {"scheme_args": {"input": {"block_hadamard": 128}}}, "scheme_args.input.block_hadamard"),
    ("awq", {"low_rank_branch": 16}, "low_rank_branch"),
]


@pytest.mark.parametrize("options", [Options(), Options(on_unsupported="dequantize")], ids=["exact", "dequantize"])
@pytest.mark.parametrize(("kind", "keys", "named"), ROTATIONS, ids=[named for _, _, named in ROTATIONS])
def test_a_config_that_names_a_transform_is_refused(
    kind: str, keys: dict[str, Any], named: str, options: Options, tmp_path: Path
) -> None:
    source = module(kind, **keys).write(tmp_path)
    with pytest.raises(UnsupportedError) as raised:
        make_plan(source.checkpoint, options)
    assert f"the config asks for '{named}'" in str(raised.value) and DOWN in str(raised.value)
    assert "Pass --on-unsupported" not in str(raised.value), "it would not help"


@pytest.mark.parametrize("key", ["rotation_config", "online_rotation", "hadamard", "transform_config", "spinquant"])
def test_a_transform_named_by_config_json_itself_is_refused(key: str, tmp_path: Path) -> None:
    """intel/auto-round algorithms/transforms/spinquant/serialize.py writes there, too."""
    config, tensors = KINDS["gptq"]
    checkpoint = Pico(config, {DOWN: tensors}, config={key: {"r4": True}})
    assert f"the config asks for '{key}'" in refusal(tmp_path / "a", checkpoint)
    checkpoint = Pico(config, {DOWN: tensors}, config={"text_config": {key: "random"}})
    assert f"the config asks for 'text_config.{key}'" in refusal(tmp_path / "b", checkpoint)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        *(("mxfp4", {"rotation_config": none}) for none in (None, {}, "", "none", False)),
        ("packed", {"transform_config": {"config_groups": {}}}),
        ("gptq", {"adapter": None, "rotation": None}),
        # How the codes were chosen (GPTQModel), and what was folded into the weights (Quark).
        ("gptq", {"meta": {"fallback": {"smooth": {"type": "mad"}}, "weight_only": {"smooth": "auto"}}}),
        ("fp8", {"algo_config": [{"name": "smooth", "alpha": 0.5}, {"name": "awq"}]}),
        (
            "fp8",
            {"algo_config": [{"name": "rotation", "r1": True, "r2": True, "r4": False, "online_r1_rotation": False}]},
        ),
        # ModelOpt announces it where any module may have one; whether one has is for the tensors to say.
        ("fp8", {"quant_algo": "FP8", "pre_quant_scale": True}),
        # A module may be called anything.
        ("gptq", {"dynamic": {"-:.*feature_transform.*": {}}, "extra_config": {"smooth_rotation": {"bits": 16}}}),
    ],
)
def test_a_config_that_says_none_of_it_converts(kind: str, keys: dict[str, Any], tmp_path: Path) -> None:
    converted = convert(module(kind, **keys).write(tmp_path / "in"), tmp_path / "out")
    assert [planned.conversion.name for planned in converted.plan.modules] == [DOWN] and not converted.plan.notes


def test_keys_that_nobody_knows_are_noted(tmp_path: Path) -> None:
    source = module("gptq", colour="blue").write(tmp_path)
    assert make_plan(source.checkpoint, Options()).notes == (
        "quantization config: 'colour' is not known here, and is ignored",
    )


BESIDE: list[tuple[str, str, Array]] = [
    # NVIDIA/Model-Optimizer#421, #1354; NVIDIA/TensorRT-LLM#14561: o_proj and down_proj keep it.
    ("nvfp4", "pre_quant_scale", ones(64)),
    ("fp8", "pre_quant_scale", ones(64)),
    # nunchux-ai/nunchaku#770: SVDQuant's low-rank branch and smoothing.
    ("gptq", "proj_down", ones(64, 8)),
    ("nvfp4", "proj_up", ones(16, 8)),
    ("packed", "smooth_factor", ones(64)),
    ("awq", "lora_down", ones(8, 64)),
    # vllm-project/vllm#32272: Quark's block-diagonal rotation of the input.
    ("mxfp4", "input_rotation", ones(32, 32)),
    # intel/auto-round, compressed-tensors: the matrix of a transform, saved as a submodule.
    ("packed", "R4_weight_input.weight", ones(64, 64)),
    ("mxfp4", "hadamard_matrix", ones(32, 32)),
    # ModelCloud/GPTQModel hadamard_utils.py.
    ("gptq", "had_K", ones(12, 12)),
    ("fp8", "smooth_scale", ones(64)),
    # NVIDIA/Model-Optimizer: quantizers saved with the model instead of exported.
    ("fp8", "input_quantizer._pre_quant_scale", ones(64)),
    # NVIDIA/Model-Optimizer: W4A8_AWQ has two levels of scales.
    ("fp8", "weight_scale_2", ones(dtype=np.float32)),
    # GPTQModel's permutations of other kernels.
    ("gptq", "q_perm", np.arange(64, dtype=np.int16)),
    # A static scale is one number; one for each column is a smoothing factor by another name.
    ("packed", "input_scale", ones(64)),
    ("nvfp4", "input_scale", ones(64, dtype=np.float32)),
    # BitNet and others: a norm inside the linear (microsoft/BitNet).
    ("gptq", "norm.weight", ones(64)),
    # Nobody writes these yet.
    ("gptq", "correction", ones(16)),
    ("awq", "outliers.values", ones(16, 2)),
    ("mxfp4", "channel_gain", ones(16)),
]


@pytest.mark.parametrize("options", [Options(), Options(on_unsupported="dequantize")], ids=["exact", "dequantize"])
@pytest.mark.parametrize(("kind", "suffix", "tensor"), BESIDE, ids=[f"{kind} {suffix}" for kind, suffix, _ in BESIDE])
def test_what_no_reader_claims_inside_a_module_is_refused_by_name(
    kind: str, suffix: str, tensor: Array, options: Options, tmp_path: Path
) -> None:
    source = module(kind, {suffix: tensor}).write(tmp_path)
    with pytest.raises(UnsupportedError) as raised:
        make_plan(source.checkpoint, options)
    assert suffix in str(raised.value) and DOWN in str(raised.value)
    assert "Pass --on-unsupported" not in str(raised.value), "it would not help"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        # casper-hansen/AutoAWQ awq/modules/act.py: Starcoder2, Falcon, MPT, BLOOM, GPT-NeoX.
        ("model.layers.0.mlp.act.scales", "AutoAWQ's ScaledActivation"),
        ("model.layers.0.self_attn.online_had.weight", "at run time"),
        ("model.layers.0.mlp.smooth_scale", "at run time"),
        ("model.rotation_matrix", "at run time"),
        # facebookresearch/SpinQuant, spcl/QuaRot, and forks: matrices of attention and of the model.
        ("model.layers.0.self_attn.R3", "at run time"),
        ("model.R1.weight", "at run time"),
        ("model.layers.0.self_attn.k_rotate.weight", "at run time"),
        ("model.layers.0.mlp.had.weight", "at run time"),
        ("model.layers.0.self_attn.smooth", "at run time"),
        # PEFT models that were saved unmerged (huggingface/peft, `base_model.model.`).
        ("model.layers.0.mlp.up_proj.lora_A.default.weight", "a LoRA adapter inside the checkpoint"),
    ],
)
def test_factors_outside_quantized_modules_are_refused_by_name(name: str, said: str, tmp_path: Path) -> None:
    config, tensors = KINDS["gptq"]
    message = refusal(tmp_path, Pico(config, {DOWN: tensors}, {name: ones(64)}))
    assert said in message and name.rpartition(".")[0] in message


@pytest.mark.parametrize(
    ("suffixes", "listed"),
    [
        # Vahe1994/AQLM, IST-DASLab/marlin, mobiusml/hqq: weights of one module in another format.
        ({"codes": np.zeros((16, 8, 1), np.int8), "codebooks": ones(1, 256, 1, 8)}, "codes I8"),
        ({"B": np.zeros((4, 32), np.int32), "s": ones(2, 16), "workspace": np.zeros(16, np.int32)}, "B I32"),
        ({"W_q": np.zeros((8, 64), np.uint8), "meta": ones(4)}, "W_q U8"),
        # facebookresearch/fbgemm and others: fp8 under a name of its own.
        ({"weight_fp8": np.zeros((16, 64), np.uint8).view(FP8["e4m3"])}, "weight_fp8 F8_E4M3"),
        ({"table": np.zeros((16, 64), np.uint8).view(FP8["e4m3"])}, "table F8_E4M3"),
        # turboderp's EXL2 and EXL3, Cornell-RelaxML/quip-sharp, pytorch/ao, bitsandbytes, HF EETQ, GGUF in safetensors.
        (
            {"q_weight": np.zeros((8, 16), np.int32), "q_scale_max": ones(2), "q_perm": np.zeros(64, np.int16)},
            "q_weight",
        ),
        ({"trellis": np.zeros((4, 1, 64), np.int16), "suh": ones(64), "svh": ones(16)}, "trellis I16"),
        ({"Qidxs": np.zeros((16, 8), np.int64), "SU": ones(64), "SV": ones(16)}, "Qidxs I64"),
        ({"weight:qdata": np.zeros((16, 64), np.int8), "weight:scale": ones(16)}, "weight:qdata I8"),
        ({"weight": np.zeros((512, 1), np.uint8), "weight.absmax": ones(16)}, "weight U8"),
        ({"weight": np.zeros((64, 16), np.int8), "weight_scales": ones(16)}, "weight I8"),
        # mistralai/Ministral-3-*: `qscale_weight` of Mistral's own names.
        ({"weight": fp8_tensors()["weight"], "qscale_weight": ones(1, dtype=np.float32)}, "qscale_weight F32"),
    ],
)
def test_weights_of_unknown_formats_do_not_pass(suffixes: Tensors, listed: str, tmp_path: Path) -> None:
    config, tensors = KINDS["gptq"]
    message = refusal(tmp_path, Pico(config, {DOWN: tensors, Q: suffixes}))
    assert "no known format has these tensors" in message and listed in message and Q in message


PASSED: Tensors = {
    "model.embed_tokens.weight": ones(32, 64),
    f"{DOWN}.bias": ones(16),
    # vllm-project/vllm quantization/kv_cache.py and the names that producers give it.
    "model.layers.0.self_attn.k_proj.k_scale": ones(1, dtype=np.float32),
    "model.layers.0.self_attn.v_proj.output_scale": ones(1, dtype=np.float32),
    "model.layers.0.self_attn.kv_scale": ones(1, dtype=np.float32),
    # Tables of models: openai-community/gpt2's mask, BERT's positions, DeepSeek-V4's routing.
    "h.0.attn.bias": np.zeros((1, 1, 8, 8), np.uint8),
    "h.0.attn.causal": np.zeros((8, 8), np.bool_),
    "h.0.attn.slopes": ones(8),
    "embeddings.position_ids": np.arange(8, dtype=np.int64)[None],
    "layers.0.ffn.gate.tid2eid": np.zeros((32, 2), np.int32),
    "layers.0.ffn.gate.weight": ones(4, 64),
    "model.rotary_emb.inv_freq": ones(8, dtype=np.float32),
    "visual.scale": ones(1),
}


def test_plain_tensors_of_models_pass(tmp_path: Path) -> None:
    config, tensors = KINDS["gptq"]
    converted = convert(Pico(config, {DOWN: tensors}, PASSED).write(tmp_path / "in"), tmp_path / "out")
    assert {tensor.name for tensor in converted.plan.passed} == set(PASSED) and not converted.plan.notes
    for name, array in PASSED.items():
        assert np.array_equal(converted.array(name), array)


@pytest.mark.parametrize("beside", ["smooth", "lora_down.weight", "lora_up.weight", "proj_down", "rotation.weight"])
def test_what_wraps_a_quantized_module_is_refused_by_name(beside: str, tmp_path: Path) -> None:
    """intel/auto-round algorithms/transforms/svdquant/wrapper.py: a quantized residual, smoothed and corrected."""
    checkpoint = Pico(gptq_config(), {f"{Q}.residual_linear": gptq(WEIGHT)}, {f"{Q}.{beside}": ones(64)})
    message = refusal(tmp_path, checkpoint)
    assert f"{beside} F16 [64]" in message and "1 module has" in message and f"{Q}.residual_linear" in message


def test_lora_that_an_architecture_has_passes(tmp_path: Path) -> None:
    """microsoft/Phi-4-multimodal-instruct: `base_layer` and a set of LoRA matrices for each kind of input."""
    base, lora = f"{DOWN}.base_layer", f"{DOWN}.lora_A.speech.weight"
    checkpoint = Pico(gptq_config(), {base: gptq(WEIGHT)}, {lora: ones(8, 64)}, {"model_type": "phi4mm"})
    plan = make_plan(checkpoint.write(tmp_path).checkpoint, Options())
    assert [tensor.name for tensor in plan.passed] == [lora]


LEFTOVERS: list[tuple[str, Tensors, str]] = [
    # vllm-project/vllm#41769: input_scale of a W4A4 sibling in a W4A16 checkpoint.
    ("packed", {"input_scale": ones(1, dtype=np.float32)}, "static scales of activations"),
    ("gptq", {"input_scale": ones(1, dtype=np.float32)}, "static scales of activations"),
    ("mxfp4", {"input_global_scale": ones(1, dtype=np.float32)}, "static scales of activations"),
    # Static output scales of Quark (amd/*-FP8) on other layers than those of the KV cache.
    ("fp8", {"output_scale": ones(1, dtype=np.float32)}, "static scales of activations"),
    ("fp8", {"weight_shape": np.array([16, 64], np.int64)}, "the shapes of the tensors say it"),
    # A float weight that was saved beside its codes.
    ("gptq", {"weight": ones(16, 64)}, "an unquantized copy beside the codes"),
    ("awq", {"weight": ones(16, 64)}, "an unquantized copy beside the codes"),
    ("packed", {"weight": ones(16, 64, dtype=BF16)}, "an unquantized copy beside the codes"),
]


@pytest.mark.parametrize(("kind", "beside", "why"), LEFTOVERS, ids=[f"{k} {[*b]}" for k, b, _ in LEFTOVERS])
def test_leftovers_in_a_quantized_module_are_dropped_with_a_note(
    kind: str, beside: Tensors, why: str, tmp_path: Path
) -> None:
    converted = convert(module(kind, beside).write(tmp_path / "in"), tmp_path / "out")
    (note,) = converted.plan.notes
    assert f"{DOWN}.{next(iter(beside))}: dropped; {why}" in note and not converted.plan.passed
    assert f"{DOWN}.{next(iter(beside))}" not in converted.repo.tensors or "weight" in beside or kind == "fp8"


def test_convolutions_in_fp8_are_refused_and_not_called_damaged(tmp_path: Path) -> None:
    config, tensors = KINDS["fp8"]
    conv: Tensors = {"weight": np.zeros((16, 3, 4, 4), np.uint8).view(FP8["e4m3"]), "weight_scale": ones(1)}
    message = refusal(tmp_path, Pico(config, {DOWN: tensors, "visual.patch_embed.proj": conv}))
    assert "visual.patch_embed.proj.weight [16, 3, 4, 4] is no matrix (a convolution?): no XPU kernel" in message


def test_a_weight_of_another_shape_beside_the_codes_is_refused(tmp_path: Path) -> None:
    assert "weight F16 [8, 8] beside its weight" in refusal(tmp_path, module("gptq", {"weight": ones(8, 8)}))


@pytest.mark.parametrize("suffix", ["input_scale", "activation_scale", "input_global_scale", "weight_shape"])
def test_leftovers_beside_a_float_weight_are_dropped_with_a_note(suffix: str, tmp_path: Path) -> None:
    """sgl-project/sglang#19000, vllm-project/vllm#43892: a module that was excluded keeps a scale."""
    config, tensors = KINDS["fp8"]
    beside = np.array([32, 64]) if suffix == "weight_shape" else ones(1, dtype=np.float32)
    head: Tensors = {"weight": ones(32, 64, dtype=BF16), suffix: beside}
    converted = convert(Pico(config, {DOWN: tensors, "lm_head": head}).write(tmp_path / "in"), tmp_path / "out")
    assert [tensor.name for tensor in converted.plan.passed] == ["lm_head.weight"]
    assert converted.plan.notes == (f"lm_head.{suffix}: dropped; left over beside a weight that is not quantized",)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "scales", "qzeros", "input_scale"])
def test_a_scale_of_the_weight_itself_beside_a_float_weight_is_refused(suffix: str, tmp_path: Path) -> None:
    """Whether the weight has been multiplied by it already cannot be told; nor what a scale for each column is for."""
    config, tensors = KINDS["fp8"]
    head: Tensors = {"weight": ones(32, 64, dtype=BF16), suffix: ones(32, 1, dtype=np.float32)}
    assert "lm_head" in refusal(tmp_path, Pico(config, {DOWN: tensors, "lm_head": head}))


@pytest.mark.parametrize(
    "name",
    [
        # sgl-project/sglang#36137, vllm-project/vllm#54304: compressed-tensors quantizes embeddings on request.
        "model.embed_tokens",
        # google/gemma-3n-E4B-it, ggml-org/llama.cpp#22243.
        "model.language_model.embed_tokens_per_layer",
        # GPT-2, BLOOM, Mamba, RWKV, T5, DeepSeek, Mistral's own names.
        *("transformer.wte", "transformer.wpe", "transformer.word_embeddings", "backbone.embeddings", "model.emb"),
        *("shared", "embed", "tok_embeddings", "model.position_embeddings", "decoder.embed_positions"),
        # sgl-project/sglang#39666, ROCm/ATOM#2185: hashed n-gram tables of DeepSeek-V4.1 and LongCat.
        *("layers.1.engram.embedding", "layers.1.engram.hash_table", "model.ngram_embeddings.3"),
    ],
)
def test_tables_are_told_by_their_role(name: str, tmp_path: Path) -> None:
    checkpoint = Pico(ct_config(), {name: pack_quantized(WEIGHT, zeros="none")})
    assert is_embedding(name) and "embedding" in refusal(tmp_path / "a", checkpoint)
    plan = make_plan(checkpoint.write(tmp_path / "b").checkpoint, Options(on_unsupported="dequantize"))
    assert [module.conversion.scheme for module in plan.modules] == [None]


@pytest.mark.parametrize(
    "name",
    [
        # Linears with a table's word in their names: GPT-NeoX's head, Gemma-3n's and vision towers' projections.
        *("embed_out", "model.embed_vision.embedding_projection", "visual.patch_embed.proj", "visual.patch_embed"),
        *("model.layers.0.per_layer_input_gate", "model.per_layer_model_projection", "layers.1.engram.value_proj"),
        *("lm_head", "output", "head", DOWN, "model.layers.0.mlp.shared_expert.up_proj"),
    ],
)
def test_linears_are_no_tables(name: str) -> None:
    assert not is_embedding(name)


def test_nothing_to_convert_is_said_with_what_was_left_over(tmp_path: Path) -> None:
    """A bf16 model with static scales of activations and a config that says fp8."""
    checkpoint = Pico({"quant_method": "fp8"}, {"lm_head": {"weight": ones(4, 4), "input_scale": ones(1)}})
    assert "nothing is quantized" in refusal(tmp_path, checkpoint, UsageError)
