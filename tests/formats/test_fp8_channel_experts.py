"""FP8 experts whose scales the grouped GEMM does not take: per channel, per group, other blocks, as ARK's kernels read
them."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.floats import (
    EXPERTS,
    block,
    channel,
    deepseek_config,
    expert_modules,
    expert_weights,
    float_ct_config,
    fp8_tensors,
    random,
    tensor,
)
from support.ints import Pico, convert, refusal

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.plan.tensor_parallel import problems
from xpuquant.errors import UnsupportedError

DYNAMIC = float_ct_config("float-quantized", "channel")
ROLES = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def check(out, weights):
    for (expert, role), weight in weights.items():
        np.testing.assert_array_equal(out.values(EXPERTS, role, expert), weight.values)


def per_expert(weights, config=DYNAMIC, pack=fp8_tensors):
    return Pico(config, expert_modules(weights, pack))


def fused(weights, transposed, E=2):
    """Transformers' names: gate rows over up rows."""
    turn = (lambda array: array.swapaxes(1, 2).copy()) if transposed else (lambda array: array)
    parts = {}
    for name, roles in ROLES.items():
        for attribute, suffix in (("fp8", ""), ("scales", "_scale")):
            stacked = [np.concatenate([getattr(weights[e, role], attribute) for role in roles]) for e in range(E)]
            parts[name + suffix] = turn(np.stack(stacked))
    return Pico({"quant_method": "fp8"}, {EXPERTS: parts})


