"""AWQ: the gemm packing, and the other packings under the same names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ints import DOWN, Converted, Ints, Pico, awq, awq_config, convert, ints, refusal

from xpuquant.errors import DamagedError


def converted(folder: Path, weight: Ints, tensors=None, name: str = DOWN, **config) -> Converted:
    source = Pico(awq_config(**config), {name: tensors or awq(weight)}).write(folder / "in")
    out = convert(source, folder / "out")
    assert np.array_equal(out.values(name), weight.values)
    return out


def test_golden_bytes(tmp_path):
    # Column n of every row holds code n: one word, in the order 0, 2, 4, 6, 1, 3, 5, 7.
    codes = np.repeat(np.arange(8, dtype=np.uint8)[:, None], 32, axis=1)
    zeros = np.arange(8, 16, dtype=np.uint8)[None]
    weight = Ints(4, codes, zeros, np.ones((1, 8), np.float16), np.zeros(32, int))
    tensors = awq(weight)
    assert tensors["qweight"].tobytes() == bytes.fromhex("20 64 31 75") * 32
    assert tensors["qzeros"].tobytes() == bytes.fromhex("a8 ec b9 fd")
    out = converted(tmp_path, weight, tensors)
    assert out.array(f"{DOWN}.qweight").tobytes() == b"".join(bytes([0x11 * n]) * 16 for n in range(8))
    assert out.array(f"{DOWN}.qzeros").tobytes() == bytes.fromhex("98 ba dc fe")


def test_k_runs_along_the_words_of_the_output(tmp_path):
    codes = np.tile(np.arange(8, dtype=np.uint8), (8, 4))
    weight = Ints(4, codes, np.full((1, 8), 8, np.uint8), np.ones((1, 8), np.float16), np.zeros(32, int))
    assert awq(weight)["qweight"][:3].tobytes() == bytes.fromhex("00 00 00 00 11 11 11 11 22 22 22 22")
    assert converted(tmp_path, weight).array(f"{DOWN}.qweight").tobytes() == bytes.fromhex("10 32 54 76") * 32


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.sampled_from([32, 64, 128]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_every_shape_converts_exactly(tmp_path_factory, symmetric, group, blocks, n, seed):
    weight = ints(4, 8 * n, group * blocks, group, symmetric=symmetric, seed=seed)
    out = converted(tmp_path_factory.mktemp("awq"), weight, group_size=group)
    assert out.repo.modules[DOWN].scheme.symmetric == symmetric


def test_zero_points_are_true_whatever_their_value(tmp_path):
    weight = ints(symmetric=False)
    assert {0, 15} <= set(weight.zeros.flat) or weight.zeros.size < 64
    weight.zeros.reshape(-1)[:16] = np.arange(16)
    converted(tmp_path, weight)


def test_symmetry_is_measured(tmp_path):
    out = converted(tmp_path, ints(), zero_point=True)
    assert "symmetric, from the words" in out.facts(DOWN)
    out = converted(tmp_path / "b", ints(symmetric=False), zero_point=False)
    assert "asymmetric, from the words, although the config says symmetric" in out.facts(DOWN)


def test_qzeros_may_be_absent_only_where_symmetric(tmp_path):
    weight = ints()
    tensors = awq(weight)
    del tensors["qzeros"]
    converted(tmp_path, weight, tensors, zero_point=False)
    message = refusal(tmp_path / "b", Pico(awq_config(), {DOWN: tensors}), DamagedError)
    assert message.startswith(f"{DOWN}.qzeros is missing, but the config does not say symmetric")


@pytest.mark.parametrize(
    "keys", [{"w_bit": 4, "q_group_size": 64, "bits": None, "group_size": None}, {"group_size": -1}]
)
def test_old_keys_and_channel_wise(tmp_path, keys):
    group = 128 if keys.get("group_size") == -1 else 64
    converted(tmp_path, ints(K=128, group=group), **keys)


def test_float_scales_of_every_dtype(tmp_path):
    converted(tmp_path, ints(dtype=np.float32))


def test_experts(tmp_path):
    names = [
        f"model.layers.0.mlp.experts.{e}.{part}" for e in range(2) for part in ("gate_proj", "up_proj", "down_proj")
    ]
    weights = {name: ints(N=64, K=64, seed=seed) for seed, name in enumerate(names)}
    source = Pico(awq_config(), {name: awq(w) for name, w in weights.items()}).write(tmp_path / "in")
    out = convert(source, tmp_path / "out")
    for name, weight in weights.items():
        *_, expert, part = name.split(".")
        values = out.values("model.layers.0.mlp.experts", part.removesuffix("_proj"), int(expert))
        assert np.array_equal(values, weight.values)


@pytest.mark.parametrize(
    ("config", "shapes", "reason"),
    [
        ({"version": "gemv"}, {"qweight": (16, 8), "scales": (16, 2)}, "AWQ version 'gemv' is a packing of its own"),
        ({"version": "GEMV_fast"}, {"qweight": (4, 64), "scales": (2, 16)}, "AWQ version 'gemv_fast' is a packing"),
        ({"version": "marlin"}, {"qweight": (4, 32), "scales": (2, 16)}, "AWQ version 'marlin' is a packing of"),
        ({"backend": "llm-awq"}, {"qweight": (4, 64), "scales": (2, 16)}, "the tensors are in llm-awq's int16 packing"),
        ({}, {"qweight": (64, 4), "scales": (2, 16)}, "is 8-bit AWQ, whose order no known writer defines"),
        ({}, {"qweight": (4, 32), "scales": (2, 16)}, "is neither GPTQ's nor AWQ's packing (a kernel's own order?)"),
        (
            {"rotation_config": {"a": 1}},
            {"qweight": (64, 2), "scales": (2, 16)},
            "the config asks for 'rotation_config'",
        ),
    ],
)
def test_other_packings_are_refused_by_name(tmp_path, config, shapes, reason):
    tensors = {
        "qweight": np.zeros(shapes["qweight"], np.int32),
        "scales": np.ones(shapes["scales"], np.float16),
    }
    assert reason in refusal(tmp_path, Pico(awq_config(**config), {DOWN: tensors}))


def test_int16_words_are_refused_by_name(tmp_path):
    tensors = {"qweight": np.zeros((4, 64), np.int16), "scales": np.ones((2, 16), np.float16)}
    assert "llm-awq's int16 packing (or gemv_fast)" in refusal(tmp_path, Pico(awq_config(), {DOWN: tensors}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(scales=t["scales"].astype(np.int16)), f"{DOWN}.scales is I16, want one of F16, BF16, F32"),
        (lambda t: t.update(qzeros=t["qzeros"][:1]), f"{DOWN}.qzeros has shape [1, 2], want [2, 2]"),
        (lambda t: t.update(qzeros=t["qzeros"].astype(np.int64)), f"{DOWN}.qzeros is I64, want I32"),
        (lambda t: t.update(scales=t["scales"].repeat(2, axis=0)[:3]), f"{DOWN}.scales has 3 groups, which no group"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    tensors = awq(ints())
    change(tensors)
    assert message in refusal(tmp_path, Pico(awq_config(), {DOWN: tensors}), DamagedError)


def test_dequantizing(tmp_path):
    weight = ints(N=16, K=40, group=40, symmetric=False)
    source = Pico(awq_config(group_size=-1), {DOWN: awq(weight)}).write(tmp_path / "in")
    out = convert(source, tmp_path / "out", on_unsupported="dequantize")
    assert np.allclose(out.array(f"{DOWN}.weight").astype(np.float64), weight.values, rtol=2**-8)
