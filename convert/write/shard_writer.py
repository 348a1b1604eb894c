"""One shard of the output: made, hashed and written by the thread that owns it, others making ahead if there are any.

What flows: the owner takes the shard's tasks in file order. Each is read, and made part by part in memory that stays in
the cache; each part goes into the shard's sha256 and into its file. That is all one thread does, for sha256 knows no
other order; more threads write more shards. Where fewer shards are left than there are jobs, idle threads make tasks
ahead (`ahead.py`), and the owner waits only for them, and for the disk.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.write.output_files import create
from xpuquant.conversion.write.read_ahead import AHEAD, BATCH, Ahead, Stopped, Workers
from xpuquant.conversion.write.tasks import TASK_BYTES, Task, tasks
from xpuquant.errors import EnvironmentFault
from xpuquant.formats.checkpoint import Array, as_array
from xpuquant.formats.layouts.base import Piece


class ShardWriter:
    """Writes one shard; see the module's docstring for the order of things."""

    def __init__(
        self,
        shard: Shard,
        source: Source,
        path: Path,
        workers: Workers,
        progress: Progress,
        read_again: bool = True,
    ) -> None:
        self._shard = shard
        self._source = source
        self._path = path
        self._workers = workers
        self._progress = progress
        self._read_again = read_again
        self._ahead: deque[Ahead] = deque()
        self._taken: deque[Array] = deque()
        self._scratch = threading.local()

    def run(self) -> Finished:
        """Write and hash the shard, in the calling thread, which holds a slot.

        Raises:
            EnvironmentFault: it cannot be written. DamagedError: the source ended early. Stopped: another failed.
        """
        shard = self._shard
        digest = hashlib.sha256(shard.header)
        try:
            with create(self._path, shard.nbytes, self._read_again) as file:
                file.append(np.frombuffer(shard.header, np.uint8))
                self._progress(len(shard.header))
                for made in self._made():
                    digest.update(made.data)
                    file.append(made)
                    self._progress(made.size)
        except OSError as error:
            raise EnvironmentFault(f"{self._path}: cannot be written ({error.strerror})") from error
        return Finished(digest.hexdigest(), shard.nbytes)

    def _made(self) -> Iterator[Array]:
        """The shard's bytes after the header, in file order; each array is good until the next is asked for."""
        coming = tasks(self._shard)
        try:
            while True:
                while len(self._ahead) <= AHEAD - BATCH:
                    batch = self._workers.make_ahead(coming, partial(self._make, self._memory_taken_before))
                    self._ahead.extend(batch)
                    if not batch:
                        break
                if self._ahead:
                    for made in self._ahead[0].take():
                        yield made
                        self._taken.append(made)
                    self._ahead.popleft()
                elif (following := next(coming, None)) is not None:
                    yield from self._make(partial(self._memory, "out"), following)
                else:
                    return
        finally:
            for ahead in self._ahead:
                ahead.stop()

    def _make(self, memory: Callable[[int], Array], task: Task) -> Iterator[Array]:
        """A task's bytes: short pieces together, a long one part after part, in memory that stays in the cache."""
        if len(task.pieces) > 1:
            out = memory(task.nbytes)
            position = 0
            for piece in task.pieces:
                self._fill(piece, self._read(piece), out[position : position + piece.nbytes])
                position += piece.nbytes
            yield out
            return
        for part, arrays in self._parts(task.pieces[0]):
            out = memory(part.nbytes)
            self._fill(part, arrays, out)
            yield out

    def _parts(self, piece: Piece) -> Iterator[tuple[Piece, Sequence[Array]]]:
        """A piece in parts that stay in the cache, with their inputs, which are read at one go."""
        arrays = self._read(piece)
        for part in piece.cut(TASK_BYTES):
            if part is piece:
                yield piece, arrays
            else:
                both = zip(part.inputs, piece.inputs, arrays, strict=True)
                yield part, [inner.inside(outer, array) for inner, outer, array in both]

    def _fill(self, piece: Piece, arrays: Sequence[Array], out: Array) -> None:
        if self._workers.stop.is_set():
            raise Stopped
        if piece.filler is None:
            self._source.read_into(piece.inputs[0], out)
        else:
            piece.fill(arrays, out)

    def _read(self, piece: Piece) -> Sequence[Array]:
        """A piece's inputs as arrays, in memory that the calling thread uses again from piece to piece; none for a
        copy, which is read into its place."""
        if piece.filler is None:
            return ()
        # Each input starts on a 64-byte boundary, so that wide loads are aligned.
        sizes = [-(-part.nbytes // 64) * 64 for part in piece.inputs]
        memory = self._memory("inputs", sum(sizes))
        arrays: list[Array] = []
        position = 0
        for part, size in zip(piece.inputs, sizes, strict=True):
            view = memory[position : position + part.nbytes]
            self._source.read_into(part, view)
            arrays.append(as_array(part, view))
            position += size
        return arrays

    def _memory(self, use: str, nbytes: int) -> Array:
        """Memory of the calling thread for one use, the same each time."""
        memory: Array | None = getattr(self._scratch, use, None)
        if memory is None or memory.size < nbytes:
            memory = np.empty(nbytes, np.uint8)
            setattr(self._scratch, use, memory)
        return memory[:nbytes]

    def _memory_taken_before(self, nbytes: int) -> Array:
        """Memory of a part made ahead that has been hashed and written."""
        try:
            memory: Array | None = self._taken.pop().base
        except IndexError:
            memory = None
        if memory is None or memory.size < nbytes:
            memory = np.empty(max(nbytes, TASK_BYTES), np.uint8)
        return memory[:nbytes]
