"""One shard of the output: made, hashed and written by the thread that owns it, others making ahead if there are any.

What flows: the owner takes the shard's tasks in file order. Each is read, and made part by part in memory that stays in
the cache; each part goes into the shard's sha256 and into its file. That is all one thread does, for sha256 knows no
other order; more threads write more shards. Where fewer shards are left than there are jobs, idle threads make tasks
ahead. Who blocks whom: the owner waits only for the next task, and for the disk; a thread that makes ahead waits for
nobody. The number of tasks ahead bounds the memory.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from xpuquant.convert.journal import Finished
from xpuquant.convert.plan import Shard
from xpuquant.convert.shard_file import create
from xpuquant.convert.source import Source
from xpuquant.convert.tasks import TASK_BYTES, Task, tasks
from xpuquant.errors import EnvironmentFault
from xpuquant.formats.checkpoint import Array, as_array
from xpuquant.formats.layout import Piece

Progress = Callable[[int], None]
"""Called with each number of output bytes written, from any thread."""

AHEAD = 4
"""Tasks of a shard that are made ahead at most: sha256 runs at about 2 GB/s, and no layout is made slower than at a
third of that."""

_BATCH = 2
"""Tasks that one thread makes ahead, one after the other: it makes the second while the owner hashes the first."""


Made = tuple[Task, Future[Array]]
"""A task, and its bytes at the beginning of an array, once they are made."""


class Stopped(Exception):
    """A worker gave up because another had failed; never the error that is reported."""


class Workers:
    """As many threads at work as there are jobs: the owner of a shard holds a slot, and so does a task made ahead."""

    def __init__(self, jobs: int) -> None:
        self._slots = threading.Semaphore(jobs)
        self._pool = ThreadPoolExecutor(jobs, "ahead")
        self.stop = threading.Event()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def slot(self) -> AbstractContextManager[object]:
        """For the owner of a shard; waits for a free one."""
        return self._slots

    def make_ahead(self, coming: Iterator[Task], make: Callable[[Task], Array]) -> list[Made]:
        """Let a thread make the next tasks, if a slot is free; nothing otherwise."""
        if not self._slots.acquire(blocking=False):
            return []
        batch: list[Made] = [(task, Future()) for task in islice(coming, _BATCH)]

        def run() -> None:
            try:
                for task, future in batch:
                    if future.set_running_or_notify_cancel():
                        _settle(future, partial(make, task))
            finally:
                self._slots.release()

        self._pool.submit(run)
        return batch


def _settle(future: Future[Array], make: Callable[[], Array]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)


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
        self._ahead: deque[Made] = deque()
        self._spare: deque[Array] = deque()
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
                while len(self._ahead) <= AHEAD - _BATCH:
                    batch = self._workers.make_ahead(coming, self._make)
                    self._ahead.extend(batch)
                    if not batch:
                        break
                if self._ahead:
                    task, future = self._ahead.popleft()
                    made = future.result()
                    yield made[: task.nbytes]
                    self._spare.append(made)
                elif (following := next(coming, None)) is not None:
                    yield from self._make_in_parts(following)
                else:
                    return
        finally:
            for _, future in self._ahead:
                future.cancel()

    def _make(self, task: Task) -> Array:
        """A task's bytes, at the beginning of memory that is used again."""
        try:
            out = self._spare.pop()
        except IndexError:
            out = np.empty(0, np.uint8)
        if out.size < task.nbytes:
            out = np.empty(task.nbytes, np.uint8)
        position = 0
        for piece in task.pieces:
            for part, arrays in self._parts(piece):
                self._fill(part, arrays, out[position : position + part.nbytes])
                position += part.nbytes
        return out

    def _make_in_parts(self, task: Task) -> Iterator[Array]:
        """The same bytes, part after part of a long piece in the same memory, which stays in the cache."""
        if len(task.pieces) > 1:
            out = self._make(task)
            yield out[: task.nbytes]
            self._spare.append(out)
            return
        for part, arrays in self._parts(task.pieces[0]):
            out = self._memory("out", part.nbytes)
            self._fill(part, arrays, out)
            yield out

    def _parts(self, piece: Piece) -> Iterator[tuple[Piece, Sequence[Array]]]:
        """A piece in parts that stay in the cache, with their inputs, which are read at one go."""
        arrays = self._read(piece) if piece.make is not None else ()
        for part in piece.cut(TASK_BYTES):
            if self._workers.stop.is_set():
                raise Stopped
            whole = part is piece
            yield (
                part,
                arrays
                if whole
                else [
                    inner.inside(outer, array)
                    for inner, outer, array in zip(part.inputs, piece.inputs, arrays, strict=True)
                ],
            )

    def _fill(self, piece: Piece, arrays: Sequence[Array], out: Array) -> None:
        if piece.make is None:
            self._source.read_into(piece.inputs[0], out)
        else:
            piece.make(arrays, out)

    def _read(self, piece: Piece) -> Sequence[Array]:
        """A piece's inputs as arrays, in memory that the calling thread uses again from piece to piece."""
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
