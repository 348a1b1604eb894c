"""FP8 in every spelling: blocks, one scale, a scale per row; linears, experts one by one, experts in one tensor."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.floats import (
    E8M0,
    EXPERTS,
    FP8,
    Floats,
    block,
    channel,
    deepseek_config,
    expert_modules,
    expert_weights,
    float_ct_config,
    fp8_tensors,
    mxfp4,
    random,
    tensor,
)
from support.ints import DOWN, Pico, Q, Tensors, convert, refusal

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.errors import DamagedError
from xpuquant.formats.weights.decoded import to_bf16


def linear(folder, weight: Floats, tensors, config=None, name=DOWN):
    """Convert one module; the output must mean what the weight does."""
    pico = Pico(config or {"quant_method": "fp8"}, {name: tensors})
    out = convert(pico.write(folder / "in"), folder / "out")
    np.testing.assert_array_equal(out.values(name), weight.values)
    return out


def scheme(out, name=DOWN):
    return out.repo.modules[name].scheme


# One linear.


def test_deepseek_blocks_are_multiplied_by_weight_scale_inv(tmp_path):
    weight = block(256, 384)
    out = linear(tmp_path, weight, fp8_tensors(weight, "weight_scale_inv"), deepseek_config())
    assert out.array(f"{DOWN}.weight").tobytes() == weight.codes.tobytes()
    scale = out.array(f"{DOWN}.weight_scale")
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, weight.scales.astype(np.float32).T)
    assert scheme(out).label() == "fp8_linear 128x128"


def test_a_ragged_last_block_of_rows_is_cut_into_whole_ones(tmp_path):
    # DeepSeek's kv_a_proj_with_mqa: N = 576 = 4.5 blocks.
    weight = block(576, 256)
    out = linear(tmp_path, weight, fp8_tensors(weight, "weight_scale_inv"), deepseek_config())
    assert scheme(out).block_n == 64
    scale = out.array(f"{DOWN}.weight_scale")
    assert scale.shape == (2, 9)
    np.testing.assert_array_equal(scale, weight.scales.astype(np.float32)[[0, 0, 1, 1, 2, 2, 3, 3, 4]].T)


def test_one_block_of_k_becomes_a_scale_per_row(tmp_path):
    weight = block(200, 64)
    out = linear(tmp_path, weight, fp8_tensors(weight, "weight_scale_inv"), deepseek_config())
    assert scheme(out).granularity == "channel"
    assert "one block covers all of K" in out.facts(DOWN)
    np.testing.assert_array_equal(
        out.array(f"{DOWN}.weight_scale"), weight.scales[np.arange(200) // 128, 0].astype(np.float32)
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("scale", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_one_scale(tmp_path, shape, scale):
    weight = tensor(24, 40, scale=scale)
    out = linear(tmp_path, weight, fp8_tensors(weight, shape=shape))
    stored = out.array(f"{DOWN}.weight_scale")
    assert stored.dtype == np.float32 and stored.shape == (1,) and stored[0] == weight.scales[0, 0]
    assert scheme(out).label() == "fp8_linear tensor"


@pytest.mark.parametrize("shape", [(24,), (24, 1)])
def test_a_scale_per_row(tmp_path, shape):
    weight = channel(24, 40)
    out = linear(tmp_path, weight, fp8_tensors(weight, shape=shape))
    np.testing.assert_array_equal(out.array(f"{DOWN}.weight_scale"), weight.scales[:, 0].astype(np.float32))
    assert scheme(out).label() == "fp8_linear channel"


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_static_activation_scale_is_kept_as_float32(tmp_path, shape):
    weight = tensor(24, 40)
    static = np.full(shape, 0.3, ml_dtypes.bfloat16)
    parts = fp8_tensors(weight, shape=(1,)) | {"input_scale": static}
    out = linear(tmp_path, weight, parts, float_ct_config("float-quantized", "tensor"))
    kept = out.array(f"{DOWN}.input_scale")
    assert kept.dtype == np.float32 and kept.shape == (1,) and kept[0] == np.float32(static.reshape(-1)[0])
    assert scheme(out).input_scale


def test_naive_quantized_is_read_like_float_quantized(tmp_path):
    weight = channel(16, 32)
    linear(tmp_path, weight, fp8_tensors(weight), float_ct_config("naive-quantized", "channel"))


def test_scale_dtype_does_not_round_fp8_scales(tmp_path):
    weight = tensor(16, 32, scale=np.float32)
    source = Pico({"quant_method": "fp8"}, {DOWN: fp8_tensors(weight)}).write(tmp_path / "in")
    out = convert(source, tmp_path / "out", scale_dtype="BF16")
    np.testing.assert_array_equal(out.values(DOWN), weight.values)


def test_e5m2(tmp_path):
    weight = random("e5m2", 16, 32, 1, 32)
    out = linear(tmp_path, weight, fp8_tensors(weight))
    assert out.array(f"{DOWN}.weight").dtype == FP8["e5m2"]


def test_nan_and_infinity_stay_what_they_are(tmp_path):
    weight = random("e5m2", 16, 32, 16, 32, finite=False)
    weight.codes[0, :6] = (0x7C, 0xFC, 0x7D, 0x7E, 0x7F, 0xFF)
    out = linear(tmp_path, weight, fp8_tensors(weight, shape=(1,)))
    assert out.array(f"{DOWN}.weight").tobytes() == weight.codes.tobytes()


def test_exponents_as_block_scales(tmp_path):
    # `scale_fmt: ue8m0`; 0 is 2^-127, below float32's normal numbers, and 255 is NaN.
    weight = random("e4m3", 256, 384, 128, 128, scale=np.uint8)
    weight.scales[0, :2] = (0, 255)
    parts = {"weight": weight.fp8, "scale": weight.scales.view(E8M0)}
    out = linear(tmp_path, weight, parts, deepseek_config(scale_fmt="ue8m0"))
    assert scheme(out).label() == "fp8_linear 128x128"
    stored = out.array(f"{DOWN}.weight_scale")
    assert stored[0, 0] == np.float32(2.0**-127) and np.isnan(stored[1, 0])


def test_exponents_of_finer_blocks_become_mxfp8(tmp_path):
    weight = random("e4m3", 64, 96, 32, 32, scale=np.uint8)
    parts = {"weight": weight.fp8, "weight_scale_inv": weight.scales.view(E8M0)}
    out = linear(tmp_path, weight, parts, deepseek_config(weight_block_size=[32, 32]))
    assert scheme(out).layout == "mxfp8_linear"


def test_zero_points_that_are_zero_mean_nothing(tmp_path):
    weight = tensor(16, 32)
    parts = fp8_tensors(weight, shape=(1,)) | {"weight_zero_point": np.zeros(1, FP8["e4m3"])}
    linear(tmp_path, weight, parts, float_ct_config("float-quantized", "tensor"))


def test_kv_cache_scales_and_plain_tensors_pass(tmp_path):
    weight = block(128, 128)
    plain: Tensors = {
        "model.layers.0.self_attn.k_scale": np.array([0.5], np.float32),
        "model.layers.0.self_attn.v_scale": np.array([0.25], np.float32),
        "model.norm.scale": np.ones(4, np.float16),
        f"{EXPERTS}.gate_up_proj": np.ones((2, 4, 4), np.float16),
        f"{EXPERTS}.gate_up_proj_bias": np.ones((2, 4), np.float16),
    }
    pico = Pico(deepseek_config(), {DOWN: fp8_tensors(weight, "weight_scale_inv")}, plain)
    out = convert(pico.write(tmp_path / "in"), tmp_path / "out")
    assert {tensor.name for tensor in out.plan.passed} == set(plain)


@settings(max_examples=30, deadline=None)
@given(
    element=st.sampled_from(["e4m3", "e5m2"]),
    granularity=st.sampled_from(["tensor", "channel", "block"]),
    N=st.integers(1, 24).map(lambda n: 16 * n),
    K=st.integers(1, 3).map(lambda k: 128 * k),
    scale=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.uint8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_linear_keeps_its_values(tmp_path_factory, element, granularity, N, K, scale, seed):
    rows, columns = {"tensor": (N, K), "channel": (1, K), "block": (128, 128)}[granularity]
    weight = random(element, N, K, rows, columns, scale=scale, seed=seed, finite=False)
    scales = weight.scales.view(E8M0) if scale is np.uint8 else weight.scales
    shape = {"tensor": (1,), "channel": (N,), "block": weight.scales.shape}[granularity]
    parts = {"weight": weight.fp8, "weight_scale_inv": scales.reshape(shape)}
    linear(tmp_path_factory.mktemp("fp8"), weight, parts, deepseek_config())


# Experts.


def test_experts_are_transposed_gate_beside_up(tmp_path):
    """By eye: rows of the output are the K of every matrix; its columns all of gate, then all of up."""
    one = np.ones((1, 1), np.float32)
    gate = Floats("e4m3", np.arange(8, dtype=np.uint8).reshape(2, 4), one, 2, 4)
    up = Floats("e4m3", np.arange(16, 24, dtype=np.uint8).reshape(2, 4), one, 2, 4)
    down = Floats("e4m3", np.arange(32, 40, dtype=np.uint8).reshape(4, 2), 2 * one, 4, 2)
    weights = {(0, "gate"): gate, (0, "up"): up, (0, "down"): down}
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, shape=(1,)))
    out = convert(Pico({"quant_method": "fp8"}, modules).write(tmp_path / "in"), tmp_path / "out")
    assert out.array(f"{EXPERTS}.gate_up_proj").view(np.uint8).tolist() == [
        [[0, 4, 16, 20], [1, 5, 17, 21], [2, 6, 18, 22], [3, 7, 19, 23]]
    ]
    assert out.array(f"{EXPERTS}.down_proj").view(np.uint8).tolist() == [[[32, 34, 36, 38], [33, 35, 37, 39]]]
    assert out.array(f"{EXPERTS}.gate_up_proj_scale").tolist() == [1.0]
    assert out.array(f"{EXPERTS}.down_proj_scale").tolist() == [2.0]


def check_experts(out, weights):
    for (expert, role), weight in weights.items():
        np.testing.assert_array_equal(out.values(EXPERTS, role, expert), weight.values)


@pytest.mark.parametrize("names", [None, {"gate": "w1", "up": "w3", "down": "w2"}])
def test_block_experts(tmp_path, names):
    weights = expert_weights(block, H=256, I=128)
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, "weight_scale_inv"), names)
    out = convert(Pico(deepseek_config(), modules).write(tmp_path / "in"), tmp_path / "out")
    check_experts(out, weights)
    assert out.array(f"{EXPERTS}.gate_up_proj").shape == (2, 256, 256)
    scale = out.array(f"{EXPERTS}.gate_up_proj_scale")
    gate_and_up = np.concatenate([weights[1, "gate"].scales, weights[1, "up"].scales]).astype(np.float32)
    np.testing.assert_array_equal(scale[1], gate_and_up.T)
    assert scheme(out, EXPERTS).label() == "fp8_experts 128x128"


def same_scale(weight: Floats, other: Floats) -> Floats:
    return Floats(weight.element, weight.codes, other.scales, weight.rows, weight.columns)


def test_equal_scales_of_gate_and_up_stay_one_scale(tmp_path):
    weights = expert_weights(tensor, H=40, I=24)
    for expert in range(2):
        weights[expert, "up"] = same_scale(weights[expert, "up"], weights[expert, "gate"])
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, shape=()))
    out = convert(Pico({"quant_method": "fp8"}, modules).write(tmp_path / "in"), tmp_path / "out")
    check_experts(out, weights)
    assert out.array(f"{EXPERTS}.gate_up_proj_scale").shape == (2,)
    assert scheme(out, EXPERTS).label() == "fp8_experts tensor"


def test_different_scales_of_gate_and_up_become_blocks(tmp_path):
    weights = expert_weights(tensor, H=256, I=128)
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, shape=(1,)))
    out = convert(Pico({"quant_method": "fp8"}, modules).write(tmp_path / "in"), tmp_path / "out")
    check_experts(out, weights)
    assert scheme(out, EXPERTS).label() == "fp8_experts 128x128"
    assert "stored as 128x128 blocks" in out.facts(EXPERTS)
    gate, up = (np.float32(weights[0, role].scales[0, 0]) for role in ("gate", "up"))
    assert out.array(f"{EXPERTS}.gate_up_proj_scale")[0].tolist() == [[gate, up], [gate, up]]


def test_static_activation_scales_of_experts_are_dropped_and_it_is_said(tmp_path):
    weights = expert_weights(tensor, H=128, I=128)
    modules = expert_modules(
        weights, lambda weight: fp8_tensors(weight, shape=(1,)) | {"input_scale": np.array([0.5], np.float32)}
    )
    out = convert(Pico({"quant_method": "fp8"}, modules).write(tmp_path / "in"), tmp_path / "out")
    assert "activation scales of experts dropped" in out.facts(EXPERTS)
    assert not [name for name in out.repo.tensors if "input_scale" in name]


@settings(max_examples=20, deadline=None)
@given(
    element=st.sampled_from(["e4m3", "e5m2"]),
    H=st.integers(1, 40),
    I=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_experts_of_one_scale_keep_their_values(tmp_path_factory, element, H, I, seed):
    folder = tmp_path_factory.mktemp("experts")
    weights = expert_weights(lambda N, K, seed: random(element, N, K, N, K, seed=seed, finite=False), H, I, E=2)
    for expert in range(2):
        weights[expert, "up"] = same_scale(weights[expert, "up"], weights[expert, "gate"])
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, shape=(1,)))
    out = convert(Pico({"quant_method": "fp8"}, modules).write(folder / "in"), folder / "out")
    check_experts(out, weights)


# Experts in one tensor.


def fused(weights, E=2, transposed=False, scale="{}_scale_inv", shape=None):
    """Transformers' names: gate rows over up rows."""

    def stack(arrays):
        stacked = np.stack(arrays)
        return stacked.swapaxes(1, 2).copy() if transposed else stacked

    parts = {}
    for name, roles in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        parts[name] = stack([np.concatenate([weights[e, role].fp8 for role in roles]) for e in range(E)])
        scales = [np.concatenate([weights[e, role].scales for role in roles]) for e in range(E)]
        parts[scale.format(name)] = stack(scales) if shape is None else np.stack(scales)[:, :1].reshape(shape)
    return parts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", ["{}_scale_inv", "{}_scale"])
