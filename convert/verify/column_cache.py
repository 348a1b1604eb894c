"""Reads of columns, served from memory.

Decoding by rows asks for columns of whatever the output stores the other way round (scales `[K/g, N]`, fp8 experts
`[K, N]`): thousands of short runs of bytes, again for every block of rows. Read a wide run of columns once instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xpuquant.formats.checkpoint import Array, Slice
from xpuquant.formats.safetensors import Tensor

COLUMN_BYTES = 8 << 20
"""Of one tensor. A module has at most three tensors that are read by columns, so this bounds a worker's memory."""

_SMALL_BYTES = 1 << 17
"""Whole tensors up to this size (a g_idx, block scales) are asked for with every block of rows, and kept too."""

_MOST_TENSORS = 4


class ColumnCache:
    """Loads slices like the function it wraps. Not thread-safe: one for each module that is being checked."""

    def __init__(self, load: Callable[[Slice], Array]) -> None:
        self._load = load
        self._columns_of: dict[Tensor, tuple[int, int, Array]] = {}
        self._whole: dict[Tensor, Array] = {}

    def __call__(self, part: Slice) -> Array:
        if part.axis == 1:
            return self._read_columns(part)
        if part.nbytes > _SMALL_BYTES or part.shape != part.tensor.shape:
            return self._load(part)
        if part.tensor not in self._whole:
            self._make_room(self._whole)
            self._whole[part.tensor] = self._load(part)
        return self._whole[part.tensor]

    def _read_columns(self, part: Slice) -> Array:
        tensor, columns = part.tensor, part.tensor.shape[-1]
        held = self._columns_of.get(tensor)
        if held is None or not (held[0] <= part.start and part.stop <= held[1]):
            self._make_room(self._columns_of)
            # A tensor that fits is read in one run; a wider one from here on.
            fits = tensor.nbytes <= COLUMN_BYTES
            start = 0 if fits else part.start
            width = max(part.stop - start, COLUMN_BYTES * columns // max(tensor.nbytes, 1))
            stop = min(start + width, columns)
            held = start, stop, self._load(Slice(tensor, start, stop, axis=1))
            self._columns_of[tensor] = held
        first, _, array = held
        return array[:, part.start - first : part.stop - first]

    @staticmethod
    def _make_room(kept: dict[Tensor, Any]) -> None:
        if len(kept) >= _MOST_TENSORS:
            del kept[next(iter(kept))]
