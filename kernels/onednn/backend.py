"""Intel's oneDNN, the library under the XPU linears of vllm-xpu-kernels, over the very bytes of a layer.

Every primitive has the memory descriptors and attributes that the XPU op builds (vllm-xpu-kernels,
`csrc/xpu/onednn/`: int4_gemm_w4a16.h, fp8_gemm_w8a16.h, fp8_gemm_w8a8.h, fp4_gemm_w4a4.h). It runs on an
Intel GPU where SYCL sees one, otherwise on the CPU. Experts go through CUTLASS on an XPU: for those oneDNN
is another reader of the same weight bytes, not the same kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from xpuquant.errors import UnsupportedError
from xpuquant.formats.dtypes import label_of, numpy_dtype
from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.activation_terms import mx_terms
from xpuquant.kernels.base import Array, Layer, fault_of
from xpuquant.kernels.integers import as_integers, finished, integer_scheme
from xpuquant.kernels.onednn import api
from xpuquant.kernels.onednn.api import BIAS, SCALES, SRC, WEIGHTS, ZERO_POINTS, Matmul, Quantization, Shape

_ELEMENTS = {
    "int4_linear": "U4",
    "int4_experts": "S4",
    "uint4_experts": "U4",
    "int8_experts": "I8",
    "fp8_linear": "F8_E4M3",
    "fp8_experts": "F8_E4M3",
    "fp8_channel_experts": "F8_E4M3",
    "mxfp8_linear": "F8_E4M3",
    "mxfp8_experts": "F8_E4M3",
    "mxfp4_linear": "F4",
    "mxfp4_experts": "F4",
}
_TRANSPOSED = ("fp8_experts", "mxfp8_experts")  # stored [K, N]
_SCALES_BY_ROW = (  # stored [N, K/g]
    *("int4_experts", "uint4_experts", "int8_experts", "mxfp4_experts", "mxfp8_experts"),
    "fp8_channel_experts",
)
_GROUPS_OF_16 = ("uint4_experts", "int8_experts")  # as ARK's kernels take them too
_INTEGERS = ("U4", "S4", "U8", "I8")


def _weight_scales(scheme: Scheme, N: int, K: int) -> tuple[Quantization, Shape]:
    dtype = "F8_E8M0" if scheme.scale_dtype == "U8" else scheme.scale_dtype
    if scheme.granularity == "tensor":
        return Quantization(dtype), Shape.rows(dtype, 1)
    if scheme.granularity == "channel":
        return Quantization(dtype, 2), Shape.rows(dtype, N)
    k, n = scheme.group_size, scheme.block_n or 1
    return Quantization(dtype, 3, (k, n)), Shape.rows(dtype, K // k, N // n)


def _element(scheme: Scheme) -> str:
    """The weights' type that is usual for a layout."""
    unsigned = scheme.layout == "int8_experts" and not scheme.symmetric
    return "U8" if unsigned else _ELEMENTS[scheme.layout]