def test_fused_block_experts(tmp_path, transposed, scale):
    weights = expert_weights(block, H=256, I=128)
    parts = fused(weights, transposed=transposed, scale=scale)
    out = convert(Pico(deepseek_config(), {EXPERTS: parts}).write(tmp_path / "in"), tmp_path / "out")
    check_experts(out, weights)
    assert out.array(f"{EXPERTS}.gate_up_proj").shape == (2, 256, 256)
    if transposed:
        assert out.array(f"{EXPERTS}.gate_up_proj").tobytes() == parts["gate_up_proj"].tobytes()


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1)])
def test_fused_experts_of_one_scale_each(tmp_path, shape):
    weights = expert_weights(tensor, H=40, I=24)
    for expert in range(2):
        weights[expert, "up"] = same_scale(weights[expert, "up"], weights[expert, "gate"])
    parts = fused(weights, shape=shape) | {"gate_up_proj_activation_scale": np.array([1, 2], np.float32)}
    out = convert(Pico({"quant_method": "fp8"}, {EXPERTS: parts}).write(tmp_path / "in"), tmp_path / "out")
    check_experts(out, weights)
    assert "activation scales of experts dropped" in out.facts(EXPERTS)


def test_fused_experts_share_one_scale(tmp_path):
    weights = expert_weights(tensor, H=40, I=24)
    weights = {key: same_scale(weight, weights[0, "gate"]) for key, weight in weights.items()}
    parts = fused(weights, shape=(2,))
    parts = {name: array[:1] if "scale" in name else array for name, array in parts.items()}
    out = convert(Pico({"quant_method": "fp8"}, {EXPERTS: parts}).write(tmp_path / "in"), tmp_path / "out")
    check_experts(out, weights)


