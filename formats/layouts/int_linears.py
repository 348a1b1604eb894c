"""What the stored layouts of integer linears share: zero points as nibbles along N, and the order of the columns.

P.qzeros   int32 [G, N/8]  nibble j of word i belongs to row 8i+j of the weight
P.g_idx    int32 [K]       act-order only: stored column j is source column g_idx[j]
"""

from __future__ import annotations

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array, columns, rows, whole
from xpuquant.formats.layouts.base import OutTensor, Piece, Stored
from xpuquant.formats.layouts.fillers import FillOrder
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, unpack_nibbles
from xpuquant.formats.weights.integers import IntWeight


def order_of(name: str, weight: IntWeight) -> list[OutTensor]:
    """`g_idx` of a weight whose columns are stored sorted by group; empty where they lie as in the source."""
    if not weight.act_order:
        return []
    return [OutTensor(f"{name}.g_idx", "I32", (weight.K,), (Piece((), 4 * weight.K, FillOrder(weight)),))]


def source_columns(stored: Stored, K: int) -> Array:
    """int64 [K]: where each source column is stored.

    Raises:
        DamagedError: `g_idx` is not a permutation.
    """
    order = stored.array("g_idx")
    if not np.array_equal(np.sort(order), np.arange(K)):
        raise DamagedError(f"{stored.name}.g_idx is not a permutation of 0..{K - 1}")
    return np.argsort(order)


def zero_nibbles(stored: Stored, start: int, stop: int) -> Array:
    """uint8 [G, stop - start]: the stored zero points of rows start to stop."""
    first, last = _words(start, stop)
    packed = stored.load(columns(stored.tensors["qzeros"], first, last)).view(np.uint8)
    return unpack_nibbles(packed)[:, start - first * NIBBLES_PER_WORD : stop - first * NIBBLES_PER_WORD]


def layer_rows(stored: Stored, start: int, stop: int) -> dict[str, Array]:
    """The tensors of a linear cut to rows start to stop, as a kernel takes them; both are multiples of 8."""
    first, last = _words(start, stop)
    parts = {
        "qweight": lambda tensor: rows(tensor, start, stop),
        "scales": lambda tensor: columns(tensor, start, stop),
        "qzeros": lambda tensor: columns(tensor, first, last),
        "g_idx": whole,
    }
    return {suffix: stored.load(parts[suffix](tensor)) for suffix, tensor in stored.tensors.items()}


def _words(start: int, stop: int) -> tuple[int, int]:
    """The words along N that hold rows start to stop."""
    return start // NIBBLES_PER_WORD, -(-stop // NIBBLES_PER_WORD)
