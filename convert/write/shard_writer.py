"""One shard of the output: made, hashed and written by the thread that owns it, others making ahead if there are any.

What flows: the owner takes the shard's tasks in file order. A task is made chunk by chunk; each chunk goes into the
shard's sha256 and into its file. One thread does this, because sha256 knows no other order; more threads write more
shards. Where fewer shards are left than there are jobs, idle threads make tasks ahead (`read_ahead.py`), and the owner
waits only for them, and for the disk.

Three sizes, each for its own reason:

    piece   up to 32 MB of a tensor, cut by the plan: its inputs are read at one go, so that strips of a matrix do not
            become thousands of short reads
    chunk   about 1 MB of output, cut from a long piece or gathered from short ones: stays in the processor's cache
            from the moment it is made until it has been hashed and written
    task    the pieces of one chunk if they are short, or one long piece: what one thread makes at a time
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write.output_files import create
from xpuquant.conversion.write.read_ahead import TASKS_AHEAD, TASKS_AT_ONCE, ChunkQueue, Stopped, Task, Workers
from xpuquant.errors import EnvironmentFault
from xpuquant.formats.checkpoint import Array, Slice, as_array, as_bytes
from xpuquant.formats.layouts.base import Piece

CHUNK_BYTES = 1 << 20
"""Half of a second-level cache: what was read for a chunk is still there when the chunk has been written."""

_ALIGNMENT = 64
"""Of each input in memory, so that wide loads are aligned."""


def tasks(shard: Shard) -> Iterator[Task]:
    """Cut a shard's data into tasks, in file order."""
    gathered: list[Piece] = []
    nbytes = 0
    for tensor in shard.tensors:
        for piece in tensor.pieces:
            if gathered and nbytes + piece.nbytes > CHUNK_BYTES:
                yield tuple(gathered)
                gathered, nbytes = [], 0
            gathered.append(piece)
            nbytes += piece.nbytes
    if gathered:
        yield tuple(gathered)


class ShardWriter:
    """Writes one shard; see the module's docstring for the order of things."""

    def __init__(
        self,
        shard: Shard,
        source: Source,
        tree: Tree,
        workers: Workers,
        progress: Progress,
        read_again: bool = True,
    ) -> None:
        self._shard = shard
        self._source = source
        self._tree = tree
        self._workers = workers
        self._progress = progress
        self._read_again = read_again
        self._ahead: deque[ChunkQueue] = deque()
        self._taken: deque[Array] = deque()
        self._memory = threading.local()

    def run(self) -> Finished:
        """Write and hash the shard, in the calling thread, which holds a slot.

        Raises:
            EnvironmentFault: it cannot be written. DamagedError: the source ended early. Stopped: another failed.
        """
        shard = self._shard
        digest = hashlib.sha256(shard.header)
        try:
            with create(self._tree, shard.name, shard.nbytes, self._read_again) as file:
                file.append(np.frombuffer(shard.header, np.uint8))
                self._progress(len(shard.header))
                for chunk in self._chunks():
                    digest.update(chunk.data)
                    file.append(chunk)
                    self._progress(chunk.size)
        except OSError as error:
            raise EnvironmentFault(f"{self._tree.path / shard.name}: cannot be written ({error.strerror})") from error
        return Finished(digest.hexdigest(), shard.nbytes)

    def _chunks(self) -> Iterator[Array]:
        """The shard's bytes after the header, in file order; each array is good until the next is asked for."""
        coming = tasks(self._shard)
        try:
            while True:
                while len(self._ahead) <= TASKS_AHEAD - TASKS_AT_ONCE:
                    queues = self._workers.make_ahead(coming, partial(self._make, self._used_memory))
                    self._ahead.extend(queues)
                    if not queues:
                        break
                if self._ahead:
                    for chunk in self._ahead[0].take():
                        yield chunk
                        self._taken.append(chunk)
                    self._ahead.popleft()
                elif (task := next(coming, None)) is not None:
                    yield from self._make(partial(self._own_memory, "chunk"), task)
                else:
                    return
        finally:
            for queue in self._ahead:
                queue.stop()

    def _make(self, memory: Callable[[int], Array], task: Task) -> Iterator[Array]:
        """A task's chunks, in the calling thread.

        Args:
            memory: gives that many bytes to make a chunk in.
        """
        if len(task) > 1:
            chunk = memory(sum(piece.nbytes for piece in task))
            position = 0
            for piece in task:
                self._fill(piece, self._read(piece), chunk[position : position + piece.nbytes])
                position += piece.nbytes
            yield chunk
            return
        for piece, arrays in self._cut(task[0]):
            chunk = memory(piece.nbytes)
            self._fill(piece, arrays, chunk)
            yield chunk

    def _cut(self, piece: Piece) -> Iterator[tuple[Piece, Sequence[Array]]]:
        """A piece of any length as pieces of a chunk each, with their inputs, which are read at one go; those of a copy
        are read when it is filled."""
        if piece.filler is None:
            yield from ((copy, ()) for copy in _cut_copy(piece))
            return
        arrays = self._read(piece)
        for short in piece.cut(CHUNK_BYTES):
            inputs = zip(short.inputs, piece.inputs, arrays, strict=True)
            yield short, arrays if short is piece else [inner.inside(outer, array) for inner, outer, array in inputs]

    def _fill(self, piece: Piece, arrays: Sequence[Array], out: Array) -> None:
        if self._workers.stop.is_set():
            raise Stopped
        if piece.filler is None:
            self._source.read_into(piece.inputs[0], out)
        else:
            piece.fill(arrays, out)

    def _read(self, piece: Piece) -> Sequence[Array]:
        """A piece's inputs as arrays, in memory that the calling thread uses again for the next piece; none for a copy,
        which `_fill` reads into its place."""
        if piece.filler is None:
            return ()
        sizes = [-(-box.nbytes // _ALIGNMENT) * _ALIGNMENT for box in piece.inputs]
        memory = self._own_memory("inputs", sum(sizes))
        arrays: list[Array] = []
        position = 0
        for box, size in zip(piece.inputs, sizes, strict=True):
            data = memory[position : position + box.nbytes]
            self._source.read_into(box, data)
            arrays.append(as_array(box, data))
            position += size
        return arrays

    def _own_memory(self, use: str, nbytes: int) -> Array:
        """Memory of the calling thread for one use, the same each time."""
        memory: Array | None = getattr(self._memory, use, None)
        if memory is None or memory.size < nbytes:
            memory = np.empty(nbytes, np.uint8)
            setattr(self._memory, use, memory)
        return memory[:nbytes]

    def _used_memory(self, nbytes: int) -> Array:
        """Memory of a chunk that was made ahead and has been written; new memory where there is none."""
        try:
            memory: Array | None = self._taken.pop().base
        except IndexError:
            memory = None
        if memory is None or memory.size < nbytes:
            memory = np.empty(max(nbytes, CHUNK_BYTES), np.uint8)
        return memory[:nbytes]


def _cut_copy(piece: Piece) -> Iterator[Piece]:
    """A verbatim copy as several of a chunk each; one that is not a single run of bytes stays whole."""
    (box,) = piece.inputs
    if piece.nbytes <= CHUNK_BYTES or len(runs := box.runs()) > 1:
        yield piece
        return
    tensor = as_bytes(box.tensor)
    first = runs[0][0] - tensor.begin
    for start in range(0, piece.nbytes, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, piece.nbytes)
        yield Piece((Slice(tensor, first + start, first + stop),), stop - start)
