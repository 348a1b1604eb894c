"""ARK's expert kernels out of the released auto-round-lib wheel, executed on a CPU: asymmetric experts among them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import support.layers as hand

from xpuquant.kernels.base import tolerance
from xpuquant.kernels.shipped import ark, device, wheel

WHEELS = wheel.found("auto_round_lib")
MISSING = device.unavailable() or (None if WHEELS else f"no auto-round-lib wheel in {wheel.folder()}")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]
DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
E, N, K, G = 3, 48, 128, 32


@pytest.fixture(params=WHEELS, ids=lambda w: w.version, scope="module")
def released(request):
    return request.param


@pytest.fixture(autouse=True)
def _recorded(request, record_property, released):
    """For the lane's table."""
    record_property("wheel", str(released))
    record_property("operator", request.node.get_closest_marker("operator").args[0])


class Stack:
    """Random experts: the bytes, and the float64 weights `[E, N, K]`."""

    def __init__(self, bits, asymmetric, dtype):
        rng = np.random.default_rng(0)
        codes = rng.integers(0, 1 << bits, (E, N, K))
        self.weight = (codes[..., 0::2] | codes[..., 1::2] << 4 if bits == 4 else codes).astype(np.uint8)
        self.scales = rng.uniform(0.01, 0.1, (E, N, K // G)).astype(DTYPES[dtype])
        self.zeros = rng.integers(0, 1 << bits, (E, N, K // G)).astype(DTYPES[dtype]) if asymmetric else None
        half = 1 << (bits - 1)
        values = (codes ^ half) - half if self.zeros is None else codes - np.repeat(self.zeros.astype(float), G, axis=2)
        self.truth = values * np.repeat(self.scales.astype(float), G, axis=2)


@pytest.mark.operator("ARK: experts widened for prefill")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_codes_less_zero_points_times_scales_rounded_once(released, bits, asymmetric, dtype):
    stack = Stack(bits, asymmetric, dtype)
    found = ark.widen(released, stack.weight, stack.scales, stack.zeros, bits).swapaxes(1, 2)
    assert np.array_equal(found, stack.truth.astype(np.float32).astype(found.dtype))
    if bits == 4:
        wrong = ark.widen(released, stack.weight >> 4 | stack.weight << 4, stack.scales, stack.zeros).swapaxes(1, 2)
        assert hand.error(wrong, stack.truth) > 0.5
    if not asymmetric:  # unsigned for signed
        wrong = ark.widen(released, stack.weight ^ (0x88 if bits == 4 else 0x80), stack.scales, None, bits).swapaxes(
            1, 2
        )
        assert hand.error(wrong, stack.truth) > 0.5


@pytest.mark.operator("ARK: experts widened for prefill")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [G, K])
@pytest.mark.parametrize("element", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_fp8_codes_times_scales_per_group_or_channel_rounded_once(released, element, group, dtype):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (E, N, K)).astype(np.uint8).view(element)
    codes[~np.isfinite(codes.astype(np.float32))] = 1
    scales = rng.uniform(1e-3, 1e-2, (E, N, K // group)).astype(DTYPES[dtype])
    truth = codes.astype(float) * np.repeat(scales.astype(float), group, axis=2)
    found = ark.widen(released, codes, scales).swapaxes(1, 2)
    assert np.array_equal(found, truth.astype(np.float32).astype(found.dtype))
    other = ml_dtypes.float8_e5m2 if element is ml_dtypes.float8_e4m3fn else ml_dtypes.float8_e4m3fn
    wrong = ark.widen(released, codes.view(other), scales).swapaxes(1, 2).astype(float)
    assert hand.error(np.nan_to_num(wrong, posinf=0, neginf=0), truth) > 0.5
    assert hand.error(ark.widen(released, codes[:, ::-1].copy(), scales).swapaxes(1, 2), truth) > 0.5


@pytest.mark.operator("ARK: experts widened for prefill")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_experts_are_widened_exactly(released, dtype):
    """Integers of -12 to 12 in groups of 16; times an e4m3 scale they have 6 significant bits."""
    layer, _ = hand.nvfp4(N, K, experts=True)
    weight, scales = layer.tensors["weight"], layer.tensors["weight_scale"].astype(DTYPES[dtype])
    truth = weight * np.repeat(scales.astype(np.float64), 16, axis=1)
    found = ark.widen(released, weight.view(np.uint8)[None], scales[None], None, 8)[0].T
    assert np.array_equal(found.astype(np.float64), truth)
    wrong = ark.widen(released, weight.view(np.uint8)[None], np.roll(scales, 1, axis=1)[None], None, 8)[0].T
    assert hand.error(wrong, truth) > 0.3


@pytest.mark.operator("ARK: moe_gemm_decode, int4")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_decoding_multiplies_the_codes_of_each_rows_expert(released, asymmetric, dtype):
    stack = Stack(4, asymmetric, dtype)
    x, expert = hand.activations(7, K, dtype), np.random.default_rng(1).integers(0, E, 7)
    truth = np.einsum("mk,mnk->mn", x.astype(np.float64), stack.truth[expert])
    run = lambda weight, zeros: ark.decode(released, x, expert, weight, stack.scales, zeros)  # noqa: E731
    assert hand.error(run(stack.weight, stack.zeros), truth) < tolerance(dtype, K)
    assert hand.error(run(stack.weight >> 4 | stack.weight << 4, stack.zeros), truth) > 0.5
    if asymmetric:
        assert hand.error(run(stack.weight, stack.zeros + 1), truth) > 0.1