# Refusals and damage.


def test_ragged_k_is_refused(tmp_path):
    weight = block(128, 192)
    message = refusal(tmp_path, Pico(deepseek_config(), {DOWN: fp8_tensors(weight, "weight_scale_inv")}))
    assert f"fp8 blocks need K to be a multiple of 128, K=192: {DOWN}" in message
    assert "on_unsupported='dequantize'" in message


def test_rows_that_no_equal_blocks_fit_are_refused(tmp_path):
    weight = block(136, 256)
    message = refusal(tmp_path, Pico(deepseek_config(), {DOWN: fp8_tensors(weight, "weight_scale_inv")}))
    assert "cannot be cut into equal ones of at least 16 rows, N=136" in message


def test_other_blocks_are_refused(tmp_path):
    weight = random("e4m3", 128, 128, 64, 64)
    config = deepseek_config(weight_block_size=[64, 64])
    message = refusal(tmp_path, Pico(config, {DOWN: fp8_tensors(weight, "weight_scale_inv")}))
    assert "fp8 blocks of 64x64 have no XPU kernel for linears (they take 128 columns each)" in message


def test_groups_along_k_are_refused(tmp_path):
    weight = random("e4m3", 128, 256, 1, 64)
    message = refusal(tmp_path, Pico(float_ct_config("float-quantized", "group"), {DOWN: fp8_tensors(weight)}))
    assert "fp8 blocks of 1x64 have no XPU kernel for linears" in message


