"""Layout of a module that was asked to be dequantized: plain bf16, under the names of the unquantized model.

    P.weight  BF16 [N, K]

Values are rounded to nearest even from the exact product of code and scale. Only used with `--on-unsupported
dequantize`; it is the one lossy step, so plan, card and report name every module that took it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.errors import UnsupportedError
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Array, Conversion, ExpertStack, Module, OutTensor, Piece
from xpuquant.formats.weights.base import CACHED_CODES, Weight, row_blocks
from xpuquant.formats.weights.split import SplitFloat, SplitInt

DTYPE = "BF16"


@dataclass(frozen=True)
class Rounded:
    """Fills rows of bf16 values, from row `start` on."""

    weight: Weight
    start: int

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        target = out.view(numpy_dtype(DTYPE)).reshape(-1, self.weight.K)
        decoded = self.weight.decode(arrays, self.start, self.start + len(target))
        target[...] = to_bf16(decoded.values())


def to_bf16(values: Array) -> Array:
    """bf16 nearest to float64 values, ties to even: rounded once.

    By way of float32, because numpy has no direct cast; float32 does not hold the product of an 8-bit code and a
    24-bit scale, so that rounding is made harmless: where it was inexact, to odd (Boldo and Melquiond, 2008).
    """
    with np.errstate(over="ignore"):
        wide = values.astype(np.float32)
    inexact = (wide != values) & ~np.isnan(values)
    bits = wide.view(np.uint32)
    bits -= inexact & (np.abs(wide) > np.abs(values))
    bits |= inexact
    return wide.astype(numpy_dtype(DTYPE))


def _is_fused(module: Module) -> bool:
    """Whether a module is, or is cut from, a tensor that holds gate and up of all experts."""
    if isinstance(module, ExpertStack):
        return "gate_up" in module.weights or module.interleaved
    expert = expert_of(module.name)
    is_part = isinstance(module.weight, SplitInt | SplitFloat)
    return is_part or (expert is not None and expert[2] == "gate_up")


def convert(module: Module, reason: str) -> Conversion:
    """Every matrix of a module as its own bf16 tensor.

    Raises:
        UnsupportedError: experts that the unquantized model does not have one by one.
    """
    if _is_fused(module):
        raise UnsupportedError(
            f"{module.name}: {reason}; nor can they be dequantized, because the unquantized model has all experts "
            "of a layer in one tensor"
        )
    weights = (
        [weight for role in module.weights.values() for weight in role]
        if isinstance(module, ExpertStack)
        else [module.weight]
    )
    tensors = [
        OutTensor(
            f"{weight.name}.weight",
            DTYPE,
            (weight.N, weight.K),
            tuple(
                Piece(weight.decode_inputs(start, stop), (stop - start) * weight.K * 2, Rounded(weight, start))
                for start, stop in row_blocks(weight.N, weight.K, limit=4 * CACHED_CODES)
            ),
        )
        for weight in weights
    ]
    return Conversion(module.name, None, tuple(tensors), (f"dequantized to bf16: {reason}",))
