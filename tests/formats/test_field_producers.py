"""Exports of AMD Quark, NVIDIA ModelOpt and SGLang: read or refused for what they are, and called by their producer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ints import DOWN, Ints, Pico, Tensors, awq, convert, ct_config, ints, refusal, unpacked

from xpuquant.conversion.inspection import inspect_source
from xpuquant.conversion.options import Options
from xpuquant.conversion.sources.base import read_slice
from xpuquant.errors import DamagedError
from xpuquant.formats.readers import reading

UP = "model.layers.0.mlp.up_proj"
MODELOPT = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 128}
QUARK = {
    "quant_method": "quark",
    "global_quant_config": {"weight": {"dtype": "int4", "qscheme": "per_group", "group_size": 32}},
    "export": {"pack_method": "reorder"},
}


def modelopt_int4(weight: Ints) -> Tensors:
    """modelopt/torch/export/quant_utils.py, `pack_int4_in_uint8`, a byte at a time: rows 2i and 2i + 1 share one."""
    signed = weight.codes.astype(np.int16) - 8
    packed = np.zeros((weight.N // 2, weight.K), np.uint8)
    for n in range(weight.N):
        packed[n // 2] |= ((signed[n] & 15) << (4 * (n % 2))).astype(np.uint8)
    return {"weight": packed, "weight_scale": weight.scales.T.copy()}


@pytest.mark.parametrize("layout", ["xpu", "compressed-tensors"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("scale", [np.float32, np.float16])
def test_modelopts_int4(scale: Any, group: int, layout: str, tmp_path: Path) -> None:
    weight = ints(N=48, K=128, group=group, dtype=scale)
    source = Pico(MODELOPT, {DOWN: modelopt_int4(weight)}).write(tmp_path / "in")
    converted = convert(source, tmp_path / "out", layout=layout)
    assert np.array_equal(converted.values(DOWN), weight.values) and "two rows to a byte" in converted.facts(DOWN)


@pytest.mark.parametrize(("start", "stop"), [(0, 48), (0, 1), (1, 2), (7, 12), (6, 11), (47, 48)])
def test_any_rows_of_modelopts_int4(start: int, stop: int, tmp_path: Path) -> None:
    weight = ints(N=48, K=64)
    source = Pico(MODELOPT, {DOWN: modelopt_int4(weight)}).write(tmp_path)
    (read,) = reading.read(source.checkpoint).weights
    recipe = read.decoded(start, stop)
    decoded = recipe.build([read_slice(source, part) for part in recipe.inputs])
    assert np.array_equal(decoded.values(), weight.values[start:stop])


def test_experts_of_modelopts_int4(tmp_path: Path) -> None:
    names = ("gate_proj", "up_proj", "down_proj")
    weights = {f"model.layers.0.mlp.experts.{e}.{name}": ints(N=64, K=64, seed=e) for e in range(2) for name in names}
    modules = {name: modelopt_int4(weight) for name, weight in weights.items()}
    converted = convert(Pico(MODELOPT, modules).write(tmp_path / "in"), tmp_path / "out")
    for name, weight in weights.items():
        expert, part = name.split(".")[-2:]
        role = part.removesuffix("_proj")
        assert np.array_equal(converted.values("model.layers.0.mlp.experts", role, int(expert)), weight.values)


def test_what_modelopt_computes_beside_its_int4_is_named(tmp_path: Path) -> None:
    weight = modelopt_int4(ints())
    factor = weight | {"pre_quant_scale": np.ones(64, np.float16)}
    said = refusal(tmp_path / "a", Pico(MODELOPT, {DOWN: factor, UP: weight}))
    assert "its input is multiplied by pre_quant_scale F16 [64]" in said
    again = weight | {"weight_scale_2": np.ones((), np.float32), "input_scale": np.ones((), np.float32)}
    said = refusal(tmp_path / "b", Pico(MODELOPT, {DOWN: again}))
    assert "int4 for fp8 activations (ModelOpt's W4A8_AWQ)" in said


def test_int4_of_other_shapes_is_not_modelopts(tmp_path: Path) -> None:
    odd = modelopt_int4(ints()) | {"weight_scale": np.ones((7, 2), np.float16)}
    said = refusal(tmp_path / "a", Pico(MODELOPT, {DOWN: odd}), DamagedError)
    assert "needs scales of 16 rows" in said
    assert "is no packing that is known here" in refusal(tmp_path / "b", Pico(ct_config(), {DOWN: odd}))


@pytest.mark.parametrize("zeros", [False, True])
def test_quarks_words_are_refused_by_name(zeros: bool, tmp_path: Path) -> None:
    tensors: Tensors = {"weight": np.zeros((64, 2), np.int32), "weight_scale": np.ones((2, 16), np.float16)}
    if zeros:
        tensors["weight_zero_point"] = np.zeros((2, 2), np.int32)
    said = refusal(tmp_path, Pico(QUARK, {DOWN: tensors}))
    assert "AMD Quark's int4 words, whose axis and order differ between its releases" in said


def test_quarks_export_in_awqs_names_is_read(tmp_path: Path) -> None:
    """With `custom_mode="awq"` config.json says awq; read under either name."""
    weight = ints(symmetric=False)
    source = Pico(QUARK, {DOWN: awq(weight)}).write(tmp_path / "in")
    assert np.array_equal(convert(source, tmp_path / "out").values(DOWN), weight.values)


BYTES = ints(8, N=32, K=128, group=128, dtype=np.float32)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "w8a8_int8"}, "sglang int"),
        ({"quant_method": "quark"}, "quark int"),
        ({"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}, "modelopt int"),
        (ct_config(8, None, format="int-quantized"), "compressed-tensors int"),
    ],
)
def test_reports_name_the_producer(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    source = Pico(config, {DOWN: unpacked(BYTES)}).write(tmp_path)
    assert inspect_source(source, Options()).formats == (named,)