def _zero_points(scheme: Scheme, N: int, K: int) -> tuple[Quantization, Shape] | None:
    g = scheme.group_size
    if not scheme.symmetric:
        stored = "U8" if scheme.experts else "U4"
        return Quantization(stored, 3, (g, 1)), Shape.rows(stored, K // g, N)
    if scheme.layout == "int4_linear":
        return Quantization("I8"), Shape.rows("I8", 1)
    return None


def _activation_scales(scheme: Scheme) -> tuple[str, Quantization] | None:
    """The type and scales of activations of the operators that have no 16-bit form: fp8_gemm (MXFP8), fp4_gemm."""
    if scheme.layout == "mxfp4_linear":
        return "F4", Quantization("F8_E8M0", 3, (1, 32))
    if scheme.layout == "mxfp8_linear":
        return "F8_E4M3", Quantization("F8_E8M0", 3, (1, 32))
    return None


@lru_cache(maxsize=1024)
def _matmul(
    scheme: Scheme, N: int, K: int, M: int, activation: str, *, element: str | None = None, bias: bool = False
) -> Matmul:
    """The XPU op's matmul for one layer. `element`: the weights' type where it is not the layout's usual."""
    element = element or _element(scheme)
    scales = [(WEIGHTS, _weight_scales(scheme, N, K)[0])]
    quantized = _activation_scales(scheme)
    if quantized is not None:
        scales.append((SRC, quantized[1]))
    zeros = _zero_points(scheme, N, K)
    return Matmul(
        src=Shape.rows(quantized[0] if quantized else activation, M, K),
        weights=Shape(element, (K, N), (N, 1) if scheme.layout in _TRANSPOSED else (1, K)),
        dst=Shape.rows(activation, M, N),
        bias=Shape.rows(activation, 1, N) if bias else None,
        scales=tuple(scales),
        zero_points=((WEIGHTS, zeros[0]),) if zeros else (),
        fpmath=activation if element in _INTEGERS else None,
    )


@lru_cache(maxsize=1024)
def _as_run(scheme: Scheme, N: int, K: int, activation: str) -> Scheme:
    """`scheme`, or the same with float32 scales where oneDNN has but its reference code for 16-bit ones.

    Widening them is exact, and a matmul of 64 × 4096 × 4096 takes 0.06 s where the reference code takes
    half a minute. An Intel GPU reads them as stored, as the XPU operator does.
    """
    matmul = _matmul(scheme, N, K, 8, activation)
    widened = replace(scheme, scale_dtype="F32")
    if scheme.scale_dtype not in ("F16", "BF16") or not api.supported(matmul):
        return scheme
    return widened if api.implementation(matmul).startswith("ref") else scheme


def _smallest(scheme: Scheme, activation: str) -> Matmul:
    """The matmul of a layer of two groups: not refused for its shape."""
    return _matmul(scheme, scheme.block_n or 8, 2 * (scheme.group_size or 32), 8, activation)


def _refused_like(scheme: Scheme) -> Iterator[Matmul]:
    """What a verification is about to ask for besides, where one is refused: other activations, and the layouts of one
    model's linears and experts."""
    kind = scheme.layout.partition("_")[0]
    for layout in _ELEMENTS:
        if layout.partition("_")[0] == kind:
            smallest = (_smallest(replace(scheme, layout=layout), dtype) for dtype in ("F32", "F16", "BF16"))
            yield from (matmul for matmul in smallest if not api.supported(matmul))


class OneDNN:
    """oneDNN's matmul on the first Intel GPU, else on the CPU."""

    name = "onednn"
    concurrent = True

    def unavailable(self) -> str | None:
        return fault_of(api.engine)

    def device(self) -> str:
        """ "gpu" or "cpu". Raises EnvironmentFault where `unavailable`."""
        return api.engine()[0]

    def refuses(self, scheme: Scheme, N: int, K: int, activation: str = "BF16") -> str | None:
        """None where oneDNN creates the primitive on this device; otherwise its reason.

        Asks the library, so the answer is that of this processor: docs/kernels.md has what several said.
        """
        scheme, K = integer_scheme(scheme, K)
        if scheme.layout not in _ELEMENTS:
            return f"no oneDNN description of layout {scheme.layout}"
        missing = self.unavailable()
        if missing is not None:
            return missing
        if _element(scheme) in _INTEGERS and scheme.group_size % 32 and scheme.layout not in _GROUPS_OF_16:
            # oneDNN 3.13 accepts groups of 48 on a CPU and computes garbage.
            return f"the XPU operators take groups in multiples of 32, not of {scheme.group_size}"
        if scheme.group_size and K % scheme.group_size:
            # oneDNN 2025.2 takes them, 2026.1 does not.
            return f"groups of {scheme.group_size} do not divide K={K}"
        matmul = _matmul(scheme, N, K, 8, activation)
        if api.supported(matmul):
            return None
        at = f" at N={N}, K={K}"
        smallest = _smallest(scheme, activation)
        if not api.supported(smallest):  # not for want of a better shape: say so, once for all of them
            matmul, at = smallest, ""
        kinds = f"{matmul.weights.dtype} weights with {matmul.src.dtype} activations"
        return f"no oneDNN matmul of {kinds} on this {self.device()}{at}: {api.reasons(matmul, _refused_like(scheme))}"

    def implementation(self, scheme: Scheme, N: int, K: int, activation: str = "BF16") -> str:
        """oneDNN's name for the code it chose, as in its log. Raises UnsupportedError where refused."""
        scheme, K = integer_scheme(scheme, K)
        return api.implementation(_matmul(_as_run(scheme, N, K, activation), N, K, 8, activation))

    def is_fast(self, scheme: Scheme, N: int, K: int) -> bool:
        """Not where oneDNN has only its reference code, which takes minutes where generated code takes 0.1 s."""
        taken = (dtype for dtype in ("F32", "F16", "BF16") if self.refuses(scheme, N, K, dtype) is None)
        activation = next(taken, None)
        return activation is not None and not self.implementation(scheme, N, K, activation).startswith("ref")

    def linear(self, layer: Layer, x: Array) -> Array:
        """`x · Wᵀ (+ bias)`, float32 `[M, N]`.

        Raises:
            UnsupportedError: oneDNN has no such matmul on this device; the reason.
            DamagedError: a tensor has another size than the scheme says.
        """
        stored = layer
        layer, x = as_integers(layer, x)
        scheme, N, K = layer.scheme, layer.N, layer.K
        if scheme.act_order:
            x = x[:, layer.tensors["g_idx"]]
        activation = label_of(x.dtype)
        reason = self.refuses(scheme, N, K, activation)
        if reason is not None:
            raise UnsupportedError(reason)
        scheme = _as_run(scheme, N, K, activation)
        weight = layer.tensors["qweight" if scheme.layout == "int4_linear" else "weight"]
        element = None if weight.dtype.kind in "iu" else label_of(weight.dtype)
        bias = layer.tensors.get("bias")
        result = np.zeros((len(x), N), np.float32)
        for source, source_scales in _sources(scheme, x):
            matmul = _matmul(scheme, N, K, len(x), activation, element=element, bias=bias is not None)
            arguments = {SRC: (matmul.src, source), WEIGHTS: (matmul.weights, weight)}
            arguments |= _parameters(layer, scheme)
            if source_scales is not None:
                arguments[SCALES | SRC] = (Shape.rows("F8_E8M0", *source_scales.shape), source_scales)
            if matmul.bias is not None and bias is not None:
                arguments[BIAS] = (matmul.bias, bias.astype(x.dtype))  # as a loader would cast it
                bias = None  # once, with the first term
            out = np.empty((len(x), N), numpy_dtype(activation))
            result += api.run(matmul, arguments, out).astype(np.float32)
        return finished(stored, result)


def _sources(scheme: Scheme, x: Array) -> Iterator[tuple[Array, Array | None]]:
    quantized = _activation_scales(scheme)
    if quantized is None:
        yield x, None
    else:
        yield from mx_terms(x, quantized[0])


def _parameters(layer: Layer, scheme: Scheme) -> dict[int, tuple[Shape, Array]]:
    """Scales and zero points of the weights, as execution arguments."""
    scale = layer.tensors["scales" if scheme.layout == "int4_linear" else "weight_scale"]
    # oneDNN reads scales row by row of [K/g, N] whatever a descriptor's strides say.
    scale = scale.T if scheme.layout in _SCALES_BY_ROW else scale
    if scheme.scale_dtype != "U8":
        scale = scale.astype(numpy_dtype(scheme.scale_dtype), copy=False)
    arguments = {SCALES | WEIGHTS: (_weight_scales(scheme, layer.N, layer.K)[1], scale)}
    zeros = _zero_points(scheme, layer.N, layer.K)
    if zeros is not None:
        arguments[ZERO_POINTS | WEIGHTS] = (zeros[1], _stored_zeros(layer))
    return arguments


def _stored_zeros(layer: Layer) -> Array:
    if layer.scheme.symmetric:
        return np.array([8], np.int8)
    return layer.tensors["weight_zero_point"].T if layer.scheme.experts else layer.tensors["qzeros"]
