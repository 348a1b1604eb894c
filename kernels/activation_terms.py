"""Activations for kernels that take quantized ones: `x` as a sum of terms the kernel can read.

Serving quantizes activations once and lives with the error (2 to 4 % in FP8, 16 % in MXFP4), which
would hide a wrong weight. A matmul is linear in its activations, so the rounding error of a term becomes
the next term, and the kernel's outputs are added up: the same kernel, the same weights, and a check as
sharp as with 16-bit activations. Shapes: x `[M, K]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

# Below float32's own rounding of a sum: reached after 3 to 8 terms of FP8, 6 to 8 of MXFP4.
_NEGLIGIBLE = 2.0**-22
_MOST_TERMS = 16
_DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F4": ml_dtypes.float4_e2m1fn,
}
_LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "F4": 6.0}
# Exponent of the largest power of two the element type holds (OCP MX 1.0, section 6.3, `emax_elem`).
_EMAX = {"F8_E4M3": 8, "F8_E5M2": 15, "F4": 2}


def fp8_terms(x: Array, group: int = 0, element: str = "F8_E4M3") -> Iterator[tuple[Array, Array]]:
    """FP8 codes `[M, K]` and their multipliers, float32 `[M, K/group]`, largest term first.

    Args:
        x: activations.
        group: columns to a multiplier; 0 for one per token, `[M, 1]`.
        element: "F8_E4M3" or "F8_E5M2".
    """
    residual = x.astype(np.float64).reshape(len(x), -1, group or x.shape[1])
    for _ in _until_negligible(residual):
        peak = np.abs(residual).max(axis=2, keepdims=True)
        scale = np.where(peak > 0, peak / _LARGEST[element], 1.0).astype(np.float32)
        codes = _rounded(residual / scale, element)
        residual -= codes.astype(np.float64) * scale
        yield codes.reshape(x.shape), scale[:, :, 0]


def mx_terms(x: Array, element: str) -> Iterator[tuple[Array, Array]]:
    """MX blocks of 32 along K: codes and their E8M0 exponents, uint8 `[M, K/32]`, largest term first.

    Args:
        x: activations; K a multiple of 32.
        element: "F8_E4M3" or "F8_E5M2" (codes of that type, `[M, K]`) or "F4" (uint8 `[M, K/2]`, low nibble even).
    """
    residual = x.astype(np.float64).reshape(len(x), -1, 32)
    for _ in _until_negligible(residual):
        peak = np.abs(residual).max(axis=2, keepdims=True)
        exponent = np.floor(np.log2(np.where(peak > 0, peak, 1.0))) - _EMAX[element]
        exponent = np.clip(exponent, -126, 127)
        codes = _rounded(residual * np.exp2(-exponent), element)
        residual -= codes.astype(np.float64) * np.exp2(exponent)
        scales = (exponent[:, :, 0] + 127).astype(np.uint8)
        codes = codes.reshape(len(x), -1)
        if element == "F4":
            nibbles = codes.view(np.uint8)
            yield nibbles[:, ::2] | nibbles[:, 1::2] << 4, scales
        else:
            yield codes, scales


def _until_negligible(residual: Array) -> Iterator[int]:
    """Count terms while what the caller has left in `residual` still matters; one at least."""
    whole = float(np.linalg.norm(residual))
    for term in range(_MOST_TERMS):
        if term and float(np.linalg.norm(residual)) <= _NEGLIGIBLE * whole:
            return
        yield term


def _rounded(values: Array, element: str) -> Array:
    """To the nearest code, ties to even; beyond the largest code, the largest."""
    clipped = np.clip(values, -_LARGEST[element], _LARGEST[element])
    return clipped.astype(_DTYPES[element])
