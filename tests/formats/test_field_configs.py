"""Configs that say less than the tensors, or something else: modules that people publish and other loaders read.

Each case is rebuilt small from the public report or the source named beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.floats import NVFP4_MODELOPT_CONFIG, TABLES, block, nvfp4, random, tensor
from support.ints import (
    DOWN,
    Array,
    Ints,
    Pico,
    Tensors,
    awq_config,
    convert,
    ct_config,
    gptq,
    gptq_config,
    ints,
    pack_quantized,
    refusal,
    unpacked,
)

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.repo.assemble import PRODUCER
from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.readers import reading
from xpuquant.formats.weights.floats import FloatWeight

LANGUAGE = "model.language_model.layers.0.mlp.down_proj"
QKV = "model.layers.0.linear_attn.in_proj_qkv"

BYTES = ints(8, N=32, K=128, group=128, dtype=np.float32)
GROUPED = ints(8, N=32, K=128, group=32, dtype=np.float32)


def elsewhere(bits: int = 4, **keys: Any) -> dict[str, Any]:
    """vllm-project/vllm#12617, #31623: targets that list modules by names which they have no longer."""
    config = ct_config(bits, **keys)
    config["config_groups"]["group_0"]["targets"] = [r"re:^model\.layers\..*_proj$", "lm_head"]
    return config


PACKED = {
    "by another prefix": (elsewhere(), ints(N=32, K=128)),
    "by another prefix, 3 bits": (elsewhere(3), ints(3, N=32, K=128)),
    "by another prefix, asymmetric": (elsewhere(), ints(N=32, K=128, symmetric=False)),
    "by another prefix, a scale per row": (elsewhere(), ints(N=32, K=128, group=128)),
    # vllm-project/vllm#12711: a config without groups.
    "no groups": ({**ct_config(), "config_groups": {}}, ints(N=32, K=128)),
    # intel/auto-round#2174: layers whose group size is not that of their scheme.
    "another group size": (ct_config(4, 64), ints(N=32, K=128)),
    "groups where the config says rows": (ct_config(4, None), ints(N=32, K=128)),
    "rows where the config says groups": (ct_config(4, 64), ints(N=32, K=128, group=128)),
}


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("case", PACKED)
def test_packed_integers_are_read_by_their_shapes(case: str, padded: bool, tmp_path: Path) -> None:
    config, weight = PACKED[case]
    tensors = pack_quantized(weight, padded=padded, zeros="packed" if (weight.zeros != 8).any() else "none")
    converted = convert(Pico(config, {LANGUAGE: tensors}).write(tmp_path / "in"), tmp_path / "out")
    assert np.array_equal(converted.values(LANGUAGE), weight.values)
    assert "from the shapes" in converted.facts(LANGUAGE) and "config" in converted.facts(LANGUAGE)


@pytest.mark.parametrize(
    ("config", "tensors", "error", "said"),
    [
        (elsewhere(), pack_quantized(ints(N=32, K=128), zeros="none", shape=False), UnsupportedError, "of no known"),
        # 128 codes of 7 bits that straddle no word take as many words as 128 octets.
        (elsewhere(), pack_quantized(ints(8, N=32, K=128), zeros="none"), UnsupportedError, "may be of 7 or 8 bits"),
        (ct_config(8), pack_quantized(ints(N=32, K=128), zeros="none"), DamagedError, "(8-bit int, groups of 32)"),
        (
            ct_config(8),
            pack_quantized(ints(N=32, K=128), zeros="none", shape=False),
            DamagedError,
            "(8-bit int, groups",
        ),
        (ct_config(4, 64), pack_quantized(ints(N=32, K=120, group=20), zeros="none"), DamagedError, "groups of 64"),
    ],
)
def test_what_the_shapes_do_not_tell_is_not_guessed(
    config: dict[str, Any], tensors: Tensors, error: type[Exception], said: str, tmp_path: Path
) -> None:
    assert said in refusal(tmp_path, Pico(config, {LANGUAGE: tensors}), error)


