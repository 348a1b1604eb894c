"""Zero points of GPTQ files: which of two conventions, and are they zero points at all.

v1 (`checkpoint_format: gptq`) stores z - 1, v2 (`gptq_v2`, `gptq_p`) stores z. The label is often wrong (Qwen's own
GPTQ repos store v2 and claim v1: vLLM pull 26092), but a symmetric checkpoint shows it: every field is 2^(b-1) - 1
or 2^(b-1). For asymmetric ones the label is all there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.gptq_config import GptqConfig
from xpuquant.formats.nibbles import unpack_planar, unpack_rows
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weight import Array


@dataclass(frozen=True)
class ZeroPoints:
    """What the zero points of one module turned out to be.

    symmetric  all are 2^(bits-1)
    plus_one   stored minus one
    fact       how that was decided, for the report
    """

    symmetric: bool
    plus_one: bool
    fact: str


def measure_zeros(
    checkpoint: Checkpoint, config: GptqConfig, name: str, bits: int, N: int, G: int, qzeros: Tensor | None
) -> ZeroPoints:
    """Decide convention and symmetry of one module.

    Raises:
        DamagedError: qzeros are absent where the config says asymmetric, or do not have G rows.
    """
    if qzeros is None:
        if config.sym is not True:
            raise DamagedError(f"{name}.qzeros is missing, but the config does not say symmetric (sym: true)")
        return ZeroPoints(True, False, "symmetric: no qzeros, the config says sym")
    if qzeros.shape[0] != G:
        raise DamagedError(f"{qzeros.name} has {qzeros.shape[0]} rows, {name}.scales has {G}")
    label = "minus one (v1)" if config.zeros_minus_one else "true (v2)"
    words = checkpoint.peek(qzeros)
    if words is None:
        symmetric = config.sym is True
        return ZeroPoints(symmetric, config.zeros_minus_one, f"zero points {label}, as the config says")
    fields = _fields(words, bits, N, config.planar)
    middle = 1 << (bits - 1)
    low, high = (int(fields.min()), int(fields.max())) if fields.size else (middle, middle)
    if low == high and config.sym is not False and low in (middle - 1, middle):
        measured = "minus one (v1)" if low == middle - 1 else "true (v2)"
        lie = f"; the config says {label}" if measured != label else ""
        return ZeroPoints(True, low == middle - 1, f"symmetric, zero points {measured}, from the words{lie}")
    if low == high == middle - config.zeros_minus_one:
        return ZeroPoints(
            True, config.zeros_minus_one, "symmetric, from the words, although the config says not"
        )
    return ZeroPoints(False, config.zeros_minus_one, f"asymmetric, zero points {label}, as the config says")


def true_zeros(words: Array, bits: int, N: int, plus_one: bool, planar: bool = False) -> Array:
    """uint8 `[G, N]`: the zero points the producer meant.

    Args:
        words: int32 `[G, ceil(N*b/32)]`.
        plus_one: stored minus one. The writers subtract from (GPTQModel) or sum into (AutoRound) the *whole word*, so
            a true zero of 0 borrows from the field above: adding the per-field ones to the word undoes it
            exactly, where adding one per field would not (gptqmodel/utils/model.py,
            convert_gptq_v1_to_v2_format_module). 3-bit fields straddle words and are written one by one.
    """
    if not plus_one:
        return _fields(words, bits, N, planar)
    if 32 % bits:
        return (_fields(words, bits, N, planar) + np.uint8(1)) & np.uint8((1 << bits) - 1)
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return _fields(words.view(np.uint32) + ones, bits, N, planar)


def _fields(words: Array, bits: int, N: int, planar: bool) -> Array:
    unpack = unpack_planar if planar else unpack_rows
    fields = unpack(np.ascontiguousarray(words).view(np.uint32), bits, N)
    if fields.shape[1] < N:
        raise DamagedError(f"qzeros hold {fields.shape[1]} zero points of {bits} bits, N={N}")
    return fields
