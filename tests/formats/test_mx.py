"""MXFP4 and MXFP8: linears and experts, every producer's names, exponents at their limits, and lookalikes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FIXTURES
from support.floats import (
    E8M0,
    EXPERTS,
    Floats,
    expert_modules,
    expert_weights,
    float_ct_config,
    mx_tensors,
    mxfp4,
    mxfp4_ct_config,
    mxfp8,
    random,
)
from support.ints import DOWN, Pico, convert, refusal

from xpuquant.conversion.sources.open import open_source
from xpuquant.errors import DamagedError

MXFP8_CONFIG = float_ct_config("mxfp8-quantized", "group")
AUTOROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "data_type": "mx_fp",
    "packing_format": "auto_round:llm_compressor",
}


def linear(folder, weight: Floats, tensors=None, config=None):
    """Convert one module; the output must mean what the weight does."""
    pico = Pico(config or mxfp4_ct_config(), {DOWN: tensors or mx_tensors(weight)})
    out = convert(pico.write(folder / "in"), folder / "out")
    np.testing.assert_array_equal(out.values(DOWN), weight.values)
    return out


def converted(folder, modules, config=None, **more):
    pico = Pico(config or mxfp4_ct_config(), modules, **more)
    return convert(pico.write(folder / "in"), folder / "out")


def check_experts(out, weights):
    for (expert, role), weight in weights.items():
        np.testing.assert_array_equal(out.values(EXPERTS, role, expert), weight.values)


# Linears.


def test_mxfp4_codes_keep_their_bytes_and_exponents_turn(tmp_path):
    """By eye: codes 0..7 and exponents 100..103 of two rows."""
    codes = np.tile(np.arange(8, dtype=np.uint8), (2, 8))
    weight = Floats("e2m1", codes, np.array([[100, 101], [102, 103]], np.uint8), 1, 32)
    out = linear(tmp_path, weight)
    assert out.array(f"{DOWN}.weight")[0, :4].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert out.array(f"{DOWN}.weight_scale").tolist() == [[100, 102], [101, 103]]
    assert out.repo.modules[DOWN].scheme.label() == "mxfp4_linear g32"


def test_mxfp8_codes_keep_their_bytes_and_exponents_turn(tmp_path):
    codes = np.tile(np.arange(64, dtype=np.uint8), (2, 1))
    weight = Floats("e4m3", codes, np.array([[100, 101], [102, 103]], np.uint8), 1, 32)
    out = linear(tmp_path, weight, config=MXFP8_CONFIG)
    assert out.array(f"{DOWN}.weight").view(np.uint8)[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert out.array(f"{DOWN}.weight_scale").tolist() == [[100, 102], [101, 103]]


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (lambda w: {"weight_packed": w.packed, "weight_scale": w.scales}, AUTOROUND),
        (lambda w: {"weight_packed": w.packed, "weight_scale": w.scales.view(E8M0)}, mxfp4_ct_config()),
        (lambda w: {"weight": w.packed, "weight_scale": w.scales}, {"quant_method": "quark"}),
        (lambda w: {"weight": w.packed.view(np.int8), "scale": w.scales.view(E8M0)}, {"quant_method": "fp8"}),
    ],
    ids=["auto-round", "e8m0", "quark", "deepseek-v4"],
)
def test_every_spelling_of_mxfp4(tmp_path, tensors, config):
    weight = mxfp4(24, 96)
    linear(tmp_path, weight, tensors(weight), config)


def test_minus_zero_and_the_ends_of_the_exponents_stay(tmp_path):
    weight = mxfp4(8, 96)
    weight.codes[0] = 8
    weight.scales[:, 0] = (0, 1, 127, 253, 254, 255, 0, 255)
    out = linear(tmp_path, weight)
    assert out.array(f"{DOWN}.weight").tobytes() == weight.packed.tobytes()
    assert np.isnan(out.values(DOWN)[5, :32]).all()


def test_mxfp8_of_e5m2_keeps_nan(tmp_path):
    weight = random("e5m2", 16, 64, 1, 32, scale=np.uint8, finite=False)
    weight.codes[0, :4] = (0x7C, 0xFC, 0x7F, 0xFF)
    linear(tmp_path, weight, config=MXFP8_CONFIG)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["e2m1", "e4m3", "e5m2"]),
    N=st.integers(1, 40),
    K=st.integers(1, 6).map(lambda g: 32 * g),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_linear_keeps_its_values(tmp_path_factory, kind, N, K, seed):
    weight = random(kind, N, K, 1, 32, scale=np.uint8, seed=seed, finite=False)
    weight.scales[:] = np.random.default_rng(seed).integers(0, 256, weight.scales.shape)
    linear(tmp_path_factory.mktemp("mx"), weight)


# Experts.


def test_mxfp4_experts_keep_rows_gate_then_up(tmp_path):
    weights = expert_weights(mxfp4, H=64, I=32)
    out = converted(tmp_path, expert_modules(weights, mx_tensors))
    check_experts(out, weights)
    gate, up = weights[1, "gate"], weights[1, "up"]
    rows = out.array(f"{EXPERTS}.gate_up_proj")[1]
    np.testing.assert_array_equal(rows, np.concatenate([gate.packed, up.packed]))
    scale = out.array(f"{EXPERTS}.gate_up_proj_scale")[1]
    np.testing.assert_array_equal(scale, np.concatenate([gate.scales, up.scales]))
    np.testing.assert_array_equal(out.array(f"{EXPERTS}.down_proj_scale")[1], weights[1, "down"].scales)


def test_mxfp8_experts_are_transposed_and_their_exponents_are_not(tmp_path):
    weights = expert_weights(mxfp8, H=64, I=32)
    out = converted(tmp_path, expert_modules(weights, mx_tensors), MXFP8_CONFIG)
    check_experts(out, weights)
    gate, up = weights[1, "gate"], weights[1, "up"]
    stored = out.array(f"{EXPERTS}.gate_up_proj")[1].view(np.uint8)
    np.testing.assert_array_equal(stored, np.concatenate([gate.codes, up.codes]).T)
    assert out.array(f"{EXPERTS}.gate_up_proj_scale").shape == (2, 64, 2)
    np.testing.assert_array_equal(out.array(f"{EXPERTS}.down_proj_scale")[1], weights[1, "down"].scales)


@settings(max_examples=20, deadline=None)
@given(
    make=st.sampled_from([mxfp4, mxfp8]),
    H=st.integers(1, 3).map(lambda g: 32 * g),
    I=st.integers(1, 3).map(lambda g: 32 * g),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_experts_keep_their_values(tmp_path_factory, make, H, I, seed):
    weights = expert_weights(lambda N, K, seed=0, base=seed: make(N, K, seed + base), H, I)
    out = converted(tmp_path_factory.mktemp("mx"), expert_modules(weights, mx_tensors))
    check_experts(out, weights)


def test_mixed_precision_takes_each_module_for_what_it_is(tmp_path):
    """compressed-tensors' global format is then only a label."""
    four, eight = mxfp4(24, 96), mxfp8(24, 96)
    modules = {DOWN: mx_tensors(four), "model.layers.0.mlp.up_proj": mx_tensors(eight)}
    out = converted(tmp_path, modules, mxfp4_ct_config(format="mixed-precision"))
    np.testing.assert_array_equal(out.values(DOWN), four.values)
    np.testing.assert_array_equal(out.values("model.layers.0.mlp.up_proj"), eight.values)


