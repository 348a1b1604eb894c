"""A shard cut into tasks: what is read, made, hashed and written at one go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xpuquant.conversion.plan.shards import Shard
from xpuquant.formats.checkpoint import Slice, as_bytes
from xpuquant.formats.layouts.base import Piece

TASK_BYTES = 1 << 20
"""Output bytes per task, where pieces do not ask for more: what is read is still in the second-level cache when it is
hashed and written."""


@dataclass(frozen=True)
class Task:
    """Consecutive pieces of a shard, `nbytes` from `offset` on."""

    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]


def tasks(shard: Shard) -> Iterator[Task]:
    """Cut a shard's data into tasks, in file order."""
    offset = len(shard.header)
    pending: list[Piece] = []
    size = 0
    for tensor in shard.tensors:
        for planned in tensor.pieces:
            for piece in _cut(planned):
                if pending and size + piece.nbytes > TASK_BYTES:
                    yield Task(offset, size, tuple(pending))
                    offset += size
                    pending, size = [], 0
                pending.append(piece)
                size += piece.nbytes
    if pending:
        yield Task(offset, size, tuple(pending))


def _cut(piece: Piece) -> Iterator[Piece]:
    """A long verbatim copy as several; others are one."""
    if piece.filler is not None or piece.nbytes <= TASK_BYTES or len(runs := piece.inputs[0].runs()) > 1:
        yield piece
        return
    tensor = as_bytes(piece.inputs[0].tensor)
    first = runs[0][0] - tensor.begin
    for start in range(0, piece.nbytes, TASK_BYTES):
        stop = min(start + TASK_BYTES, piece.nbytes)
        yield Piece((Slice(tensor, first + start, first + stop),), stop - start)
