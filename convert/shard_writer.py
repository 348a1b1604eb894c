"""One shard of the output: made, hashed and written by the thread that owns it, others making ahead if there are any.

What flows: the owner takes the shard's tasks in file order. Each is read and made in memory that stays in the cache,
goes into the shard's sha256 and to its place in the pre-sized file. That is all one thread does, for sha256 knows no
other order and the system lets one writer at a time into a file; more threads write more shards. Where fewer shards are
left than there are jobs, idle threads make tasks ahead. Who blocks whom: the owner waits only for the next task; a
thread that makes ahead waits for nobody. The number of tasks ahead bounds the memory.

The kernel is told to begin writing the pages out as they come, so that the flush before publishing finds little left.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path

import numpy as np

from xpuquant.convert.journal import Finished
from xpuquant.convert.plan import Shard
from xpuquant.convert.source import Source
from xpuquant.convert.tasks import Task, tasks
from xpuquant.errors import EnvironmentFault
from xpuquant.formats.checkpoint import Array, as_array
from xpuquant.formats.layout import Piece

Progress = Callable[[int], None]
"""Called with each number of output bytes written, from any thread."""

AHEAD = 3
"""Tasks of a shard that are made ahead at most: sha256 runs at about 2 GB/s, and no layout is made slower than at a
third of that."""

_WRITE_BYTES = 128 << 10
"""Handed to the kernel at once. It makes page-cache folios as large as the write; where memory is full of cached files,
as it is in the middle of a large conversion, it moves pages about to make larger ones. Measured, 4.4 GB: 3.1 s; with
1 MiB 5.4 s."""

_FLUSH_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


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

    def submit(self, make: Callable[[], Array]) -> Future[Array] | None:
        """Make something ahead, if a slot is free."""
        if not self._slots.acquire(blocking=False):
            return None
        future = self._pool.submit(make)
        future.add_done_callback(lambda _: self._slots.release())
        return future


class ShardWriter:
    """Writes one shard; see the module's docstring for the order of things."""

    def __init__(
        self, shard: Shard, source: Source, path: Path, workers: Workers, progress: Progress
    ) -> None:
        self._shard = shard
        self._source = source
        self._path = path
        self._workers = workers
        self._progress = progress
        self._ahead: deque[tuple[Task, Future[Array]]] = deque()
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
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(fd, shard.nbytes)
                _write(fd, memoryview(shard.header), 0)
                self._progress(len(shard.header))
                flushed = 0
                for task, made in self._made():
                    digest.update(made.data)
                    _write(fd, made.data, task.offset)
                    self._progress(task.nbytes)
                    if task.offset - flushed >= _FLUSH_BYTES:
                        _begin_flush(fd, flushed, task.offset - flushed)
                        flushed = task.offset
            finally:
                os.close(fd)
        except OSError as error:
            raise EnvironmentFault(f"{self._path}: cannot be written ({error.strerror})") from error
        return Finished(digest.hexdigest(), shard.nbytes)

    def _made(self) -> Iterator[tuple[Task, Array]]:
        """The tasks in file order, each with its bytes, which are good until the next is asked for."""
        coming = tasks(self._shard)
        following = next(coming, None)
        try:
            while following is not None or self._ahead:
                while following is not None and len(self._ahead) < AHEAD:
                    future = self._workers.submit(partial(self._make, following))
                    if future is None:
                        break
                    self._ahead.append((following, future))
                    following = next(coming, None)
                if self._ahead:
                    task, future = self._ahead.popleft()
                    made = future.result()
                else:
                    assert following is not None
                    task, made = following, self._make(following)
                    following = next(coming, None)
                yield task, made[: task.nbytes]
                self._spare.append(made)
        finally:
            for _, future in self._ahead:
                future.cancel()

    def _make(self, task: Task) -> Array:
        """A task's bytes, at the beginning of memory that is used again."""
        if self._workers.stop.is_set():
            raise Stopped
        try:
            out = self._spare.pop()
        except IndexError:
            out = np.empty(0, np.uint8)
        if out.size < task.nbytes:
            out = np.empty(task.nbytes, np.uint8)
        position = 0
        for piece in task.pieces:
            part = out[position : position + piece.nbytes]
            if piece.make is None:
                self._source.read_into(piece.inputs[0], part)
            else:
                piece.make(self._read(piece), part)
            position += piece.nbytes
        return out

    def _read(self, piece: Piece) -> Sequence[Array]:
        """A piece's inputs as arrays, in memory that the calling thread uses again from piece to piece."""
        # Each input starts on a 64-byte boundary, so that wide loads are aligned.
        sizes = [-(-part.nbytes // 64) * 64 for part in piece.inputs]
        memory: Array | None = getattr(self._scratch, "memory", None)
        if memory is None or memory.size < sum(sizes):
            memory = self._scratch.memory = np.empty(sum(sizes), np.uint8)
        arrays: list[Array] = []
        position = 0
        for part, size in zip(piece.inputs, sizes, strict=True):
            view = memory[position : position + part.nbytes]
            self._source.read_into(part, view)
            arrays.append(as_array(part, view))
            position += size
        return arrays


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data[:_WRITE_BYTES], offset)
        data = data[written:]
        offset += written


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """Linux's call, or None where there is none."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def _begin_flush(fd: int, offset: int, nbytes: int) -> None:
    """Let the system begin to write these bytes out. A hint: errors show at the flush that waits."""
    if (function := _sync_file_range()) is not None:
        function(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)
