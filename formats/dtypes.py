"""safetensors dtype labels, their widths, and the numpy type that carries each.

Labels are those of the safetensors format (`safetensors/src/tensor.rs`, enum `Dtype`). The narrow floats
are carried by ml_dtypes' numpy extension types, so every conversion between them rounds as IEEE/OCP say.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

# Bits per element. F4 and the F6 types are sub-byte: only whole tensors have a byte size.
BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

_NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}

_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}

FLOATS = ("F16", "BF16", "F32")
"""The dtypes a scale, a bias or an unquantized weight may have."""


@cache
def numpy_dtype(label: str) -> np.dtype[Any]:
    """The numpy dtype that carries `label`; sub-byte types are carried as raw bytes (uint8)."""
    if label in _NUMPY:
        return np.dtype(_NUMPY[label])
    if label in _ML_DTYPES:
        import ml_dtypes

        carrier: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML_DTYPES[label]))
        return carrier
    return np.dtype(np.uint8)


def label_of(dtype: np.dtype[Any]) -> str:
    """The safetensors label of a numpy dtype. Raises KeyError for one safetensors cannot hold."""
    for table in (_NUMPY, _ML_DTYPES):
        for label, name in table.items():
            if name == dtype.name:
                return label
    raise KeyError(dtype)


def nbytes(label: str, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor; a sub-byte tensor must fill its last byte (checked by the header)."""
    count = 1
    for size in shape:
        count *= size
    return count * BITS[label] // 8


def rounds(source: str, target: str) -> bool:
    """Whether a cast to one of `FLOATS`, from another or from E8M0, can change a value: float32 holds all of them, and
    bfloat16 every power of two that E8M0 has."""
    return target not in (source, "F32") and (source, target) != ("F8_E8M0", "BF16")
