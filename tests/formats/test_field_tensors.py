"""What tensors show where a config says something wider, and scales in other shapes and dtypes than most have.

Each case is rebuilt small from the public report or the source named beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.floats import (
    NVFP4_CT_CONFIG,
    NVFP4_MODELOPT_CONFIG,
    block,
    channel,
    float_ct_config,
    fp8_tensors,
    nvfp4,
    random,
    tensor,
)
from support.ints import (
    DOWN,
    Array,
    Pico,
    Tensors,
    convert,
    ct_config,
    gptq,
    gptq_config,
    ints,
    pack_quantized,
    refusal,
    unpacked,
)

from xpuquant.errors import DamagedError

UP = "model.layers.0.mlp.up_proj"

SPARSE: dict[str, dict[str, Any]] = {
    # RedHatAI/granite-3.1-8b-instruct-quantized.w4a16 (vllm-project/vllm#51188).
    "dense": {"sparsity_config": {"format": "dense", "targets": ["Linear"], "global_sparsity": 0.14}},
    # vllm-project/vllm#12517: part of the modules is sparse.
    "2:4, all ignored": {
        "sparsity_config": {"format": "sparse-24-bitmask", "ignore": ["re:.*"], "targets": ["Linear"]}
    },
    "2:4": {"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}},
    "bitmask": {"sparsity_config": {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}},
}
BITMASK: Tensors = {
    "compressed": np.ones((16, 32), np.float16),
    "bitmask": np.full((16, 8), 0x55, np.uint8),
    "shape": np.array([16, 64], np.int64),
}
DENSE: dict[str, tuple[dict[str, Any], Tensors, Array]] = {
    "int4": (ct_config(), pack_quantized(ints(), zeros="none"), ints().values),
    "int8": (ct_config(8, format="int-quantized"), unpacked(ints(8)), ints(8).values),
    "fp8": (float_ct_config("float-quantized", "channel"), fp8_tensors(channel(32, 64)), channel(32, 64).values),
    "nvfp4": (NVFP4_CT_CONFIG, nvfp4(32, 64).tensors, nvfp4(32, 64).values),
}


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("case", DENSE)
def test_a_module_is_sparse_where_its_tensors_are(case: str, sparse: str, tmp_path: Path) -> None:
    config, tensors, values = DENSE[case]
    said = {**config, **SPARSE[sparse]}
    assert np.array_equal(
        convert(Pico(said, {DOWN: tensors}).write(tmp_path / "in"), tmp_path / "out").values(DOWN), values
    )
    refused = refusal(tmp_path / "mixed", Pico(said, {DOWN: tensors, UP: BITMASK}))
    assert "sparse (bitmask) weights have no XPU kernel" in refused and UP in refused and DOWN not in refused


@pytest.mark.parametrize("shape", [(32,), (32, 1), (1, 32)])
def test_a_scale_for_each_row_along_either_axis(shape: tuple[int, ...], tmp_path: Path) -> None:
    fp8, codes = channel(32, 128), ints(8, N=32, K=128, group=128, dtype=np.float32)
    cases: list[tuple[dict[str, Any], Tensors, Array]] = [
        ({"quant_method": "fp8"}, fp8_tensors(fp8, shape=shape), fp8.values),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensors(fp8, "weight_scale_inv", shape), fp8.values),
        ({"quant_method": "w8a8_int8"}, unpacked(codes) | {"weight_scale": codes.scales.reshape(shape)}, codes.values),
        (
            ct_config(8, None, format="int-quantized"),
            unpacked(codes) | {"weight_scale": codes.scales.reshape(shape)},
            codes.values,
        ),
    ]
    for number, (config, tensors, values) in enumerate(cases):
        source = Pico(config, {DOWN: tensors}).write(tmp_path / f"in{number}")
        assert np.array_equal(convert(source, tmp_path / f"out{number}").values(DOWN), values)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 256), (1, 256)], ids=["blocks", "tensor", "rows"])
def test_exponents_in_plain_bytes(name: str, rows: int, columns: int, tmp_path: Path) -> None:
    """`scale_fmt: ue8m0` in files of before PyTorch had float8_e8m0fnu."""
    weight = random("e4m3", 256, 256, rows, columns, scale=np.uint8)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    converted = convert(Pico(config, {DOWN: fp8_tensors(weight, name)}).write(tmp_path / "in"), tmp_path / "out")
    assert np.array_equal(converted.values(DOWN), weight.values)


def test_exponents_of_experts_in_plain_bytes(tmp_path: Path) -> None:
    stacks = {"gate_up_proj": (2, 256, 128), "down_proj": (2, 128, 128)}
    tensors: Tensors = {}
    for part, (E, N, K) in stacks.items():
        each = [block(N, K, seed=expert, scale=np.uint8) for expert in range(E)]
        tensors[part] = np.stack([weight.fp8 for weight in each])
        tensors[f"{part}_scale_inv"] = np.stack([weight.scales for weight in each])
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    name = "model.layers.0.mlp.experts"
    converted = convert(Pico(config, {name: tensors}).write(tmp_path / "in"), tmp_path / "out")
    for expert in range(2):
        assert np.array_equal(
            converted.values(name, "down", expert), block(128, 128, seed=expert, scale=np.uint8).values
        )


@pytest.mark.parametrize("scale", [np.int8, np.int32, np.bool_])
def test_no_other_integers_are_scales(scale: Any, tmp_path: Path) -> None:
    tensors: Tensors = {"weight": tensor(128, 128).fp8, "weight_scale": np.ones((1, 1), scale)}
    assert "F8_E8M0, U8" in refusal(tmp_path, Pico({"quant_method": "fp8"}, {DOWN: tensors}), DamagedError)


@pytest.mark.parametrize("config", [NVFP4_CT_CONFIG, NVFP4_MODELOPT_CONFIG], ids=["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("shape", [(128, 8), (1024,), (1, 2, 32, 4, 4)])
def test_swizzled_scales_are_named(shape: tuple[int, ...], config: dict[str, Any], tmp_path: Path) -> None:
    """vllm quantization/utils/nvfp4_utils.py (swizzle_blockscale): 48 rows of 5 groups become tiles of 128 x 4."""
    weight = nvfp4(48, 80, divides=config is NVFP4_CT_CONFIG)
    tensors = weight.tensors | {"weight_scale": np.zeros(shape, weight.scales.dtype)}
    said = refusal(tmp_path, Pico(config, {DOWN: tensors}))
    assert f"weight_scale has shape {list(shape)}: scales swizzled for Blackwell (tiles of 128x4) have no XPU" in said


TABLES_OF_MODELS: Tensors = {
    "visual.pooler.packed_coords": np.arange(12, dtype=np.int64).reshape(4, 3),
    "visual.pooler.offsets": np.ones(4, np.float32),
    "audio.frames.neighbours": np.arange(12, dtype=np.int32).reshape(4, 3),
    "audio.frames.window": np.ones(8, np.float32),
}


def test_tables_of_integers_beside_floats_pass(tmp_path: Path) -> None:
    source = Pico(gptq_config(), {DOWN: gptq(ints())}, TABLES_OF_MODELS).write(tmp_path / "in")
    converted = convert(source, tmp_path / "out")
    assert {passed.name for passed in converted.plan.passed} == set(TABLES_OF_MODELS)
    for name, array in TABLES_OF_MODELS.items():
        assert np.array_equal(converted.array(name), array)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("place", ["model.layers.0.mlp.up_proj.", "model.layers.0.mlp.up_proj.packed."])
def test_words_in_a_linear_are_no_table(place: str, dtype: Any, tmp_path: Path) -> None:
    """SqueezeLLM and Any-Precision have a table of values, and no scale, beside their words."""
    plain: Tensors = {f"{place}words": np.zeros((8, 16), dtype), f"{place}lut": np.ones((16, 16), np.float16)}
    said = refusal(tmp_path, Pico(gptq_config(), {DOWN: gptq(ints())}, plain))
    assert "no known format has these tensors" in said and "words" in said


@pytest.mark.parametrize(
    "beside", ["scale", "weight_scales", "q_scale_max", "SU", "svh", "absmax", "codebook", "zeros"]
)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_words_beside_scales_are_no_table(dtype: Any, beside: str, tmp_path: Path) -> None:
    plain: Tensors = {"visual.x.words": np.zeros((8, 16), dtype), f"visual.x.{beside}": np.ones((1, 16), np.float16)}
    assert "words" in refusal(tmp_path, Pico(gptq_config(), {DOWN: gptq(ints())}, plain))