# compressed-tensors 0.13 wrote exponents with bias 125.


def shifted(weight: Floats) -> Floats:
    """Bytes wrap: all-zero groups, whose exponent is 0, have 254 in real files."""
    scales = ((weight.scales.astype(int) - 2) % 256).astype(np.uint8)
    return Floats(weight.element, weight.codes, scales, 1, 32)


@pytest.mark.parametrize("version", ["0.13.0", "0.13.1.a20251230"])
def test_exponents_of_013_are_mended(tmp_path, version):
    weight = mxfp4(8, 96)
    weight.scales[0] = (0, 1, 254)
    out = linear(tmp_path, weight, mx_tensors(shifted(weight)), mxfp4_ct_config(version=version))
    assert f"exponents + 2: compressed-tensors {version}" in out.facts(DOWN)


def test_exponents_of_experts_of_013_are_mended(tmp_path):
    weights = expert_weights(mxfp4, H=64, I=32)
    modules = expert_modules(weights, lambda weight: mx_tensors(shifted(weight)))
    out = converted(tmp_path, modules, mxfp4_ct_config(version="0.13.0"))
    check_experts(out, weights)
    assert "exponents + 2" in out.facts(EXPERTS)


@pytest.mark.parametrize(
    "keys", [{"version": "0.13.1.a20260112"}, {"version": "0.14.0"}, {"version": "0.13.0", "provider": "auto-round"}]
)
def test_exponents_of_others_are_as_they_are(tmp_path, keys):
    weight = mxfp4(8, 96)
    assert "exponents" not in linear(tmp_path, weight, config=mxfp4_ct_config(**keys)).facts(DOWN)


# What only looks alike, refused by name.


