"""Carry out a plan: read each source byte once, write each output byte once, hash on the way.

What flows: a shard is cut into tasks, runs of pieces of a few megabytes. Workers take tasks, read the input slices
into their own scratch memory, make the output bytes in a buffer, and write that at its place in the pre-sized file.
The thread that owns the shard takes the buffers back in file order, feeds them to the shard's sha256 and returns them
to the pool. Who blocks whom: a worker waits only for a free buffer, so buffers bound the memory; the owner waits only
for the next task in order.

What survives a crash: a shard that is finished is hashed, flushed and noted in the journal; an unfinished one lies in
the staging folder, where nothing can open it as a model, and is written again.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from xpuquant.convert.journal import Finished
from xpuquant.convert.plan import Plan, Shard
from xpuquant.convert.source import Source
from xpuquant.errors import EnvironmentFault
from xpuquant.formats.checkpoint import Array, as_array
from xpuquant.formats.layout import Piece

TASK_BYTES = 4 << 20
"""Output bytes per task, where pieces are small. Enough to hide the cost of a hand-over (tens of microseconds)."""

SPARE_BUFFERS = 6
"""Buffers beyond one per worker: made but not yet hashed. Measured, 4.4 GB on two cores: with 2 the workers and the
hashing thread wait for each other in turn, 6.5 s; with 6, 4.7 s."""

_WORKERS_PER_STREAM = 4
"""sha256 runs at about 2 GB/s per core and in file order, which feeds about this many workers; beyond, another shard
is written at the same time."""

Progress = Callable[[int], None]
"""Called with each number of output bytes written, from any thread."""


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
        for piece in tensor.pieces:
            if pending and size + piece.nbytes > TASK_BYTES:
                yield Task(offset, size, tuple(pending))
                offset += size
                pending, size = [], 0
            pending.append(piece)
            size += piece.nbytes
    if pending:
        yield Task(offset, size, tuple(pending))


class Staging(Protocol):
    """Where shards are made: a `Journal`, or a part of one."""

    @property
    def folder(self) -> Path:
        """Folder the files are written in."""
        ...

    def finish(self, shard: str, finished: Finished) -> None:
        """A shard is complete and closed."""
        ...


def execute(
    plan: Plan, source: Source, staging: Staging, jobs: int, done: dict[str, Finished], progress: Progress
) -> dict[str, Finished]:
    """Write every shard of the plan that is not done into the staging folder.

    Args:
        jobs: workers.
        done: finished shards of an earlier run; counted as progress at once.

    Returns:
        Shard name → sha256 and size, of all shards.

    Raises:
        EnvironmentFault: disk full, unreadable or unwritable files.
        DamagedError: the source changed or ended early.
    """
    finished = dict(done)
    waiting = [shard for shard in plan.shards if shard.name not in done]
    for shard in plan.shards:
        if shard.name in done:
            progress(shard.nbytes)
    streams = min(len(waiting), max(1, jobs // _WORKERS_PER_STREAM))
    with (
        ThreadPoolExecutor(jobs, "convert") as workers,
        ThreadPoolExecutor(max(1, streams), "shard") as owners,
    ):
        stop = threading.Event()

        def write(shard: Shard) -> tuple[str, Finished]:
            writer = _ShardWriter(shard, source, staging.folder / shard.name, workers, stop, progress)
            result = writer.run(max(1, jobs // max(1, streams)) + SPARE_BUFFERS)
            source.check_unchanged()
            staging.finish(shard.name, result)
            return shard.name, result

        running = [owners.submit(write, shard) for shard in waiting]
        try:
            for future in running:
                name, result = future.result()
                finished[name] = result
        except BaseException as error:
            stop.set()
            for future in running:
                future.cancel()
            raise _cause(running, error) from None
    return finished


class _Stopped(Exception):
    """A worker gave up because another had failed; never the error that is reported."""


def _cause(running: Sequence[Future[tuple[str, Finished]]], error: BaseException) -> BaseException:
    """The error that stopped the others, where `error` is only that of one that was stopped."""
    if not isinstance(error, _Stopped):
        return error
    errors = [future.exception() for future in running if not future.cancelled()]
    return next((other for other in errors if other is not None and not isinstance(other, _Stopped)), error)


class _ShardWriter:
    """Writes one shard; see the module's docstring for the order of things."""

    def __init__(
        self,
        shard: Shard,
        source: Source,
        path: Path,
        workers: ThreadPoolExecutor,
        stop: threading.Event,
        progress: Progress,
    ) -> None:
        self._shard = shard
        self._source = source
        self._path = path
        self._workers = workers
        self._stop = stop
        self._progress = progress
        self._scratch = threading.local()
        self._fd = -1

    def run(self, buffers: int) -> Finished:
        """Write and hash the shard with at most `buffers` output buffers."""
        shard = self._shard
        digest = hashlib.sha256(shard.header)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(self._fd, shard.nbytes)
                _write(self._fd, memoryview(shard.header), 0)
                self._progress(len(shard.header))
                self._stream(digest, buffers)
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
        except OSError as error:
            raise EnvironmentFault(f"{self._path}: cannot be written ({error.strerror})") from error
        return Finished(digest.hexdigest(), shard.nbytes)

    def _stream(self, digest: hashlib._Hash, buffers: int) -> None:
        free: queue.SimpleQueue[Array] = queue.SimpleQueue()
        for _ in range(buffers):
            free.put(np.empty(0, np.uint8))
        pending: list[Future[tuple[Array, int]]] = []
        coming = tasks(self._shard)
        try:
            for task in coming:
                if len(pending) == buffers:
                    free.put(self._collect(digest, pending.pop(0)))
                pending.append(self._workers.submit(self._run, task, free.get()))
            for future in pending:
                self._collect(digest, future)
        except BaseException:
            self._stop.set()
            # Workers still hold the descriptor that is about to be closed.
            for future in pending:
                if not future.cancel():
                    future.exception()
            raise

    def _collect(self, digest: hashlib._Hash, future: Future[tuple[Array, int]]) -> Array:
        buffer, nbytes = future.result()
        digest.update(buffer.data[:nbytes])
        self._progress(nbytes)
        return buffer

    def _run(self, task: Task, buffer: Array) -> tuple[Array, int]:
        if self._stop.is_set():
            raise _Stopped
        if buffer.size < task.nbytes:
            buffer = np.empty(task.nbytes, np.uint8)
        position = 0
        for piece in task.pieces:
            self._fill(piece, buffer[position : position + piece.nbytes])
            position += piece.nbytes
        _write(self._fd, buffer.data[: task.nbytes], task.offset)
        return buffer, task.nbytes

    def _fill(self, piece: Piece, out: Array) -> None:
        if piece.make is None:
            self._source.read_into(piece.inputs[0], out)
            return
        arrays = read_parts(self._source, piece, self._scratch)
        piece.make(arrays, out)


def read_parts(source: Source, piece: Piece, scratch: threading.local) -> Sequence[Array]:
    """A piece's inputs as arrays, in memory that the calling thread reuses from piece to piece."""
    # Each input starts on a 64-byte boundary, so that wide loads are aligned.
    sizes = [-(-part.nbytes // 64) * 64 for part in piece.inputs]
    memory: Array | None = getattr(scratch, "memory", None)
    if memory is None or memory.size < sum(sizes):
        memory = np.empty(sum(sizes), np.uint8)
        scratch.memory = memory
    arrays: list[Array] = []
    position = 0
    for part, size in zip(piece.inputs, sizes, strict=True):
        view = memory[position : position + part.nbytes]
        source.read_into(part, view)
        arrays.append(as_array(part, view))
        position += size
    return arrays


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written
