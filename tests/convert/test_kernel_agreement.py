"""The check of the kernels: right ones pass whatever the scales are, kernels that are wrong on purpose do not."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import support.layers as hand
from support.fuzz.tally import count

from xpuquant.conversion.verify import agreement, expected
from xpuquant.conversion.verify.verdict import Agreement
from xpuquant.formats.layouts.base import Matrix
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.kernels import backends
from xpuquant.kernels.base import Layer
from xpuquant.kernels.reference import dequantize


class Kernel:
    """A backend made of a function of (right answer, layer, activations)."""

    name = "wrong"
    concurrent = True

    def __init__(self, compute, takes=("F32", "F16", "BF16")):
        self.compute, self.takes = compute, takes

    def unavailable(self):
        return None

    def refuses(self, scheme, N, K, activation="BF16"):
        return None if activation in self.takes else f"no {activation}"

    def is_fast(self, scheme, N, K):
        return True

    def linear(self, layer, x):
        return self.compute(backends()["reference"].linear(layer, x), layer, x)


def decode(layer: Layer) -> Decoded:
    """By the reference's rules; a scale for each element."""
    values = dequantize(layer)
    grid = np.arange(layer.N), np.arange(layer.K)
    if layer.scheme.layout == "int8_linear":
        steps = np.repeat(layer.tensors["scales"][1::2].astype(np.float64).T, layer.scheme.group_size, axis=1)
        codes = np.divide(values, steps, out=np.zeros_like(values), where=steps != 0)
        return Decoded("int", codes.round().astype(np.int16), steps, *grid)
    if not layer.scheme.layout.startswith("int4"):
        return Decoded("float", values, np.ones((1, 1)), *(0 * at for at in grid))
    scales = "scales" if "scales" in layer.tensors else "weight_scale"
    plain = dict(layer.tensors) | {scales: np.ones_like(layer.tensors[scales])}
    codes = dequantize(replace(layer, tensors=plain)).astype(np.int8)
    packed, nibbles = ("qweight", 0x99) if "qweight" in layer.tensors else ("weight", 0x11)
    ones = dict(layer.tensors) | {
        packed: np.full(layer.tensors[packed].nbytes, nibbles, np.uint8)
        .view(layer.tensors[packed].dtype)
        .reshape(layer.tensors[packed].shape)
    }
    ones.pop("qzeros", None)
    return Decoded("int", codes, dequantize(replace(layer, tensors=ones)), *grid)


def subject_of(layer: Layer) -> expected.Subject:
    decoded = decode(layer)

    class Layout:
        def layer(self, stored, matrix, start, stop):
            assert (start, stop) == (0, layer.N)
            return layer.tensors

    class Stored:
        tensors: ClassVar[dict[str, Any]] = {}
        scheme, name = layer.scheme, "m"

    def rows(start, stop):
        return replace(decoded, codes=decoded.codes[start:stop], row=decoded.row[start:stop])

    return expected.Subject(cast("Any", Stored()), cast("Any", Layout()), Matrix("linear", layer.N, layer.K), rows)


def check(subject: expected.Subject, backend) -> list[Agreement]:
    return agreement.check_kernels([subject], [backend], full=False, every=False)


