"""What is particular to IPEX. It runs in an environment of its own, with its part of test_kernels.py:
scripts/lanes/ipex.
"""

from __future__ import annotations

import numpy as np
import pytest
import support.layers as hand

from xpuquant.kernels.ipex import Ipex

BACKEND = Ipex()


@pytest.fixture(autouse=True)
def _installed():
    missing = BACKEND.unavailable()
    if missing is not None:
        pytest.skip(missing)


@pytest.mark.parametrize("zero", [0, 1, 8, 15])
def test_every_true_zero_point_survives_gptq_s_minus_one(zero):
    layer, _ = hand.int4_linear(32, 64, 32, scale="BF16", symmetric=False)
    layer.tensors["qzeros"][:] = hand.pack_words(np.full((2, 32), zero))
    layer.tensors["qweight"][:] = 0x76543210
    layer.tensors["scales"][:] = 1
    x = np.eye(64, dtype=hand.DTYPES["BF16"])[:8]
    assert BACKEND.linear(layer, x)[:, 0].tolist() == [code - zero for code in range(8)]


def test_swapped_nibbles_are_noticed():
    layer, weight = hand.int4_linear(96, 256, 64)
    octets = layer.tensors["qweight"].view(np.uint8)
    octets[:] = octets >> 4 | octets << 4
    x = hand.activations(8, 256, "BF16")
    assert hand.error(BACKEND.linear(layer, x), hand.expected(weight, x, layer)) > 0.1
