"""Chunks of a shard made by idle threads, ahead of the thread that hashes and writes them.

Who waits for whom: the owner of the shard waits for the next chunk; a thread that makes ahead waits when four chunks of
its task are there to be taken. Chunks are made in memory that was used before, which is still in the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from queue import SimpleQueue

from xpuquant.formats.checkpoint import Array
from xpuquant.formats.layouts.base import Piece

Task = tuple[Piece, ...]
"""Consecutive pieces of a shard that one thread makes; see `shard_writer.py`."""

TASKS_AHEAD = 4
"""Tasks of a shard that are made ahead at most: sha256 runs at about 2 GB/s, and no layout is made slower than at a
third of that."""

TASKS_AT_ONCE = 2
"""Tasks that one thread takes: it makes the second while the owner hashes the end of the first."""

_CHUNKS_AHEAD = 4


class Stopped(Exception):
    """A worker gave up because another had failed; never the error that is reported."""


class ChunkQueue:
    """One task's chunks, on their way from the thread that makes them to the thread that writes them."""

    def __init__(self) -> None:
        self._made: SimpleQueue[Array | BaseException | None] = SimpleQueue()
        self._room = threading.Semaphore(_CHUNKS_AHEAD)
        self._stopped = False

    def fill(self, chunks: Iterator[Array]) -> None:
        """Make all chunks, in the calling thread. Errors are raised where the chunks are taken."""
        try:
            while True:
                self._room.acquire()
                if self._stopped:
                    return
                chunk = next(chunks, None)
                self._made.put(chunk)
                if chunk is None:
                    return
        except BaseException as error:
            self._made.put(error)

    def take(self) -> Iterator[Array]:
        """The chunks in order; each is good until the next is asked for."""
        while (chunk := self._made.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk
            self._room.release()

    def stop(self) -> None:
        """Nobody will take what is left."""
        self._stopped = True
        self._room.release()


class Workers:
    """As many threads at work as there are jobs: each owner of a shard holds a slot, and so does each thread that makes
    ahead.

    stop  set when one of them has failed: the others give up
    """

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

    def make_ahead(self, coming: Iterator[Task], make: Callable[[Task], Iterator[Array]]) -> list[ChunkQueue]:
        """Let an idle thread make the next tasks. Returns a queue for each; none if no thread is idle, or no task left.

        Args:
            make: makes a task's chunks, in the thread that iterates.
        """
        if not self._slots.acquire(blocking=False):
            return []
        taken = [(ChunkQueue(), task) for task in islice(coming, TASKS_AT_ONCE)]
        if not taken:
            self._slots.release()
            return []

        def run() -> None:
            try:
                for queue, task in taken:
                    queue.fill(make(task))
            finally:
                self._slots.release()

        self._pool.submit(run)
        return [queue for queue, _ in taken]
