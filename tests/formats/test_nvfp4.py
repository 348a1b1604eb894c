"""NVFP4 as kernels for integers read it: linears as two planes of nibbles, experts as bytes, the global scale apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.floats import (
    EXPERTS,
    FP8,
    NVFP4_CT_CONFIG,
    NVFP4_MODELOPT_CONFIG,
    TABLES,
    Nvfp4,
    expert_modules,
    expert_weights,
    mx_tensors,
    mxfp4,
    nvfp4,
)
from support.ints import DOWN, Pico, convert, refusal

from xpuquant.conversion.cli.app import run
from xpuquant.conversion.plan.tensor_parallel import problems
from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.layouts.nvfp4_fillers import power_of_two
from xpuquant.formats.layouts.xpu.nvfp4_linear import Nvfp4Linear

BOTH = pytest.mark.parametrize("divides", [True, False], ids=["compressed-tensors", "modelopt"])


def config_of(divides: bool):
    return NVFP4_CT_CONFIG if divides else NVFP4_MODELOPT_CONFIG


def linear(folder, weight: Nvfp4, extra=None, **options):
    """Convert one module; the output must mean what the weight does."""
    pico = Pico(config_of(weight.divides), {DOWN: weight.tensors | (extra or {})})
    out = convert(pico.write(folder / "in"), folder / "out", **options)
    np.testing.assert_array_equal(out.values(DOWN), weight.values)
    return out


def nibbles(words):
    octets = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([octets & 15, octets >> 4], -1).reshape(len(words), -1)


def left_of(number: float, divides: bool) -> float:
    """What a global scale is without its power of two: a factor of 1 to 2, a divisor of 1/2 to 1."""
    while not 1 <= number < 2:
        number = number * 2 if number < 1 else number / 2
    return number / 2 if divides else number


@BOTH
def test_the_bytes_of_the_contract(tmp_path, divides):
    """Of each 16 columns one plane, then the other: together twice the numbers; scales halved, with a power of two."""
    N, K = 24, 80
    weight = nvfp4(N, K, number=2468.1357 if divides else 1 / 2468.1357, divides=divides)
    out = linear(tmp_path, weight)
    planes = nibbles(out.array(f"{DOWN}.qweight")).astype(int).reshape(N, K // 16, 2, 16) - 8
    assert planes.min() >= -8 and planes.max() <= 7
    doubled = planes.sum(2).reshape(N, K)
    assert np.array_equal(doubled, 2 * TABLES["e2m1"][weight.codes])
    scales, number = out.array(f"{DOWN}.scales"), out.array(f"{DOWN}.global_scale")
    assert (scales.dtype, scales.shape) == (ml_dtypes.bfloat16, (K // 16, N))
    assert (number.dtype, number.shape) == (np.float32, (1,))
    left = left_of(float(np.float32(weight.number)), divides)
    assert number[0] == left
    power = np.float32(weight.number) / left
    sources = TABLES["e4m3"][weight.scales.view(np.uint8)].T
    assert np.array_equal(scales.astype(np.float64), sources / 2 / power if divides else sources / 2 * power)
    scheme = out.repo.modules[DOWN].scheme
    assert (scheme.layout, scheme.group_size, scheme.divides) == ("nvfp4_linear", 16, divides)
    written = out.plan.quantization_config("tests")
    assert written["format_version"] == 2 and written["schemes"][0].get("divides", False) == divides


NUMBERS = (1.0, 0.5, 3.0, 1e-4, 2.0**-149, 2.0**-126, 3e38, 0.0, -7.25, float("inf"), float("nan"))


@BOTH
@pytest.mark.parametrize("number", NUMBERS)
def test_every_global_scale_is_exact(tmp_path, divides, number):
    with np.errstate(divide="ignore", invalid="ignore"):
        out = linear(tmp_path, nvfp4(8, 32, number=number, divides=divides))
    assert np.isfinite(out.array(f"{DOWN}.scales").astype(np.float32)).all()


def test_nan_scales_stay(tmp_path):
    weight = nvfp4(8, 32)
    weight.scales.view(np.uint8)[3, 1] = 0x7F
    assert np.isnan(linear(tmp_path, weight).values(DOWN)[3, 16:]).all()


def test_what_is_left_of_a_global_scale_keeps_outputs_above_the_sums():
    """So that a float16 product overflows only where the output does."""
    rng = np.random.default_rng(0)
    for number in np.exp(rng.uniform(-20, 20, 200)).astype(np.float32):
        assert 1 <= number * 2.0 ** -power_of_two(number, False) < 2
        assert 0.5 <= number * 2.0 ** -power_of_two(number, True) < 1


def test_float16_holds_the_scales_of_usual_weights(tmp_path):
    """A largest weight of 0.05 to 4, quantized as its producers do it: cast to float16 no scale above 2^-21 changes."""
    for seed, largest in enumerate((0.05, 0.3, 4.0)):
        weight = nvfp4(16, 256, seed, number=448 * 6 / largest)
        scales = linear(tmp_path / str(seed), weight).array(f"{DOWN}.scales").astype(np.float64)
        kept = scales.astype(np.float16).astype(np.float64) == scales
        assert kept[scales >= 2.0**-21].all()


@BOTH
def test_activations_stay_in_16_bits_and_that_is_said(tmp_path, divides):
    scale = {"input_global_scale" if divides else "input_scale": np.array([3.0], np.float32)}
    out = linear(tmp_path / "a", nvfp4(16, 32, divides=divides), scale)
    assert "activations stay in 16 bits" in out.facts(DOWN)
    assert not [name for name in out.repo.tensors if "input" in name]
    assert "activations" not in linear(tmp_path / "b", nvfp4(16, 32, divides=divides)).facts(DOWN)


def test_scales_are_bfloat16_whatever_is_asked_for(tmp_path):
    out = linear(tmp_path, nvfp4(16, 32), scale_dtype="F16")
    assert out.array(f"{DOWN}.scales").dtype == ml_dtypes.bfloat16
    assert "scales are bfloat16 whatever --scale-dtype says" in out.facts(DOWN)


@pytest.mark.parametrize(("K", "whole"), [(64, True), (48, False), (16, False)])
def test_groups_of_16_columns_are_what_tensor_parallelism_cuts(tmp_path, K, whole):
    out = linear(tmp_path, nvfp4(16, K))
    assert set(problems(out.plan.modules, 2)) == (set() if whole else {DOWN})


def nvfp4_experts(make=nvfp4, **sizes) -> dict[tuple[int, str], Nvfp4]:
    made: Any = expert_weights(make, **{"H": 64, "I": 32, **sizes})
    return made


@BOTH
def test_experts_are_the_bytes_of_the_contract(tmp_path, divides):
    """int8 `[E, N, K]`, twice the numbers; gate and up keep their own global scales."""
    made = lambda N, K, seed: nvfp4(N, K, seed, number=10.0 ** (seed % 7 - 3), divides=divides)  # noqa: E731
    weights = nvfp4_experts(made, E=3)
    source = Pico(config_of(divides), expert_modules(weights, lambda weight: weight.tensors))
    out = convert(source.write(tmp_path / "in"), tmp_path / "out")
    for (expert, role), weight in weights.items():
        np.testing.assert_array_equal(out.values(EXPERTS, role, expert), weight.values)
    for part, roles in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        members = [[weights[expert, role] for role in roles] for expert in range(3)]
        codes = [np.concatenate([2 * TABLES["e2m1"][weight.codes] for weight in each]) for each in members]
        stored, numbers = out.array(f"{EXPERTS}.{part}"), out.array(f"{EXPERTS}.{part}_global_scale")
        assert stored.dtype == np.int8 and np.array_equal(stored, codes)
        left = [[left_of(float(np.float32(weight.number)), divides) for weight in each] for each in members]
        assert numbers.dtype == np.float32 and np.array_equal(numbers, left)
        assert out.array(f"{EXPERTS}.{part}_scale").shape == (*stored.shape[:2], stored.shape[2] // 16)
    assert out.repo.modules[EXPERTS].scheme.label() == "nvfp4_experts g16"
    assert out.plan.format_version == 2


def fused_stack(weights, transposed, numbers, static=None):
    """As ModelOpt exports Llama 4's experts: one tensor of each projection, with the unquantized model's axes."""
    tensors = {}
    for part, roles in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        members = [[weights[expert, role] for role in roles] for expert in range(2)]
        for end, of in (("", "packed"), ("_weight_scale", "scales")):
            stack = np.stack([np.concatenate([getattr(weight, of) for weight in each]) for each in members])
            tensors[part + end] = stack.swapaxes(1, 2).copy() if transposed else stack
        found = np.array([each[0].number for each in members], np.float32)
        tensors[f"{part}_weight_scale_2"] = found.reshape(numbers) if numbers else found[0]
        if static is not None:
            tensors[f"{part}_input_scale"] = static
    return Pico(NVFP4_MODELOPT_CONFIG, {EXPERTS: tensors})


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("numbers", [(), (2,), (2, 1, 1)], ids=["one number", "of each expert", "with unit axes"])
def test_experts_in_one_tensor_are_those_of_their_parts(tmp_path, transposed, numbers):
    """Byte for byte what the same experts become that lie apart."""
    number = lambda seed: 10.0 ** (seed // 10 if numbers else -1)  # noqa: E731
    weights = nvfp4_experts(lambda N, K, seed: nvfp4(N, K, seed, number=number(seed), divides=False))
    static = np.array(3.0, np.float32)
    source = fused_stack(weights, transposed, numbers, static).write(tmp_path / "in")
    out = convert(source, tmp_path / "out")
    for (expert, role), weight in weights.items():
        np.testing.assert_array_equal(out.values(EXPERTS, role, expert), weight.values)
    apart = Pico(NVFP4_MODELOPT_CONFIG, expert_modules(weights, lambda weight: weight.tensors))
    wanted = convert(apart.write(tmp_path / "apart"), tmp_path / "apart out")
    assert out.repo.modules[EXPERTS].scheme == wanted.repo.modules[EXPERTS].scheme
    for name in wanted.repo.tensors:
        assert np.array_equal(out.array(name).view(np.uint8), wanted.array(name).view(np.uint8)), name
    facts = out.facts(EXPERTS)
    assert f"fused NVFP4 experts, {'[E, K, N]' if transposed else '[E, N, K]'}" in facts
    assert "activations stay in 16 bits" in facts


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"gate_up_proj": np.zeros((2, 16, 64), np.uint8)}, DamagedError, "do not belong together"),
        ({"down_proj_weight_scale": None}, DamagedError, "down_proj_weight_scale is missing"),
        ({"gate_up_proj_weight_scale_2": np.ones((3,), np.float32)}, DamagedError, "want one number, or one of 2"),
        ({"down_proj": np.zeros((2, 32, 64), ml_dtypes.bfloat16)}, UnsupportedError, "unquantized: down_proj of every"),
        ({"down_proj_input_scale": np.ones(64, np.float32)}, UnsupportedError, "want one static scale per tensor"),
        ({"down_proj_weight_scale": np.zeros((2, 1, 64), FP8["e4m3"])}, DamagedError, "NVFP4 of [64, 32] needs [2, 2"),
    ],
)
def test_damaged_and_odd_experts_in_one_tensor(tmp_path, change, error, said):
    weights = nvfp4_experts(lambda N, K, seed: nvfp4(N, K, seed, divides=False))
    pico = fused_stack(weights, True, ())
    tensors = {name: array for name, array in (pico.modules[EXPERTS] | change).items() if array is not None}
    assert said in refusal(tmp_path, Pico(NVFP4_MODELOPT_CONFIG, {EXPERTS: tensors}), error)


@pytest.mark.parametrize(
    ("biased", "why"),
    [
        (True, "ARK's expert kernels add no bias"),
        (False, "rows that alternate gate and up are written for the grouped GEMM alone"),
    ],
)
def test_gpt_oss_in_nvfp4_is_refused_by_name(biased, why, tmp_path):
    """It has biases, which ARK's kernels do not add; without them its rows still alternate gate and up."""
    weights = nvfp4_experts(lambda N, K, seed: nvfp4(N, K, seed, divides=False))
    pico = fused_stack(weights, True, ())
    biases = {f"{EXPERTS}.{part}_proj_bias": np.ones((2, 64), np.float32) for part in ("gate_up", "down")}
    plain = biases if biased else {}
    message = refusal(tmp_path, replace(pico, plain=plain, config={"model_type": "gpt_oss"}))
    assert f"{why}: {EXPERTS}" in message