@pytest.mark.parametrize("scale", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_channel_experts_are_the_bytes_of_the_contract(tmp_path, scale):
    """Codes `[E, N, K]`, gate rows over up rows; scales `[E, N]` in the source's dtype."""
    weights = expert_weights(lambda N, K, seed: channel(N, K, seed=seed, scale=scale), H=64, I=32)
    out = convert(per_expert(weights).write(tmp_path / "in"), tmp_path / "out")
    for part, roles in ROLES.items():
        codes = [np.concatenate([weights[e, role].codes for role in roles]) for e in range(2)]
        scales = [np.concatenate([weights[e, role].scales[:, 0] for role in roles]) for e in range(2)]
        assert np.array_equal(out.array(f"{EXPERTS}.{part}").view(np.uint8), codes)
        stored = out.array(f"{EXPERTS}.{part}_scale")
        assert stored.dtype == scale and np.array_equal(stored, scales)
    assert out.repo.modules[EXPERTS].scheme.label() == "fp8_channel_experts channel"
    assert ("rounded once when loaded" in out.facts(EXPERTS)) == (scale is np.float32)
    assert out.plan.format_version == 2
    check(out, weights)


@pytest.mark.parametrize("transposed", [False, True])
def test_channel_experts_in_one_tensor(tmp_path, transposed):
    weights = expert_weights(channel, H=96, I=32)
    out = convert(fused(weights, transposed).write(tmp_path / "in"), tmp_path / "out")
    check(out, weights)
    assert out.array(f"{EXPERTS}.gate_up_proj").shape == (2, 64, 96)


def groups(size):
    return lambda N, K, seed: random("e4m3", N, K, 1, size, seed=seed)


CASES = {
    # what the source has → what is stored
    "groups": (groups(32), 64, 32, float_ct_config("float-quantized", "group"), "weight_scale", "g32"),
    "groups of 128 and an I of 64": (
        groups(64),
        128,
        64,
        float_ct_config("float-quantized", "group"),
        "weight_scale",
        "g64",
    ),
    "blocks of 64": (
        lambda N, K, seed: random("e4m3", N, K, 64, 64, seed=seed),
        *(128, 64, deepseek_config(weight_block_size=[64, 64]), "weight_scale_inv", "g64"),
    ),
    "ragged blocks": (block, 256, 192, deepseek_config(), "weight_scale_inv", "g64"),
    "a block over all of K": (
        lambda N, K, seed: random("e4m3", N, K, 32, 256, seed=seed),
        *(64, 96, deepseek_config(weight_block_size=[32, 256]), "weight_scale_inv", "channel"),
    ),
    "gate and up of different scales": (*(tensor, 128, 96, {"quant_method": "fp8"}, "weight_scale", "channel"),),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_grouped_gemm_lacks_becomes_groups_or_channels(tmp_path, case):
    make, H, I, config, scale, label = CASES[case]
    weights = expert_weights(make, H=H, I=I)
    pack = lambda weight: fp8_tensors(weight, scale, (1,) if make is tensor else None)  # noqa: E731
    out = convert(per_expert(weights, config, pack).write(tmp_path / "in"), tmp_path / "out")
    assert out.repo.modules[EXPERTS].scheme.label() == f"fp8_channel_experts {label}"
    assert "the grouped GEMM" in out.facts(EXPERTS) or "gate and up" in out.facts(EXPERTS)
    check(out, weights)


def test_matrices_that_differ_in_what_a_scale_covers(tmp_path):
    """gate per channel, up per tensor, down in groups: all have the groups of the finest."""
    weights = expert_weights(channel, H=128, I=64)
    for expert in range(2):
        weights[expert, "up"] = tensor(64, 128, seed=expert)
        weights[expert, "down"] = groups(32)(128, 64, expert)
    out = convert(per_expert(weights).write(tmp_path / "in"), tmp_path / "out")
    assert out.repo.modules[EXPERTS].scheme.label() == "fp8_channel_experts g32"
    check(out, weights)


def test_exponents_and_mixed_dtypes_of_scales_become_float32(tmp_path):
    weights = expert_weights(lambda N, K, seed: channel(N, K, seed=seed, scale=np.float16), H=64, I=32)
    weights[1, "up"] = channel(32, 64, scale=ml_dtypes.bfloat16)
    out = convert(per_expert(weights).write(tmp_path / "in"), tmp_path / "out")
    assert out.repo.tensors[f"{EXPERTS}.gate_up_proj_scale"].dtype == "F32"
    check(out, weights)


def test_scales_are_rounded_only_where_that_is_asked_for(tmp_path):
    weights = expert_weights(lambda N, K, seed: channel(N, K, seed=seed, scale=np.float32), H=64, I=32)
    out = convert(per_expert(weights).write(tmp_path / "in"), tmp_path / "out", scale_dtype="BF16")
    assert out.repo.tensors[f"{EXPERTS}.down_proj_scale"].dtype == "BF16"
    (module,) = out.plan.modules
    assert module.conversion.rounded == "BF16"


def test_scales_that_the_asked_dtype_does_not_hold_are_refused(tmp_path):
    weights = expert_weights(lambda N, K, seed: channel(N, K, seed=seed, scale=np.float32), H=64, I=32)
    weights[0, "down"].scales[3] = 1e-9
    source = per_expert(weights).write(tmp_path / "in")
    with pytest.raises(UnsupportedError, match=r"down_proj\.weight_scale: 1 of 64 scales do not fit float16"):
        convert(source, tmp_path / "out", scale_dtype="F16")


@settings(max_examples=15, deadline=None)
@given(
    element=st.sampled_from(["e4m3", "e5m2"]),
    H=st.integers(1, 6),
    I=st.integers(1, 6),
    size=st.sampled_from([16, 32, None]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_experts_keep_their_values(tmp_path_factory, element, H, I, size, seed):
    """NaN and infinities included."""
    folder = tmp_path_factory.mktemp("experts")
    make = lambda N, K, seed: random(element, N, K, 1, size or K, seed=seed, finite=False)  # noqa: E731
    weights = expert_weights(make, 32 * H, 32 * I)
    out = convert(per_expert(weights).write(folder / "in"), folder / "out")
    check(out, weights)


def test_scales_that_headers_do_not_show_are_stored_per_channel_where_blocks_do_not_fit(tmp_path):
    weights = expert_weights(tensor, H=128, I=96)
    pico = per_expert(weights, {"quant_method": "fp8"}, lambda weight: fp8_tensors(weight, shape=(1,)))
    blind = replace(pico.write(tmp_path / "in").checkpoint, peek=lambda tensor: None)
    (module,) = make_plan(blind, Options()).modules
    assert module.conversion.scheme.label() == "fp8_channel_experts channel"
    assert "possibly different per-tensor scales" in "; ".join(module.conversion.facts)


@pytest.mark.parametrize(("ranks", "problem"), [(2, None), (3, "does not split"), (4, "parts of multiples of 32")])
def test_how_it_is_cut_among_gpus(tmp_path, ranks, problem):
    plan = make_plan(per_expert(expert_weights(channel, H=64, I=64)).write(tmp_path / "in").checkpoint, Options())
    found = problems(plan.modules, ranks)
    assert problem in found[EXPERTS] if problem else not found


def test_sizes_that_arks_kernels_do_not_take_are_refused(tmp_path):
    message = refusal(tmp_path, per_expert(expert_weights(channel, H=64, I=48)))
    assert (
        "the grouped GEMM has no fp8 scales per channel; gate is [48, 64]; ARK's expert kernels are given multiples of "
        f"32: {EXPERTS}" in message
    )
    assert "on_unsupported='dequantize'" in message


def test_groups_that_no_written_size_divides_are_refused(tmp_path):
    config = float_ct_config("float-quantized", "group")
    message = refusal(tmp_path, per_expert(expert_weights(groups(8), H=64, I=32), config))
    assert "no group size of [128, 64, 32, 16] divides the columns of every scale" in message


def test_biases_are_refused(tmp_path):
    weights = expert_weights(channel, H=64, I=32)
    pack = lambda weight: fp8_tensors(weight) | {"bias": np.ones(weight.N, ml_dtypes.bfloat16)}  # noqa: E731
    assert "ARK's expert kernels add no bias" in refusal(tmp_path, per_expert(weights, pack=pack))


def test_why_the_grouped_gemm_does_not_take_blocks_is_said_first(tmp_path):
    """Of other sizes than its own, or that do not divide the matrices: ARK would take both, but for the biases."""
    pack = lambda weight: fp8_tensors(weight) | {"bias": np.ones(weight.N, ml_dtypes.bfloat16)}  # noqa: E731
    for size, said in (
        (64, "the grouped GEMM has no fp8 blocks of 64x64 (128x128); ARK's"),
        (128, "the grouped GEMM's fp8 blocks need N and K to be multiples of 128, an expert has [192, 256]; ARK's"),
    ):
        make = lambda N, K, seed: random("e4m3", N, K, size, size, seed=seed)  # noqa: B023, E731
        config = deepseek_config(weight_block_size=[size, size])
        source = per_expert(expert_weights(make, H=256, I=192), config, pack)
        assert said in refusal(tmp_path / str(size), source)


def test_experts_of_two_types_are_refused(tmp_path):
    weights = expert_weights(channel, H=64, I=32)
    weights[1, "up"] = random("e5m2", 32, 64, 1, 64)
    assert "experts of one layer have weights of F8_E4M3 and F8_E5M2" in refusal(tmp_path, per_expert(weights))
