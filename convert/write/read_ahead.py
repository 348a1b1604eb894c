"""Parts of a shard made by idle threads, ahead of the thread that hashes and writes them.

Who blocks whom: the owner of the shard waits for the next part; a thread that makes ahead waits when four parts of its
task are waiting to be taken. Parts are made in memory that was taken before, which is still in the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from queue import SimpleQueue

from xpuquant.conversion.write.tasks import Task
from xpuquant.formats.checkpoint import Array

AHEAD = 4
"""Tasks of a shard that are made ahead at most: sha256 runs at about 2 GB/s, and no layout is made slower than at a
third of that."""

BATCH = 2
"""Tasks that one thread takes at once: it makes the second while the owner hashes the end of the first."""

_PARTS = 4


class Stopped(Exception):
    """A worker gave up because another had failed; never the error that is reported."""


class Ahead:
    """One task's parts on their way from the thread that makes them to the one that takes them."""

    def __init__(self) -> None:
        self._made: SimpleQueue[Array | BaseException | None] = SimpleQueue()
        self._room = threading.Semaphore(_PARTS)
        self._stopped = False

    def make(self, parts: Iterator[Array]) -> None:
        """Make all parts, in the calling thread. Errors are raised where the parts are taken."""
        try:
            while True:
                self._room.acquire()
                if self._stopped:
                    return
                part = next(parts, None)
                self._made.put(part)
                if part is None:
                    return
        except BaseException as error:
            self._made.put(error)

    def take(self) -> Iterator[Array]:
        """The parts in order; each is good until the next is asked for."""
        while (part := self._made.get()) is not None:
            if isinstance(part, BaseException):
                raise part
            yield part
            self._room.release()

    def stop(self) -> None:
        """Nobody will take what is left."""
        self._stopped = True
        self._room.release()


class Workers:
    """As many threads at work as there are jobs: the owner of a shard holds a slot, so does one that makes ahead."""

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

    def make_ahead(self, coming: Iterator[Task], parts: Callable[[Task], Iterator[Array]]) -> list[Ahead]:
        """Let a thread make the next tasks, if a slot is free; otherwise, or where there are none, nothing."""
        if not self._slots.acquire(blocking=False):
            return []
        batch = [(Ahead(), task) for task in islice(coming, BATCH)]
        if not batch:
            self._slots.release()
            return []

        def run() -> None:
            try:
                for ahead, task in batch:
                    ahead.make(parts(task))
            finally:
                self._slots.release()

        self._pool.submit(run)
        return [ahead for ahead, _ in batch]
