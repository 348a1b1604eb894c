"""numpy arrays as torch tensors and back, bfloat16 and FP8 included. Imports torch: import it inside functions only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

# ml_dtypes name → (an integer type of the same width, torch's name for it)
_CARRIED = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
    "float8_e8m0fnu": (np.uint8, torch.float8_e8m0fnu),
}


def to_torch(array: Array, device: str = "cpu") -> torch.Tensor:
    """The same values, shape and dtype on `device`. Shares memory where the array allows it."""
    carrier, dtype = _CARRIED.get(array.dtype.name, (None, None))
    contiguous = np.ascontiguousarray(array)
    if not contiguous.flags.writeable:  # a mapped file; torch has no read-only tensors
        contiguous = contiguous.copy()
    shared = torch.from_numpy(contiguous if carrier is None else contiguous.view(carrier))
    return (shared if dtype is None else shared.view(dtype)).to(device)


def from_torch(result: torch.Tensor) -> Array:
    """float32 numpy array with the values of `result`."""
    array: Array = result.to("cpu", torch.float32).numpy()
    return array
