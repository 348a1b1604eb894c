"""PyTorch's own kernels: the limits `refuses` names are PyTorch's, and a broken layer is noticed."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import support.layers as hand

from xpuquant.kernels.base import tolerance
from xpuquant.kernels.torch_native import TorchNative, _device

torch = pytest.importorskip("torch")

from xpuquant.kernels.torch_tensors import to_torch  # noqa: E402

BACKEND = TorchNative()
on_cpu = pytest.mark.skipif(_device() != "cpu", reason="the limits of the CPU kernels")


def difference(layer, weight, dtype="F32"):
    x = hand.activations(8, layer.K, dtype)
    return hand.error(BACKEND.linear(layer, x), hand.expected(weight, x, layer))


def test_weights_zero_to_seven_come_out_in_order():
    layer, _ = hand.int4_linear(16, 32, 32, scale="F32")
    layer.tensors["qweight"][:] = 0x76543210
    layer.tensors["scales"][:] = 1
    x = np.eye(32, dtype=hand.DTYPES["BF16"])[:8]
    assert BACKEND.linear(layer, x)[:, 0].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1]


@on_cpu
def test_the_limits_named_are_the_kernel_s():
    scheme = hand.int4_linear(16, 32, 32)[0].scheme
    aten, x = torch.ops.aten, torch.zeros(1, 64)
    with pytest.raises(RuntimeError, match="16"):
        aten._convert_weight_to_int4pack_for_cpu(torch.zeros(24, 64, dtype=torch.int32), 1)
    assert "N=24 must be a multiple of 16" in BACKEND.refuses(scheme, 24, 64)
    packed = aten._convert_weight_to_int4pack_for_cpu(torch.zeros(16, 64, dtype=torch.int32), 1)
    with pytest.raises(RuntimeError, match="qGroupSize"):
        aten._weight_int4pack_mm_for_cpu(x, packed, 16, torch.zeros(4, 16, 2))
    assert "group size 16" in BACKEND.refuses(replace(scheme, group_size=16), 16, 64)


@on_cpu
@pytest.mark.parametrize("make", [lambda: hand.fp8(40, 72, "channel"), lambda: hand.mx(40, 96, "mxfp8")])
def test_fp8_of_any_shape_runs_on_a_cpu(make):
    layer, weight = make()
    assert BACKEND.refuses(layer.scheme, layer.N, layer.K) is None
    assert difference(layer, weight) < tolerance("F32", layer.K)


def _transposed_blocks(t):
    return {**t, "weight_scale": np.ascontiguousarray(t["weight_scale"].T)}


def _transposed_weight(t):
    return {**t, "weight": np.ascontiguousarray(t["weight"].T)}


def _other_fp8(t):
    return {**t, "weight": t["weight"].view(ml_dtypes.float8_e5m2)}


@on_cpu
@pytest.mark.parametrize("break_it", [_transposed_blocks, _transposed_weight, _other_fp8])
def test_a_broken_fp8_layer_is_noticed(break_it):
    layer, weight = hand.fp8(256, 256, "block")
    assert difference(layer, weight) < tolerance("F32", 256)
    assert difference(replace(layer, tensors=break_it(layer.tensors)), weight) > 0.01


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_tensors_keep_every_value_of_numpy_s(name):
    values = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name))
    values.flags.writeable = False
    carried = to_torch(values)
    assert str(carried.dtype) == f"torch.{name}"
    np.testing.assert_array_equal(carried.to(torch.float32).numpy(), values.astype(np.float32))
