"""ARK reads the converted int4 words; what it only pretends to compute is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import support.layers as hand

from xpuquant.kernels.ark import Ark
from xpuquant.kernels.base import tolerance

BACKEND = Ark()


@pytest.fixture(autouse=True)
def _installed():
    missing = BACKEND.unavailable()
    if missing is not None:
        pytest.skip(missing)


def difference(layer, weight):
    x = hand.activations(8, layer.K, "F32")
    return hand.error(BACKEND.linear(layer, x), hand.expected(weight, x, layer))


def test_weights_zero_to_seven_come_out_in_order():
    layer, _ = hand.int4_linear(32, 32, 32, scale="F32")
    layer.tensors["qweight"][:] = 0x76543210
    layer.tensors["scales"][:] = 1
    x = np.eye(32, dtype=np.float32)[:8]
    assert BACKEND.linear(layer, x)[:, 0].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1]


def test_zero_points_minus_one_are_noticed():
    layer, weight = hand.int4_linear(96, 256, 32, scale="F32", symmetric=False)
    assert difference(layer, weight) < tolerance("F32", 256)
    shifted = (layer.tensors["qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    assert difference(replace(layer, tensors={**layer.tensors, "qzeros": shifted}), weight) > 0.05


def test_fp8_is_refused_because_ark_leaves_the_output_unwritten():
    import torch
    from auto_round_kernel.qlinear import QuantLinearFP8

    from xpuquant.kernels.torch_tensors import from_torch, to_torch

    layer, weight = hand.fp8(96, 256, "channel")
    module = QuantLinearFP8(8, 256, 256, 96, False, data_type="fp8_e4m3", weight_dtype=torch.float32)
    module.weight = to_torch(layer.tensors["weight"])
    module.weight_scale = to_torch(layer.tensors["weight_scale"]).reshape(96, 1)
    module.post_init()
    x = hand.activations(8, 256, "F32")
    y = np.nan_to_num(from_torch(module(to_torch(x))))
    assert hand.error(y, hand.expected(weight, x, layer)) > 0.5, "ARK computes FP8 now: offer it"
    assert "integers only" in (BACKEND.refuses(layer.scheme, 96, 256) or "")