def lookalike(octets: int, groups: int):
    return {
        "weight_packed": np.zeros((16, octets), np.uint8),
        "weight_scale": np.zeros((16, groups), np.uint8),
    }


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        (lookalike(48, 2), mxfp4_ct_config(), "MXFP6 has no XPU kernel"),
        (lookalike(64, 2), mxfp4_ct_config(), "an MX format of one byte per element other than FP8 has no XPU kernel"),
        (lookalike(32, 4), mxfp4_ct_config(), "NVFP4 with E5M3 scales has no XPU kernel"),
        (lookalike(32, 2), {**AUTOROUND, "data_type": "mx_int"}, "MXINT4 has no XPU kernel"),
        (
            lookalike(32, 2),
            {**AUTOROUND, "extra_config": {DOWN: {"bits": 4, "data_type": "mx_int"}}},
            "MXINT4 has no XPU kernel",
        ),
    ],
)
def test_lookalikes_are_refused(tmp_path, tensors, config, reason):
    assert f"{reason}: {DOWN}" in refusal(tmp_path, Pico(config, {DOWN: tensors}))


def test_exponents_that_fit_nothing_are_damage(tmp_path):
    message = refusal(tmp_path, Pico(mxfp4_ct_config(), {DOWN: lookalike(32, 3)}), DamagedError)
    assert "has 3 exponents per row; 64 columns of MXFP4 need 2" in message


def test_exponents_of_other_rows_are_damage(tmp_path):
    tensors = lookalike(32, 2) | {"weight_scale": np.zeros((15, 2), np.uint8)}
    assert "[15, 2]" in refusal(tmp_path, Pico(mxfp4_ct_config(), {DOWN: tensors}), DamagedError)


def test_packed_codes_without_exponents_are_named(tmp_path):
    tensors = {"weight_packed": np.zeros((16, 32), np.uint8)}
    assert f"no known format has these tensors: weight_packed U8 [16, 32]: {DOWN}" in refusal(
        tmp_path, Pico(mxfp4_ct_config(), {DOWN: tensors})
    )


def test_mxfp4_embeddings_are_refused(tmp_path):
    pico = Pico(mxfp4_ct_config(), {"model.embed_tokens": mx_tensors(mxfp4(8, 64))})
    assert "an embedding is looked up, not multiplied" in refusal(tmp_path, pico)


# Limits of the kernels.


def test_a_short_last_group_is_refused(tmp_path):
    weight = mxfp4(16, 80)
    assert f"K=80 is not a multiple of 32: {DOWN}" in refusal(
        tmp_path, Pico(mxfp4_ct_config(), {DOWN: mx_tensors(weight)})
    )
    source = Pico(mxfp4_ct_config(), {DOWN: mx_tensors(weight)}).write(tmp_path / "in")
    out = convert(source, tmp_path / "out", on_unsupported="dequantize")
    np.testing.assert_array_equal(out.array(f"{DOWN}.weight").astype(np.float64), weight.values)


@pytest.mark.parametrize("make", [mxfp4, mxfp8])
def test_expert_rows_the_grouped_gemm_does_not_take(tmp_path, make):
    weights = {(0, "gate"): make(36, 64), (0, "up"): make(36, 64), (0, "down"): make(64, 36)}
    message = refusal(tmp_path, Pico(mxfp4_ct_config(), expert_modules(weights, mx_tensors)))
    assert "the grouped GEMM needs N % 8 == 0, K % 32 == 0" in message


def test_square_exponents_of_mxfp8_experts_are_refused(tmp_path):
    weights = expert_weights(mxfp8, H=2048, I=32, E=1)
    message = refusal(tmp_path, Pico(MXFP8_CONFIG, expert_modules(weights, mx_tensors)))
    assert "experts of [64, 2048] have square exponents, whose axes the grouped GEMM mistakes" in message


def test_experts_that_do_not_belong_together_are_damage(tmp_path):
    weights = expert_weights(mxfp4, H=64, I=32) | {(e, "down"): mxfp4(64, 64) for e in range(2)}
    message = refusal(tmp_path, Pico(mxfp4_ct_config(), expert_modules(weights, mx_tensors)), DamagedError)
    assert f"{EXPERTS}: gate is [32, 64] and down [64, 64]; they do not belong together" in message


def test_exponents_of_a_real_013_file_become_those_of_its_successor(tmp_path):
    """The same model, quantized by llm-compressor 0.9 (compressed-tensors 0.13.0) and 0.14; a row of it is zero."""
    outs = [
        convert(open_source(str(FIXTURES / name)), tmp_path / name)
        for name in ("llmcompressor-0.9-llama-mxfp4", "llmcompressor-llama-mxfp4")
    ]
    for name in outs[0].repo.tensors:
        assert outs[0].array(name).tobytes() == outs[1].array(name).tobytes(), name