W8A8: dict[str, tuple[dict[str, Any], Ints, Tensors]] = {
    # meituan/DeepSeek-R1-Channel-INT8 (sgl-project/sglang#3888).
    "SGLang, channels": ({"quant_method": "w8a8_int8"}, BYTES, {}),
    # amd/*-int8 (vllm quark_w8a8_int8.py): a scale and a zero point for each row, as vectors.
    "Quark": (
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_channel"}}},
        BYTES,
        {"weight_scale": BYTES.scales.reshape(-1), "weight_zero_point": np.zeros(32, np.int8)},
    ),
    # NVIDIA/Model-Optimizer int8_sq, of a layer that keeps no pre_quant_scale.
    "ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"},
        BYTES,
        {"weight_scale": BYTES.scales.reshape(-1), "input_scale": np.array(0.1, np.float32)},
    ),
    "targets of other names": (elsewhere(8, format="int-quantized"), BYTES, {}),
    "another group size": (ct_config(8, 64, format="int-quantized"), GROUPED, {}),
}


@pytest.mark.parametrize("case", W8A8)
def test_integers_in_bytes_need_no_group_of_a_config(case: str, tmp_path: Path) -> None:
    config, weight, other = W8A8[case]
    converted = convert(Pico(config, {LANGUAGE: unpacked(weight) | other}).write(tmp_path / "in"), tmp_path / "out")
    assert np.array_equal(converted.values(LANGUAGE), weight.values)
    assert "8-bit codes stored as bytes" in converted.facts(LANGUAGE)