def stack_of(change=lambda weights: weights, pack=lambda weight: weight.tensors, **sizes):
    return Pico(NVFP4_CT_CONFIG, expert_modules(change(nvfp4_experts(**sizes)), pack))


def test_a_stack_that_mixes_nvfp4_with_another_scheme_is_refused_by_name(tmp_path):
    mixed = lambda weights: weights | {(1, "down"): mxfp4(64, 32)}  # noqa: E731
    pack = lambda weight: weight.tensors if isinstance(weight, Nvfp4) else mx_tensors(weight)  # noqa: E731
    message = refusal(tmp_path, stack_of(mixed, pack))
    assert f"nvfp4 + mxfp4 experts has no XPU kernel: {EXPERTS}" in message


def test_a_stack_of_factors_and_divisors_is_refused(tmp_path):
    mixed = lambda weights: weights | {(1, "down"): replace(weights[1, "down"], divides=False)}  # noqa: E731
    message = refusal(tmp_path, stack_of(mixed))
    assert "of experts of one layer some have a factor for a global scale, some a divisor" in message


def test_sizes_that_arks_kernels_do_not_take_are_refused(tmp_path):
    message = refusal(tmp_path, stack_of(I=48))
    assert "gate is [48, 64]; ARK's expert kernels are given multiples of 32" in message