class TestWrongKernels:
    def judge(self, compute) -> Agreement:
        layer, _ = hand.int4_linear(64, 256, 32, scale="F32", symmetric=False)
        found, bf16 = check(subject_of(layer), Kernel(compute))
        assert bf16.activation == "BF16" and bf16.tolerance > 100 * found.tolerance
        return found

    def test_a_right_kernel_passes(self):
        found = self.judge(lambda y, layer, x: y)
        assert found.passed and found.error < 1e-6 and found.wrong_layout > 0.5
        assert sum(found.histogram) == 64 * sum(agreement.ROWS)

    def test_right_for_one_request_and_wrong_for_two_is_noticed(self):
        found = self.judge(lambda y, layer, x: y if len(y) == 1 else y[::-1])
        assert not found.passed and found.sqnr_db < 10

    def test_one_wrong_output_row_is_noticed(self):
        def wrong(y, layer, x):
            y = y.copy()
            y[:, 17] *= 1.001
            return y

        assert not self.judge(wrong).passed

    def test_a_kernel_that_ignores_the_layout_is_blind_and_fails(self):
        right: dict[int, np.ndarray] = {}

        def remembers(y, layer, x):
            return right.setdefault(hash(x.tobytes()), y)

        # It is given the wrong layout after the right one with the same activations: what it returns "agrees".
        layer, weight = hand.int4_linear(64, 256, 32, scale="F32", symmetric=False)
        x = expected.activations(agreement.CELL_M, 256, expected.SEED, "F32")
        remembers((x.astype(np.float64) @ weight.T).astype(np.float32), layer, x)
        found = self.judge(remembers)
        assert found.error < 1e-6 and found.blind and not found.passed
        assert "accepts a wrong layout" in found.failure()

    def test_nan_where_the_source_has_none_fails(self):
        found = self.judge(lambda y, layer, x: np.where(y > 0, np.nan, y))
        assert not found.passed and np.isinf(found.error)

    @pytest.mark.parametrize("raised", [ValueError("stoi"), RuntimeError("no memory"), KeyError("x")], ids=repr)
    def test_what_a_library_raises_over_a_sound_layer_is_not_the_files_fault(self, raised):
        def stops(y, layer, x):
            raise raised

        layer, _ = hand.int4_linear(64, 256, 32, scale="F32")
        found = check(subject_of(layer), Kernel(stops))
        assert found and not any(one.ran for one in found)
        assert {one.reason for one in found} == {f"its library raised {type(raised).__name__}: {raised}"}

    def test_what_it_raises_over_a_layer_that_nothing_reads_is(self):
        def stops(y, layer, x):
            layer.tensors["scales"] = layer.tensors["scales"][:-1]
            raise ValueError("shape")

        layer, _ = hand.int4_linear(64, 256, 32, scale="F32")
        found, *_ = check(subject_of(layer), Kernel(stops))
        assert not found.passed and "its tensors are not what config.json says" in found.reason

    @pytest.mark.parametrize(
        ("takes", "ran", "refused"),
        [
            (("F32", "F16", "BF16"), ["F32", "BF16"], []),
            (("F32", "BF16"), ["F32", "BF16"], []),
            (("F16", "BF16"), ["F16", "BF16"], []),
            (("F32", "F16"), ["F32", "F16"], ["no BF16"]),
            (("F32",), ["F32"], ["no BF16", "no F16"]),
            (("F16",), ["F16"], ["no BF16"]),
            (("BF16",), ["BF16"], []),
        ],
    )
    def test_activations_are_those_the_processor_takes_and_the_report_says_so(self, takes, ran, refused):
        layer, _ = hand.int4_linear(64, 256, 32, scale="F32")
        found = check(subject_of(layer), Kernel(lambda y, layer, x: y, takes))
        assert [one.activation for one in found if one.ran] == ran and all(one.passed for one in found)
        assert [one.reason for one in found if not one.ran] == refused

    def test_activations_are_of_unit_rms_with_outliers_and_repeatable(self):
        x = expected.activations(8, 1024, 1, "F32")
        assert np.allclose(np.sqrt((x.astype(np.float64) ** 2).mean(axis=1)), 1, atol=1e-5)
        assert np.abs(x[:, ::256]).mean() > 10 * np.abs(x[:, 1::256]).mean()
        assert np.array_equal(x, expected.activations(8, 1024, 1, "F32"))


MADE = {
    "int4": lambda seed: hand.int4_linear(64, 256, 32, scale="F32", seed=seed),
    "int4 asym bf16": lambda seed: hand.int4_linear(64, 256, 64, scale="BF16", symmetric=False, seed=seed),
    "int4 channel": lambda seed: hand.int4_linear(64, 256, 256, scale="F16", seed=seed),
    "int4 act-order bias": lambda seed: hand.int4_linear(
        64, 256, 64, scale="BF16", act_order=True, bias=True, seed=seed
    ),
    "int4 long": lambda seed: hand.int4_linear(64, 4096, 128, scale="BF16", seed=seed),
    "int8": lambda seed: hand.int8_linear(64, 256, 32, seed=seed),
    "int8 asym": lambda seed: hand.int8_linear(64, 256, 64, symmetric=False, seed=seed),
    # Small codes of two planes are differences of larger terms.
    "int8 of 3 bits": lambda seed: hand.int8_linear(64, 64, 32, scale="F16", bits=3, seed=seed),
    "int8 of 1 bit": lambda seed: hand.int8_linear(64, 128, 32, scale="F32", bits=1, seed=seed),
    "int4 expert": lambda seed: hand.int4_expert(64, 256, 32, scale="BF16", seed=seed),
    "fp8 tensor": lambda seed: hand.fp8(64, 256, "tensor", seed=seed),
    "fp8 channel": lambda seed: hand.fp8(64, 256, "channel", seed=seed),
    "fp8 block": lambda seed: hand.fp8(128, 256, "block", seed=seed),
    "mxfp8": lambda seed: hand.mx(64, 256, "mxfp8", seed=seed),
    "mxfp4": lambda seed: hand.mx(64, 256, "mxfp4", seed=seed),
    "mxfp4 expert": lambda seed: hand.mx(64, 256, "mxfp4", experts=True, seed=seed),
}
SEEDS = int(os.environ.get("XPUQUANT_TRUST_ROUNDS", "3"))
"""Layers of each kind; scripts/lanes/trust takes more."""