def test_integers_in_blocks(tmp_path: Path) -> None:
    """meituan/DeepSeek-R1-Block-INT8 (sgl-project/sglang#3730): FP8's blocks and names, with ragged last blocks."""
    weight = block(200, 256, scale=np.float32)
    codes = weight.codes.view(np.int8)
    config = {"quant_method": "blockwise_int8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    source = Pico(config, {DOWN: {"weight": codes, "weight_scale_inv": weight.scales}}).write(tmp_path / "in")
    converted = convert(source, tmp_path / "out")
    spread = weight.scales.astype(np.float64)[np.arange(200) // 128][:, np.arange(256) // 128]
    assert np.array_equal(converted.values(DOWN), codes * spread)
    assert "W8A8 becomes W8A16" in converted.facts(DOWN)


def test_int4_in_bytes_under_the_names_of_blocks_is_refused(tmp_path: Path) -> None:
    """Barrrrry/DeepSeek-R1-W4AFP8 (NVIDIA/TensorRT-LLM#4123): two codes to a byte, a scale for each 128 columns."""
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors: Tensors = {"weight": np.zeros((256, 128), np.int8), "weight_scale_inv": np.ones((256, 2), np.float32)}
    assert "no weight of 8-bit integers in blocks of 128x128" in refusal(tmp_path, Pico(config, {DOWN: tensors}))


@pytest.mark.parametrize("desc_act", [False, None])
def test_a_g_idx_of_zeros_is_none(desc_act: bool | None, tmp_path: Path) -> None:
    """exllamav2/ext.py (make_q_matrix) and text-generation-inference (layers/gptq) take it so; vLLM reads none without
    desc_act. As an index it would give all columns the first group's scale."""
    weight = ints()
    tensors = gptq(weight) | {"g_idx": np.zeros(weight.K, np.int32)}
    source = Pico(gptq_config(desc_act=desc_act), {DOWN: tensors}).write(tmp_path / "in")
    converted = convert(source, tmp_path / "out")
    assert np.array_equal(converted.values(DOWN), weight.values) and "all zeros" in converted.facts(DOWN)


def test_a_g_idx_of_zeros_is_no_act_order(tmp_path: Path) -> None:
    tensors = gptq(ints()) | {"g_idx": np.zeros(64, np.int32)}
    said = refusal(tmp_path / "a", Pico(gptq_config(desc_act=True), {DOWN: tensors}), DamagedError)
    assert "g_idx is all zeros, which is no order of 2 groups; the config says desc_act" in said
    one = ints(group=64)
    source = Pico(gptq_config(desc_act=True, group_size=-1), {DOWN: gptq(one)}).write(tmp_path / "b")
    assert np.array_equal(convert(source, tmp_path / "out").values(DOWN), one.values), "one group: zeros are its order"


@pytest.mark.parametrize("g_idx", [np.zeros(0, np.int32), np.arange(64) // 32], ids=["empty", "int64"])
def test_spellings_of_a_trivial_g_idx(g_idx: Array, tmp_path: Path) -> None:
    """Empty ones are what Marlin's loaders keep (vllm marlin_utils.py, marlin_make_empty_g_idx)."""
    weight = ints()
    source = Pico(gptq_config(), {DOWN: gptq(weight) | {"g_idx": g_idx}}).write(tmp_path / "in")
    converted = convert(source, tmp_path / "out")
    assert np.array_equal(converted.values(DOWN), weight.values) and not converted.plan.passed


@pytest.mark.parametrize("config", [awq_config(), ct_config(), {"quant_method": "fp8"}], ids=["awq", "ct", "fp8"])
def test_gptq_tensors_under_the_config_of_another_format(config: dict[str, Any], tmp_path: Path) -> None:
    """Symmetric ones show how their zero points are stored; of asymmetric ones only a label could tell."""
    for v1 in (True, False):
        weight = ints()
        source = Pico(config, {DOWN: gptq(weight, v1=v1)}).write(tmp_path / f"in{v1}")
        assert np.array_equal(convert(source, tmp_path / f"out{v1}").values(DOWN), weight.values)
    odd = gptq(ints(symmetric=False))
    assert "for 'checkpoint_format' (gptq or gptq_v2) to say" in refusal(tmp_path / "odd", Pico(config, {DOWN: odd}))
    labelled = Pico({**config, "checkpoint_format": "gptq"}, {DOWN: odd}).write(tmp_path / "labelled")
    assert np.array_equal(convert(labelled, tmp_path / "out").values(DOWN), ints(symmetric=False).values)


FUSED: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    # vllm-project/vllm#47396: ModelOpt's per-tensor FP8 of Qwen3.5.
    "q, k and v of a Gated DeltaNet": (
        QKV,
        {
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 32,
        },
        (32, 32, 128),
    ),
    # vllm-project/vllm#5915, neuralmagic/nm-vllm#336: Phi-3.
    "q, k and v": (
        "model.layers.0.self_attn.qkv_proj",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128},
        (128, 32, 32),
    ),
    "gate and up": ("model.layers.0.mlp.gate_up_proj", {}, (96, 96)),
}


@pytest.mark.parametrize("case", FUSED)
def test_a_scale_for_each_fused_linear(case: str, tmp_path: Path) -> None:
    name, config, rows = FUSED[case]
    weight = tensor(192, 128)
    scales = np.array([0.5, 0.375, 0.1][: len(rows)], np.float32)
    tensors: Tensors = {"weight": weight.fp8, "weight_scale": scales, "input_scale": scales}
    checkpoint = Pico({"quant_method": "modelopt", "quant_algo": "FP8"}, {name: tensors}, config=config)
    converted = convert(checkpoint.write(tmp_path / "in"), tmp_path / "out")
    spread = np.repeat(scales.astype(np.float64), rows)[:, None]
    assert np.array_equal(converted.values(name), TABLES["e4m3"][weight.codes] * spread)
    assert "static activation scales, one for each fused linear: dropped" in converted.facts(name)


def test_a_scale_for_each_of_unknown_linears_is_refused_and_not_called_damaged(tmp_path: Path) -> None:
    tensors: Tensors = {"weight": tensor(192, 128).fp8, "weight_scale": np.ones(3, np.float32)}
    said = refusal(tmp_path, Pico({"quant_method": "fp8"}, {QKV: tensors}))
    assert "weight_scale has 3 numbers, one for each linear that is fused here" in said


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_over_all_has_any_number_of_axes(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = nvfp4(32, 64, number=0.001, divides=False)
    tensors = weight.tensors | {"weight_scale_2": np.full(shape, 0.001, np.float32)}
    converted = convert(Pico(NVFP4_MODELOPT_CONFIG, {DOWN: tensors}).write(tmp_path / "in"), tmp_path / "out")
    assert np.array_equal(converted.values(DOWN), weight.values)


def test_numbers_over_all_that_are_several_or_missing_are_named(tmp_path: Path) -> None:
    """vllm-project/vllm#54444: a checkpoint that never got them."""
    tensors = nvfp4(32, 64, divides=False).tensors
    several = tensors | {"weight_scale_2": np.ones(3, np.float32)}
    said = refusal(tmp_path / "a", Pico(NVFP4_MODELOPT_CONFIG, {DOWN: several}))
    assert f"{DOWN}.weight_scale_2 has shape [3]; kernels take one number over all" in said
    missing = {suffix: array for suffix, array in tensors.items() if suffix != "weight_scale_2"}
    said = refusal(tmp_path / "b", Pico(NVFP4_MODELOPT_CONFIG, {DOWN: missing}), DamagedError)
    assert f"{DOWN}.weight_scale_2 is missing" in said
    packed = {suffix: array for suffix, array in nvfp4(32, 64).tensors.items() if suffix != "weight_global_scale"}
    said = refusal(tmp_path / "c", Pico(ct_config(), {DOWN: packed}), DamagedError)
    assert f"{DOWN}.weight_global_scale is missing" in said


def test_the_first_name_of_static_activation_scales(tmp_path: Path) -> None:
    """neuralmagic/AutoFP8#11, vllm-project/vllm#5353: `act_scale` until June 2024; no factor of activations."""
    weight = tensor(32, 128)
    tensors: Tensors = {
        "weight": weight.fp8,
        "weight_scale": weight.scales.reshape(()),
        "act_scale": np.array(0.25, np.float32),
    }
    head: Tensors = {"weight": np.ones((8, 8), np.float16), "act_scale": np.ones(1, np.float32)}
    checkpoint = Pico({"quant_method": "fp8", "activation_scheme": "static"}, {DOWN: tensors, "lm_head": head})
    converted = convert(checkpoint.write(tmp_path / "in"), tmp_path / "out")
    assert np.array_equal(converted.values(DOWN), weight.values)
    assert converted.array(f"{DOWN}.input_scale") == np.float32(0.25)
    assert [passed.name for passed in converted.plan.passed] == ["lm_head.weight"]


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("method", ["fp8", "modelopt", "compressed-tensors"])
def test_a_float_weight_beside_its_scale_is_refused_for_what_it_is(method: str, scale: str, tmp_path: Path) -> None:
    """A head that was made float again and kept its scale, or a model that was saved so (huggingface/transformers
    #37250); only compressed-tensors has a fake quantization."""
    head: Tensors = {"weight": np.ones((32, 64), np.float16), scale: np.ones((1, 1), np.float32)}
    fp8: Tensors = {"weight": tensor(32, 128).fp8, "weight_scale": np.ones(1, np.float32)}
    said = refusal(tmp_path, Pico({"quant_method": method}, {DOWN: fp8, "lm_head": head}))
    assert ("fake-quantized" in said) == (method == "compressed-tensors")
    assert f"weight F16 beside {scale} F32" in said or method == "compressed-tensors"


@pytest.mark.parametrize(
    "name",
    [
        # facebookresearch/fairseq and ESM: the frequencies of rotary embeddings, by a rotation's word.
        "encoder.layers.0.self_attn.rot_emb.inv_freq",
        # Feature pyramids of vision towers (facebookresearch/detectron2 and its kin).
        "vision_tower.neck.smooth.weight",
        "vision_tower.neck.smooth.bias",
        "vision_tower.neck.smooth_convs.0.weight",
    ],
)
def test_plain_tensors_with_a_factors_word_in_their_name_pass(name: str, tmp_path: Path) -> None:
    shape = (8, 8, 3, 3) if name.endswith("weight") else (8,)
    source = Pico(gptq_config(), {DOWN: gptq(ints())}, {name: np.ones(shape, np.float32)}).write(tmp_path)
    assert [passed.name for passed in make_plan(source.checkpoint, Options()).passed] == [name]


@pytest.mark.parametrize(
    ("name", "rows", "columns", "config"),
    [
        # vllm-project/vllm#54126: a block's size in a part of the config that loaders do not read.
        (DOWN, 64, 64, {"quant_method": "fp8"}),
        (DOWN, 128, 128, {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        (DOWN, 32, 256, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}),
    ],
)
def test_blocks_are_as_large_as_the_scales_show(
    name: str, rows: int, columns: int, config: dict[str, Any], tmp_path: Path
) -> None:
    weight = random("e4m3", 256, 512, rows, columns)
    checkpoint = Pico(config, {name: {"weight": weight.fp8, "weight_scale_inv": weight.scales}})
    (read,) = reading.read(checkpoint.write(tmp_path).checkpoint).weights
    assert isinstance(read, FloatWeight) and read.block == (rows, columns)
    assert f"in blocks of {rows}x{columns}, from the shapes" in "; ".join(read.facts)


def test_blocks_of_no_power_of_two_are_not_taken_from_the_shapes(tmp_path: Path) -> None:
    """192 rows in blocks of 128 have two rows of scales: they are no blocks of 96."""
    weight = random("e4m3", 192, 192, 128, 128)
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    said = refusal(
        tmp_path, Pico(config, {DOWN: {"weight": weight.fp8, "weight_scale_inv": weight.scales}}), DamagedError
    )
    assert "in blocks of [64, 64] needs [3, 3]" in said


def test_scales_without_a_weight(tmp_path: Path) -> None:
    """A head that is tied to the embeddings, saved without its weight: static scales of activations mean nothing."""
    fp8: Tensors = {"weight": tensor(32, 128).fp8, "weight_scale": np.ones(1, np.float32)}
    head: Tensors = {"input_scale": np.ones(1, np.float32)}
    checkpoint = Pico({"quant_method": "modelopt"}, {DOWN: fp8, "lm_head": head})
    plan = make_plan(checkpoint.write(tmp_path / "a").checkpoint, Options())
    assert plan.notes == ("lm_head.input_scale: dropped; left over where there is no weight",) and not plan.passed
    checkpoint = Pico({"quant_method": "modelopt"}, {DOWN: fp8, "lm_head": head | {"weight_scale": np.ones(1)}})
    assert "scales without a weight" in refusal(tmp_path / "b", checkpoint)


@pytest.mark.parametrize(("desc_act", "is_order"), [("False", False), ("false", False), ("true", True), (None, False)])
def test_truth_is_spelt_in_several_ways(desc_act: Any, is_order: bool, tmp_path: Path) -> None:
    checkpoint = Pico(gptq_config(desc_act=desc_act), {DOWN: gptq(ints(), g_idx=False)})
    if is_order:
        assert "g_idx is missing" in refusal(tmp_path, checkpoint, DamagedError)
    else:
        assert make_plan(checkpoint.write(tmp_path).checkpoint, Options()).modules


@pytest.mark.parametrize("layout", ["xpu", "compressed-tensors"])
@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        # google/gemma-*: tied by the model's class where the config says nothing.
        {"model_type": "gemma"},
        {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "hidden_size": 64}},
        {"text_config": {"hidden_size": 64}},
    ],
)
def test_a_quantized_head_of_its_own_is_not_tied(config: dict[str, Any], layout: str, tmp_path: Path) -> None:
    """vllm-project/vllm#51063: a head beside a config that ties it is dropped, and the embeddings multiply."""
    head = ints(N=32)
    for name, own in (("lm_head", True), (DOWN, False)):
        source = Pico(gptq_config(), {name: gptq(head)}, config=config).write(tmp_path / name)
        written = make_plan(source.checkpoint, Options(layout=layout)).output_config(source.checkpoint.config, PRODUCER)
        text = written.get("text_config", written)
        assert not own or text["tie_word_embeddings"] is False is bool(written.get("tie_word_embeddings"))
        assert own or text.get("tie_word_embeddings") == config.get("text_config", config).get("tie_word_embeddings")