def test_a_short_last_group_is_refused(tmp_path):
    weight = nvfp4(16, 48)
    tensors = weight.tensors | {"weight_packed": weight.packed[:, :20].copy()}
    assert "NVFP4 needs K to be a multiple of 16, K=40" in refusal(tmp_path, Pico(NVFP4_CT_CONFIG, {DOWN: tensors}))


def test_scales_of_other_shapes_are_damage(tmp_path):
    weight = nvfp4(16, 64)
    tensors = weight.tensors | {"weight_scale": weight.scales[:, :3].copy()}
    message = refusal(tmp_path, Pico(NVFP4_CT_CONFIG, {DOWN: tensors}), DamagedError)
    assert "NVFP4 of [16, 64] needs [16, 4]" in message


def test_another_group_size_in_the_config_is_damage(tmp_path):
    stored = linear(tmp_path, nvfp4(16, 64)).repo.modules[DOWN]
    wrong = replace(stored, scheme=replace(stored.scheme, group_size=32))
    with pytest.raises(DamagedError, match="as nvfp4_linear g32, BF16: no NVFP4"):
        Nvfp4Linear().matrices(wrong)


@BOTH
def test_dequantized_values_are_rounded_once(tmp_path, divides):
    """Of what no kernel takes: a stack that mixes factors and divisors."""
    number = 2.0 if divides else 0.5
    weights = nvfp4_experts(lambda N, K, seed: nvfp4(N, K, seed, number=number, divides=divides))
    weights[0, "up"] = replace(weights[0, "up"], divides=not divides, number=1.0)
    source = Pico(NVFP4_CT_CONFIG, expert_modules(weights, lambda weight: weight.tensors))
    out = convert(source.write(tmp_path / "in"), tmp_path / "out", on_unsupported="dequantize")
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    for (expert, role), weight in weights.items():
        values = out.array(f"{EXPERTS}.{expert}.{names[role]}.weight").astype(np.float64)
        np.testing.assert_array_equal(values, weight.values)  # 6 significant bits times a power of two
    assert not [name for name in out.repo.tensors if "scale" in name]