def test_scales_that_headers_do_not_show_are_taken_for_different(tmp_path):
    modules = expert_modules(expert_weights(tensor, H=128, I=128), lambda weight: fp8_tensors(weight, shape=(1,)))
    checkpoint = Pico({"quant_method": "fp8"}, modules).write(tmp_path / "in").checkpoint
    (module,) = make_plan(replace(checkpoint, peek=lambda tensor: None), Options()).modules
    assert "may differ (they were not read)" in "; ".join(module.conversion.facts)


def test_experts_of_two_types_are_refused(tmp_path):
    weights = expert_weights(block, H=128, I=128)
    weights[1, "up"] = random("e5m2", 128, 128, 128, 128)
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, "weight_scale_inv"))
    assert "weights of F8_E4M3 and F8_E5M2" in refusal(tmp_path, Pico(deepseek_config(), modules))


def test_fnuz_is_refused(tmp_path):
    parts = {"weight": np.zeros((16, 32), ml_dtypes.float8_e4m3fnuz), "weight_scale": np.array([1], np.float32)}
    message = refusal(tmp_path, Pico({"quant_method": "fp8"}, {DOWN: parts}))
    assert "F8_E4M3FNUZ has no XPU kernel (want F8_E4M3 or F8_E5M2)" in message


def test_an_fp8_embedding_is_refused(tmp_path):
    weight = channel(16, 32)
    pico = Pico({"quant_method": "fp8"}, {"model.embed_tokens": fp8_tensors(weight)})
    assert "an embedding is looked up, not multiplied" in refusal(tmp_path, pico)


