"""The truth: float64, straight from the definition of each stored layout. numpy only.

Sources: the on-disk contract in docs; OCP Microscaling Formats 1.0 for E2M1 elements and E8M0 scales. Written
apart from `formats/` on purpose: it is what the conversion is checked against.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.base import Array, Layer

# OCP MX 1.0, table 5: E2M1 by its code, sign in the high bit. This table and `_nibbles` are not shared with
# formats/weights/decoded.py and xpuquant/layers.py, so that a mistake in one is found by the others.
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = np.concatenate([_E2M1, -_E2M1])


_ROWS_FIRST = (
    *("int4_experts", "mxfp4_experts", "uint4_experts", "int8_experts"),
    *("fp8_channel_experts", "nvfp4_experts"),
)
"""Experts whose matrices lie as `[N, K]`; others lie transposed."""


def dequantize(layer: Layer) -> Array:
    """float64 `[N, K]`: the weight, with its columns in the source's order.

    Every product code × scale is exact in float64. A code or scale that is NaN stays NaN.
    """
    tensors = layer.tensors
    if layer.scheme.layout in ("int4_linear", "int8_linear"):
        stored = _int4_linear(layer)
    elif layer.scheme.layout == "nvfp4_linear":
        stored = _nvfp4_linear(layer)
    else:
        codes = _codes(layer.scheme, tensors["weight"])
        if "weight_zero_point" in tensors:
            zeros = tensors["weight_zero_point"].astype(np.float64)
            codes = codes - zeros.repeat(layer.K // zeros.shape[1], axis=1)
        stored = codes * _scales(layer.scheme, layer.N, layer.K, tensors["weight_scale"])
    if "global_scale" in tensors:
        number = float(tensors["global_scale"].reshape(()))
        stored = stored / number if layer.scheme.divides else stored * number
    if "g_idx" not in tensors:
        return stored
    source = np.empty_like(stored)
    source[:, tensors["g_idx"]] = stored  # column j was made to meet activation g_idx[j]
    return source


def matmul(weight: Array, x: Array, bias: Array | None = None) -> Array:
    """float64 `[M, N]` = `x · weightᵀ (+ bias)`.

    Args:
        weight: float64 `[N, K]`.
        x: activations `[M, K]`, any float type.
        bias: `[N]`, any float type.
    """
    product: Array = x.astype(np.float64) @ weight.T
    return product if bias is None else product + bias.astype(np.float64)


def _nibbles(packed: Array) -> Array:
    """uint8 `[rows, 2·columns]`: the nibbles of each byte, low one first."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)


def _codes(scheme: Scheme, weight: Array) -> Array:
    """float64 `[N, K]`: the stored codes as numbers."""
    if scheme.layout == "int4_experts":
        return (_nibbles(weight) ^ 8).astype(np.float64) - 8
    if scheme.layout == "uint4_experts":
        return _nibbles(weight).astype(np.float64)
    if scheme.layout in ("mxfp4_linear", "mxfp4_experts"):
        values: Array = _E2M1[_nibbles(weight)]
        return values
    codes = weight.astype(np.float64)
    return codes.T if scheme.experts and scheme.layout not in _ROWS_FIRST else codes


def _int4_linear(layer: Layer) -> Array:
    """(nibble − zero point) × scale, `[N, K]` in stored order; of 8 bits the sum of a group's two planes."""
    planes = 2 if layer.scheme.layout == "int8_linear" else 1
    repeats = planes * layer.K // layer.tensors["scales"].shape[0]
    zeros = _nibbles(layer.tensors["qzeros"]) if "qzeros" in layer.tensors else np.array(8)
    zeros = np.repeat(zeros.astype(np.float64), repeats, axis=0) if zeros.ndim else zeros
    scales = np.repeat(layer.tensors["scales"].astype(np.float64), repeats, axis=0)
    values: Array = (_nibbles(layer.tensors["qweight"]) - zeros.T) * scales.T
    summed: Array = values.reshape(layer.N, -1, planes, repeats).sum(axis=2)
    return summed.reshape(layer.N, layer.K)


def _nvfp4_linear(layer: Layer) -> Array:
    """The sum of a group's two planes of signed nibbles, times its scale, `[N, K]`."""
    groups = layer.tensors["scales"].shape[0]
    planes = _nibbles(layer.tensors["qweight"]).astype(np.float64).reshape(layer.N, groups, 2, layer.K // groups) - 8
    values: Array = planes.sum(axis=2) * layer.tensors["scales"].astype(np.float64).T[:, :, None]
    return values.reshape(layer.N, layer.K)


def _scales(scheme: Scheme, N: int, K: int, scale: Array) -> Array:
    """float64 multipliers that broadcast over `[N, K]`."""
    if scale.dtype == np.uint8:  # E8M0: a power of two; 255 is NaN
        values = np.where(scale == 255, np.nan, np.exp2(scale.astype(np.float64) - 127))
    else:
        values = scale.astype(np.float64)
    if scheme.granularity == "tensor":
        return values.reshape(1, 1)
    if scheme.granularity == "channel":
        return values.reshape(N, 1)
    if scheme.granularity == "block":
        return values.repeat(scheme.group_size, axis=0).repeat(scheme.block_n, axis=1)[:K, :N].T
    rows_are_n = scheme.layout in (*_ROWS_FIRST, "mxfp8_experts")
    return (values if rows_are_n else values.T).repeat(scheme.group_size, axis=1)


class Reference:
    """float64 on the stored layer: runs everything, everywhere; slow."""

    name = "reference"
    concurrent = True

    def unavailable(self) -> str | None:
        return None

    def refuses(self, scheme: Scheme, N: int, K: int, activation: str = "BF16") -> str | None:
        return None

    def is_fast(self, scheme: Scheme, N: int, K: int) -> bool:
        return False

    def linear(self, layer: Layer, x: Array) -> Array:
        result: np.ndarray[Any, Any] = matmul(dequantize(layer), x, layer.tensors.get("bias"))
        return result.astype(np.float32)