def test_every_code_meets_every_scale(tmp_path):
    """16 codes under 127 scales of either sign: all products, exactly."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (1, 256))
    octets = np.arange(256, dtype=np.uint8)
    octets[octets & 0x7F == 0x7F] = 0  # NaN
    weight = Nvfp4("e2m1", codes, octets.view(FP8["e4m3"]).reshape(1, 256), 1, 16, 1.0, True)
    eight = replace(weight, codes=np.repeat(codes, 8, 0), scales=np.repeat(weight.scales, 8, 0))
    linear(tmp_path, eight)


def test_numbers_that_are_none_are_said_to_one_in_a_hurry_too(tmp_path, capsys):
    """A divisor of 0 makes every value infinite or NaN: `-q` prints its line, and the warning beside it."""
    Pico(config_of(True), {DOWN: nvfp4(16, 64, number=0.0).tensors}).write(tmp_path / "in")
    assert run(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "-q"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(tmp_path / "out")]
    warning = f"sanity: {DOWN}: 64 scales and 0 codes are NaN or infinite; so has the source"
    assert f"warning: {warning}" in said.err
    # And of several, with its name.
    (tmp_path / "models").write_text(f"{tmp_path / 'in'} {tmp_path / 'other'}\n")
    assert run(["convert", "--from", str(tmp_path / "models"), "-q"]) == 0
    assert f"warning: {tmp_path / 'in'}: {warning}" in capsys.readouterr().err
    assert run(["convert", "--from", str(tmp_path / "models"), "--force"]) == 0
    assert "verified, 1 warning in verify.md" in capsys.readouterr().out