def test_fake_quantization_is_refused_by_name(tmp_path):
    parts = {"weight": np.ones((16, 32), np.float16), "weight_scale": np.array([1], np.float16)}
    config = float_ct_config("dense", "tensor", quantization_status="frozen")
    assert "fake-quantized" in refusal(tmp_path, Pico(config, {DOWN: parts}))


def test_activation_scales_per_channel_are_refused(tmp_path):
    parts = fp8_tensors(tensor(16, 32), shape=(1,)) | {"input_scale": np.ones(32, np.float32)}
    assert "kernels take one static scale" in refusal(tmp_path, Pico({"quant_method": "fp8"}, {DOWN: parts}))


def test_zero_points_are_refused(tmp_path):
    parts = fp8_tensors(tensor(16, 32), shape=(1,)) | {"weight_zero_point": np.ones(1, FP8["e4m3"])}
    config = float_ct_config("float-quantized", "tensor")
    assert "fp8 with zero points has no XPU kernel" in refusal(tmp_path, Pico(config, {DOWN: parts}))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight": np.zeros((16, 32), FP8["e4m3"])}, f"{DOWN}.weight is F8_E4M3 without a scale"),
        (fp8_tensors(tensor(16, 32), shape=(1,)) | {"weight_scale_inv": np.array([1], np.float32)}, "has both"),
        (fp8_tensors(tensor(16, 32)) | {"weight_scale": np.ones((3, 2), np.float32)}, "weight_scale has shape [3, 2]"),
        (fp8_tensors(tensor(16, 32)) | {"weight_scale": np.ones(1, np.int8)}, "weight_scale is I8"),
        (
            {"weight": np.zeros(16, FP8["e4m3"]), "weight_scale": np.array([1], np.float32)},
            "want 2 dimensions",
        ),
    ],
)
def test_damage_is_named(tmp_path, parts, message):
    assert message in refusal(tmp_path, Pico(deepseek_config(), {DOWN: parts}), DamagedError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_proj": None}, f"{EXPERTS}.down_proj is missing"),
        ({"down_proj_scale_inv": None}, f"{EXPERTS}.down_proj_scale_inv is missing"),
        ({"down_proj": np.zeros((2, 256, 96), FP8["e4m3"])}, "do not belong together"),
        ({"down_proj_scale_inv": np.ones((2, 3, 1), np.float32)}, "experts of [256, 128] in blocks of [128, 128] need"),
    ],
)
def test_damage_of_fused_experts_is_named(tmp_path, change, message):
    parts = fused(expert_weights(block, H=256, I=128)) | change
    pico = Pico(deepseek_config(), {EXPERTS: {name: array for name, array in parts.items() if array is not None}})
    assert message in refusal(tmp_path, pico, DamagedError)


