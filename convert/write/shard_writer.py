"""One shard of the output: made, hashed and written by the thread that owns it, others making ahead if there are any.

What flows: the owner takes the shard's tasks in file order. A task is made chunk by chunk; each chunk goes into the
shard's sha256 and into its file. Now and then the owner notes how far it has come, and begins where an earlier run had
come to (`resumption.py`). One thread does this, because sha256 knows no other order; more threads write more
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

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.journal import Finished, Reached
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write.arrivals import Arrivals
from xpuquant.conversion.write.output_files import create
from xpuquant.conversion.write.read_ahead import TASKS_AHEAD, TASKS_AT_ONCE, ChunkQueue, Stopped, Task, Workers
from xpuquant.conversion.write.resumption import Steps, kept_prefix
from xpuquant.errors import EnvironmentFault
from xpuquant.formats.checkpoint import Array, Slice, as_array, as_bytes
from xpuquant.formats.layouts.base import Piece

CHUNK_BYTES = 1 << 20
"""Half of a second-level cache: what was read for a chunk is still there when the chunk has been written."""

_TOLD_BYTES = 8 << 20
"""Between two times that whoever reads a shard meanwhile is told how far it has come."""

_ALIGNMENT = 64
"""Of each input in memory, so that wide loads are aligned."""


def tasks(shard: Shard, begin: int = 0) -> Iterator[Task]:
    """Cut a shard's data into tasks, in file order.

    Args:
        begin: byte of the file at which the first of them begins, which is the end of the header or of a piece.
    """
    gathered: list[Piece] = []
    nbytes = 0
    end = len(shard.header)
    for tensor in shard.tensors:
        for piece in tensor.pieces:
            end += piece.nbytes
            if end <= begin:
                continue
            if gathered and nbytes + piece.nbytes > CHUNK_BYTES:
                yield tuple(gathered)
                gathered, nbytes = [], 0
            gathered.append(piece)
            nbytes += piece.nbytes
    if gathered:
        yield tuple(gathered)


class ShardStore(Protocol):
    """Where shards are made and noted: the staging folder of a conversion, as a whole or as one part sees it."""

    @property
    def files(self) -> Tree:
        """Folder the files are written in."""
        ...

    def finish(self, shard: str, finished: Finished) -> None:
        """A shard is complete and closed."""
        ...

    def reached(self, shard: str) -> Sequence[Reached]:
        """How far earlier runs came with a shard, as they noted it; to be hashed before it is believed."""
        ...

    def note_reached(self, shard: str, reached: Reached) -> None:
        """A shard has come so far, and the system has all of it."""
        ...

    def keep(self, shard: str, nbytes: int) -> None:
        """So much of an earlier run's unfinished shard is sound, and is not made again."""
        ...


class ShardWriter:
    """Writes one shard; see the module's docstring for the order of things."""

    def __init__(
        self,
        shard: Shard,
        source: Source,
        store: ShardStore,
        workers: Workers,
        progress: Progress,
        read_again: bool = True,
        arrivals: Arrivals | None = None,
    ) -> None:
        self._shard = shard
        self._source = source
        self._store = store
        self._workers = workers
        self._progress = progress
        self._read_again = read_again
        self._arrivals = arrivals
        self._ahead: deque[ChunkQueue] = deque()
        self._taken: deque[Array] = deque()
        self._memory = threading.local()

    def run(self) -> Finished:
        """Write and hash the shard, in the calling thread, which holds a slot.

        Raises:
            EnvironmentFault: it cannot be written. DamagedError: the source ended early. Stopped: another failed.
        """
        shard, store = self._shard, self._store
        try:
            made = kept_prefix(store.files, shard, store.reached(shard.name))
            if made.nbytes:
                store.keep(shard.name, made.nbytes)
                self._progress(made.nbytes)
            steps, told = Steps(shard, made.nbytes), 0
            with create(store.files, shard.name, shard.nbytes, self._read_again, made.nbytes) as file:
                if self._arrivals is not None:
                    self._arrivals.tell(shard.name, 0)
                for chunk in self._bytes_from(made.nbytes):
                    made.update(chunk.data)
                    file.append(chunk)
                    for reached in steps.passed(made, file):
                        store.note_reached(shard.name, reached)
                    if self._arrivals is not None and file.handed - told >= _TOLD_BYTES:
                        told = file.handed
                        self._arrivals.tell(shard.name, told)
                    self._progress(chunk.size)
        except OSError as error:
            raise EnvironmentFault(f"{store.files.path / shard.name}: cannot be written ({error.strerror})") from error
        return Finished(made.digest.hexdigest(), shard.nbytes)

    def _bytes_from(self, begin: int) -> Iterator[Array]:
        """The shard from a byte on, in file order; each array is good until the next is asked for."""
        header = self._shard.header
        if begin < len(header):
            yield np.frombuffer(header, np.uint8)
        yield from self._chunks(tasks(self._shard, begin))

    def _chunks(self, coming: Iterator[Task]) -> Iterator[Array]:
        """The bytes of tasks, in their order; each array is good until the next is asked for."""
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