def spoil(layer: Layer, rng: np.random.Generator) -> Layer:
    """Scales anywhere between tiny and huge, some 0; rows that are nothing, or nothing but one code."""
    tensors = {role: array.copy() for role, array in layer.tensors.items()}
    scale = tensors["scales" if "scales" in tensors else "weight_scale"]
    chosen = rng.random(scale.shape) < rng.choice([0.02, 0.3, 1.0])
    decades = rng.choice([0, 4, 12]) if scale.dtype != np.float16 else rng.choice([0, 2])
    if scale.dtype == np.uint8:
        scale[chosen] = (122 + rng.uniform(-3 * decades, 3 * decades, chosen.sum())).astype(np.uint8)
    else:
        factors = 10.0 ** rng.uniform(-decades, decades, chosen.sum()) * rng.choice([-1, 1], chosen.sum())
        scale[chosen] = (scale[chosen].astype(np.float64) * factors).astype(scale.dtype)
        scale[rng.random(scale.shape) < 0.05] = 0
    if layer.scheme.layout == "int8_linear":
        scale[0::2] = scale[1::2] * scale.dtype.type(16)
    packed = tensors["qweight" if "qweight" in tensors else "weight"]
    nothing = 0x88 if layer.scheme.layout == "int4_linear" else 0
    for row in rng.choice(layer.N, rng.integers(0, 12), replace=False):
        octets = packed[row].view(np.uint8)
        kept = rng.integers(len(octets)) if rng.random() < 0.7 else -1
        octets[np.arange(len(octets)) != kept] = nothing
    return replace(layer, tensors=tensors)


@pytest.mark.parametrize("case", MADE)
@pytest.mark.parametrize("backend", [name for name in sorted(backends()) if name != "ipex"])
def test_right_kernels_pass_whatever_the_scales_are(backend, case):
    kernel = backends()[backend]
    if kernel.unavailable() is not None:
        pytest.skip(kernel.unavailable())
    for seed in range(SEEDS):
        layer, _ = MADE[case](seed)
        layer = spoil(layer, np.random.default_rng(seed))
        for found in check(subject_of(layer), kernel):
            assert found.passed, (seed, found.failure())
            # Nothing but what overflows is left out, and of that there is none here.
            assert found.ran or "exceed" not in (found.reason or ""), found.reason
            count("integrity: kernels run on spoiled scales", found.ran)


@pytest.mark.parametrize("case", ["int4", "int4 asym bf16", "int4 act-order bias", "int4 long"])
def test_one_wrong_code_is_noticed_beside_scales_of_any_size(case):
    """The norm of all errors, over that of all outputs, would not move."""
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        layer, _ = MADE[case](seed)
        scales = layer.tensors["scales"].copy()
        scales[:, :32] = (scales[:, :32].astype(np.float64) * 1e9).astype(scales.dtype)
        layer = replace(layer, tensors=dict(layer.tensors) | {"scales": scales})
        words = layer.tensors["qweight"].copy()
        words[rng.integers(32, 64), rng.integers(words.shape[1])] ^= 8
        wrong = replace(layer, tensors=dict(layer.tensors) | {"qweight": words})

        def compute(y, given, x, words=layer.tensors["qweight"], wrong=wrong):
            return backends()["reference"].linear(wrong, x) if given.tensors["qweight"] is words else y

        found = check(subject_of(layer), Kernel(compute))[0]
        assert found.activation == "F32" and not found.passed and found.error < 1e-6, found


def test_a_wrong_layout_that_rounding_would_hide_is_not_tried():
    """A huge scale over codes that read the same in any order: a right kernel may lose the others beside them."""
    layer, _ = hand.int4_linear(64, 256, 128, scale="F32", symmetric=True)
    words, scales = layer.tensors["qweight"].copy(), layer.tensors["scales"].copy()
    words[:, :16] = 0x33333333
    scales[0] = 1e20
    layer = replace(layer, tensors={"qweight": words, "scales": scales})
    for found in check(subject_of(layer), Kernel(lambda y, layer, x: y)):
        assert found.ran and found.passed and found.wrong_layout is None


def test_float16_gives_way_where_it_overflows():
    layer, _ = hand.int4_linear(64, 256, 32, scale="F32")
    layer = replace(layer, tensors=dict(layer.tensors) | {"scales": layer.tensors["scales"] * np.float32(1e7)})
    found = check(subject_of(layer), Kernel(lambda y, layer, x: y, takes=("F16", "BF16")))[0]
    assert found.activation == "BF16" and found.passed
    refused = check(subject_of(layer), Kernel(lambda y, layer, x: y, takes=("F16",)))[0]
    assert not refused.ran and "float16" in refused.reason
