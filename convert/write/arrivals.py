"""Which bytes of the shards under way are on the disk: told by the threads that write, waited for by those that check.

A module is checked as soon as all of it has been written, while what follows in its shard is still being made. Whoever
waits may read what has arrived, and nothing behind it. Where more is there than can be checked, those that write wait:
what is not checked yet has to stay in memory.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from xpuquant.conversion.write.read_ahead import Stopped

_QUEUED_BYTES = 64 << 20
"""That have arrived, and nobody has begun to check: a few modules, so that those that check find the next one there."""


class Arrivals:
    """How far each shard has come. Thread-safe.

    cause  why all was stopped; None where it was not
    """

    def __init__(self) -> None:
        self.cause: BaseException | None = None
        self._reached: dict[str, int] = {}
        self._told: list[str] = []
        self._awaited: dict[str, int] = {}
        self._queued = self._readers = 0
        lock = threading.Lock()
        self._changed, self._room = threading.Condition(lock), threading.Condition(lock)
        self._stopped = False

    def tell(self, shard: str, nbytes: int) -> None:
        """The system has the first bytes of a shard, so many; none of them, when it has been opened. Waits while too
        many are to be checked.

        Raises:
            Stopped: nobody waits any more, because a check could not be made.
        """
        with self._changed:
            if self._stopped:
                raise Stopped
            before = self._reached.get(shard, -1)
            if nbytes > before:
                self._reached[shard] = nbytes
                self._told.append(shard)
                # Whom it helps is woken, and nobody else: one who wakes takes a core, and the interpreter's lock next.
                if before < 0 or self._awaited.get(shard, nbytes + 1) <= nbytes:
                    self._awaited.pop(shard, None)
                    self._changed.notify_all()
            # Who reads what has not arrived keeps others from being checked, and waits for those that write.
            while self._queued > _QUEUED_BYTES and not self._readers and not self._stopped:
                self._room.wait()
            if self._stopped:
                raise Stopped

    def queued(self, nbytes: int) -> None:
        """So many bytes are to be checked; or, below 0, somebody has begun to."""
        with self._changed:
            self._queued += nbytes
            self._room.notify_all()

    def stop(self, cause: BaseException) -> None:
        """Nothing more will come, or nobody wants it: whoever waits or tells gives up.

        Args:
            cause: the first that is given is kept; that somebody was stopped is none.
        """
        with self._changed:
            self._stopped = True
            if self.cause is None and not isinstance(cause, Stopped):
                self.cause = cause
            self._changed.notify_all()
            self._room.notify_all()

    def check(self) -> None:
        """Raises Stopped where all was stopped."""
        if self._stopped:
            raise Stopped

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """What fails in the block stops all."""
        try:
            yield
        except BaseException as error:
            self.stop(error)
            raise

    def wait(self, shard: str, nbytes: int) -> None:
        """Wait for so many bytes of a shard, counted from its front.

        Raises:
            Stopped: they will not come.
        """
        with self._changed:
            self._readers += 1
            try:
                while not self._stopped and self._reached.get(shard, 0) < nbytes:
                    self._await(shard, nbytes)
                    self._room.notify_all()
                    self._changed.wait()
            finally:
                self._readers -= 1
            if self._stopped:
                raise Stopped

    def _await(self, shard: str, nbytes: int) -> None:
        """Whoever holds the lock, and is about to wait, is to be woken when so many bytes are there."""
        self._awaited[shard] = min(nbytes, self._awaited.get(shard, nbytes))

    def wait_for_any(self) -> None:
        """Wait until a shard has been opened.

        Raises:
            Stopped: none will be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or bool(self._reached))
            if self._stopped:
                raise Stopped

    def in_turn(self, wanted: Sequence[Mapping[str, int]]) -> Iterator[int]:
        """The places in `wanted`, each as soon as its shards have come so far.

        Args:
            wanted: shard → bytes from its front.

        Raises:
            Stopped: they will not.
        """
        missing = [sum(end > 0 for end in ends.values()) for ends in wanted]
        waiting: dict[str, list[tuple[int, int]]] = {}
        for place, ends in enumerate(wanted):
            for shard, end in ends.items():
                if end > 0:
                    waiting.setdefault(shard, []).append((end, place))
        for ends_of in waiting.values():
            heapq.heapify(ends_of)
        yield from (place for place, ends in enumerate(missing) if not ends)
        seen, there = 0, dict.fromkeys(waiting, 0)
        while waiting:
            with self._changed:
                # Not all shards: there may be thousands, and each tells.
                for shard in there:
                    if shard in waiting:
                        self._await(shard, waiting[shard][0][0])
                while not self._stopped and len(self._told) == seen:
                    self._changed.wait()
                if self._stopped:
                    raise Stopped
                there = {shard: self._reached[shard] for shard in self._told[seen:] if shard in waiting}
                seen = len(self._told)
            for shard, reached in there.items():
                ends_of = waiting[shard]
                while ends_of and ends_of[0][0] <= reached:
                    _, place = heapq.heappop(ends_of)
                    missing[place] -= 1
                    if not missing[place]:
                        yield place
                if not ends_of:
                    del waiting[shard]
