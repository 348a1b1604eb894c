"""What holds for every kernel backend: honest refusals, numbers, no heavy import before it is needed."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import support.layers as hand
from hypothesis import given, settings
from hypothesis import strategies as st

from xpuquant.errors import UnsupportedError
from xpuquant.kernels import backends
from xpuquant.kernels.activation_terms import fp8_terms, mx_terms
from xpuquant.kernels.base import Backend, tolerance
from xpuquant.kernels.reference import dequantize, matmul

BATCHES = (1, 2, 8, 64)


def available(name: str) -> Backend:
    backend = backends()[name]
    missing = backend.unavailable()
    if missing is not None:
        pytest.skip(missing)
    return backend


@pytest.mark.parametrize("case", hand.CASES)
@pytest.mark.parametrize("backend", sorted(backends()))
def test_backend_agrees_with_float64_or_refuses(backend, case):
    kernel = available(backend)
    for (layer, weight), dtype in itertools.product(hand.layers(case), hand.DTYPES):
        refused = kernel.refuses(layer.scheme, layer.N, layer.K, dtype)
        if refused is not None:
            with pytest.raises(UnsupportedError) as raised:
                kernel.linear(layer, hand.activations(8, layer.K, dtype))
            assert "\n" not in refused and str(raised.value) == refused
            continue
        for M in BATCHES:
            x = hand.activations(M, layer.K, dtype)
            y = kernel.linear(layer, x)
            assert y.dtype == np.float32 and y.shape == (M, layer.N)
            assert hand.error(y, hand.expected(weight, x, layer)) < tolerance(dtype, layer.K)


@pytest.mark.parametrize("backend", sorted(backends()))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_is_not_refused_is_right_in_odd_shapes(backend, data):
    kernel = available(backend)
    draw, symmetric = data.draw, data.draw(st.booleans())
    g = draw(st.sampled_from([8, 16, 32, 48, 64, 96, 128, 160]))
    N, K = 8 * draw(st.integers(1, 30)), g * draw(st.integers(1, 5))
    if K % 8:
        return
    dtype, M = draw(st.sampled_from(["BF16", "F32"])), draw(st.sampled_from([1, 3, 17, 33]))
    layer, weight = hand.int4_linear(N, K, g, symmetric=symmetric, seed=draw(st.integers(0, 99)))
    if kernel.refuses(layer.scheme, N, K, dtype) is None:
        x = hand.activations(M, K, dtype)
        assert hand.error(kernel.linear(layer, x), hand.expected(weight, x, layer)) < tolerance(dtype, K)


@pytest.mark.parametrize("name", sorted(backends()))
def test_every_backend_says_in_one_line_whether_it_runs_here(name):
    backend = backends()[name]
    assert isinstance(backend, Backend) and backend.name == name
    missing = backend.unavailable()
    assert missing is None or (missing and "\n" not in missing)


def test_listing_the_backends_loads_nothing_heavy():
    heavy = ("torch", "intel_extension_for_pytorch", "auto_round_kernel", "vllm_xpu_kernels")
    code = (
        "import sys; from xpuquant.kernels import backends; backends()\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
        "print(any('libdnnl' in line for line in open('/proc/self/maps')))"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["[]", "False"]


# By eye: what the stored bits say, against numbers anyone can follow.


def by_eye() -> hand.Array:
    codes = np.tile(np.arange(8), (8, 4))  # every row 0, 1, ..., 7, 0, 1, ...: K = 32
    return codes


def test_reference_reads_a_word_from_its_lowest_nibble():
    layer, _ = hand.int4_linear(8, 32, 32, scale="F32")
    layer.tensors["qweight"][:] = 0x76543210
    layer.tensors["scales"][:] = 1
    assert (dequantize(layer) == by_eye() - 8).all()


def test_reference_reads_an_expert_byte_as_two_signed_nibbles_low_first():
    layer, _ = hand.int4_expert(8, 32, 32, scale="F32")
    layer.tensors["weight_scale"][:] = 1
    layer.tensors["weight"][:] = 0x7F  # low nibble -1, high nibble 7
    assert (dequantize(layer) == np.tile([-1, 7], (8, 16))).all()


def test_reference_reads_e2m1_and_e8m0():
    layer, _ = hand.mx(8, 32, "mxfp4")
    layer.tensors["weight"][:] = 0xF1  # low nibble 0.5, high nibble -6
    layer.tensors["weight_scale"][:] = 128  # 2
    assert (dequantize(layer) == np.tile([1.0, -12.0], (8, 16))).all()
    layer.tensors["weight_scale"][:] = 0  # the smallest power, not zero
    assert (dequantize(layer) == np.tile([2.0**-128, -6 * 2.0**-127], (8, 16))).all()
    layer.tensors["weight_scale"][:] = 255
    assert np.isnan(dequantize(layer)).all()


def test_reference_takes_the_true_zero_point_of_its_group_and_column():
    layer, _ = hand.int4_linear(8, 64, 32, scale="F32", symmetric=False)
    layer.tensors["qweight"][:] = 0
    layer.tensors["scales"][:] = 1
    layer.tensors["qzeros"][:, 0] = (0x76543210, 0x01234567)  # group 0: n; group 1: 7 - n
    weight = dequantize(layer)
    assert (weight[:, 0] == -np.arange(8)).all() and (weight[:, 63] == np.arange(8) - 7).all()


def test_reference_puts_act_order_columns_back_where_the_source_has_them():
    layer, _ = hand.int4_linear(8, 32, 32, scale="F32", act_order=True)
    layer.tensors["qweight"][:] = 0x76543210
    layer.tensors["scales"][:] = 1
    layer.tensors["g_idx"][:] = np.arange(32)[::-1]  # stored column 0 is the source's last
    assert (dequantize(layer)[0, -8:] == np.arange(8)[::-1] - 8).all()


@pytest.mark.parametrize("case", hand.CASES)
def test_reference_dequantizes_exactly(case):
    for layer, weight in hand.layers(case):
        assert (dequantize(layer) == weight).all()


def test_reference_multiplies_the_source_weight_in_float64():
    weight, x = np.array([[1.0, 2.0**-40]]), np.array([[1.0, 1.0]], np.float32)
    assert matmul(weight, x, np.array([1.0], np.float32)) == 2 + 2.0**-40


# Activations as sums of terms.


@pytest.mark.parametrize("element", ["F8_E4M3", "F8_E5M2", "F4"])
def test_mx_terms_add_up_to_the_activations(element):
    x = hand.activations(4, 128, "BF16").astype(np.float64)
    total = np.zeros_like(x)
    errors = []
    for codes, exponents in mx_terms(x, element):
        assert exponents.shape == (4, 4) and exponents.dtype == np.uint8
        if element == "F4":
            nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(4, -1)
            codes = np.array(hand.E2M1)[nibbles]
        total += codes.astype(np.float64) * np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 32, axis=1)
        errors.append(hand.error(total, x))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 2**-20
    assert errors[0] > 0.01  # one term, as serving uses, is far too coarse to check a weight with


@pytest.mark.parametrize("element", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("group", [0, 32])
def test_fp8_terms_add_up_to_the_activations(group, element):
    x = hand.activations(4, 128, "BF16").astype(np.float64)
    total = np.zeros_like(x)
    for codes, scale in fp8_terms(x, group, element):
        total += codes.astype(np.float64) * np.repeat(scale, group or 128, axis=1)
    assert hand.error(total, x) < 2**-20


@pytest.mark.parametrize("terms", [fp8_terms, lambda x: mx_terms(x, "F4")])
def test_terms_of_zero_are_one_zero(terms):
    ((codes, _),) = terms(np.zeros((2, 32), np.float32))
    assert not codes.astype(np.float32).any()