# Dequantization.


def bf16(values):
    """The nearest bf16, ties to even, by comparing with both neighbours in float64."""
    down = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    candidates = [down.view(np.float32), (down + np.uint32(0x10000)).view(np.float32)]
    candidates.append((down - np.uint32(0x10000)).view(np.float32))
    distance = np.stack([np.abs(candidate.astype(np.float64) - values) for candidate in candidates])
    even = np.stack([candidate.view(np.uint32) >> 16 & 1 for candidate in candidates])
    best = np.lexsort((even, distance), axis=0)[0]
    return np.choose(best, candidates)


def test_float64_is_rounded_to_bf16_once():
    tie, sliver = 2.0**-8, 2.0**-40
    expected = {
        1 + tie: 1,
        1 + tie + sliver: 1 + 2 * tie,
        1 + 3 * tie: 1 + 4 * tie,
        1 + 3 * tie - sliver: 1 + 2 * tie,
        -1 - tie - sliver: -1 - 2 * tie,
        2.0**-133: 2.0**-133,
        2.0**-140: 0,
        2.0**-200: 0,
        0.0: 0,
        3.4e38: np.inf,
        1e300: np.inf,
        -1e300: -np.inf,
        np.inf: np.inf,
        np.nan: np.nan,
    }
    np.testing.assert_array_equal(to_bf16(np.array([*expected])).astype(np.float64), [*expected.values()])
    assert np.signbit(to_bf16(np.array([-0.0])).astype(np.float32))


def test_refused_blocks_can_be_dequantized_rounded_once(tmp_path):
    weight = block(128, 192, scale=np.float32)
    # Times the scale, 1.125 (0x39) lies so near the middle of two bf16 numbers that float32 would round it there.
    weight.codes[:, ::2] = 0x39
    scales = ((1 + np.arange(1, 255, 2) * 2.0**-8) / 1.125).astype(np.float32)
    products = 1.125 * scales.astype(np.float64)
    twice = products.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    weight.scales[0] = scales[twice != bf16(products)][:2]
    source = Pico(deepseek_config(), {DOWN: fp8_tensors(weight, "weight_scale_inv")}).write(tmp_path / "in")
    out = convert(source, tmp_path / "out", on_unsupported="dequantize")
    np.testing.assert_array_equal(out.array(f"{DOWN}.weight").astype(np.float32), bf16(weight.values))


def test_mixed_with_other_formats(tmp_path):
    """DeepSeek-V4: MXFP4 experts inside an fp8 config, exponents throughout."""
    attention = random("e4m3", 256, 128, 128, 128, scale=np.uint8)
    experts = expert_weights(mxfp4, H=64, I=32)
    modules = expert_modules(
        experts,
        lambda w: {"weight": w.packed.view(np.int8), "scale": w.scales.view(E8M0)},
        {"gate": "w1", "up": "w3", "down": "w2"},
        "layers.0.ffn.experts",
    )
    modules[Q] = {"weight": attention.fp8, "scale": attention.scales.view(E8M0)}
    out = convert(Pico(deepseek_config(), modules).write(tmp_path / "in"), tmp_path / "out")
    np.testing.assert_array_equal(out.values(Q), attention.values)
    for (expert, role), weight in experts.items():
        np.testing.assert_array_equal(out.values("layers.0.ffn.experts", role, expert), weight.values)
