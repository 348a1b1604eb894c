"""Which bytes of the shards under way are on the disk: told by the threads that write, waited for by those that check.

A module is checked as soon as all of it has been written, while what follows in its shard is still being made. Whoever
waits may read what has arrived, and nothing behind it.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator, Mapping, Sequence

from xpuquant.conversion.write.read_ahead import Stopped


class Arrivals:
    """How far each shard has come. Thread-safe.

    cause  why all was stopped; None where it was not
    """

    def __init__(self) -> None:
        self.cause: BaseException | None = None
        self._reached: dict[str, int] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def tell(self, shard: str, nbytes: int) -> None:
        """The system has the first bytes of a shard, so many.

        Raises:
            Stopped: nobody waits any more, because a check could not be made.
        """
        with self._changed:
            if self._stopped:
                raise Stopped
            if nbytes > self._reached.get(shard, 0):
                self._reached[shard] = nbytes
                self._changed.notify_all()

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

    def wait(self, shard: str, nbytes: int) -> int:
        """Wait for so many bytes of a shard. Returns how many, from its front, can be read.

        Raises:
            Stopped: they will not come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._reached.get(shard, 0) >= nbytes)
            if self._stopped:
                raise Stopped
            return self._reached[shard]

    def in_turn(self, wanted: Sequence[Mapping[str, int]]) -> Iterator[int]:
        """The places in `wanted`, each as soon as its shards have come so far.

        Args:
            wanted: shard → bytes from its front.

        Raises:
            Stopped: they will not.
        """
        missing = [len(ends) for ends in wanted]
        waiting: dict[str, list[tuple[int, int]]] = {}
        for place, ends in enumerate(wanted):
            for shard, end in ends.items():
                waiting.setdefault(shard, []).append((end, place))
        for ends_of in waiting.values():
            heapq.heapify(ends_of)
        yield from (place for place, ends in enumerate(wanted) if not ends)
        seen: dict[str, int] | None = None
        while any(waiting.values()):
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._reached != seen)  # noqa: B023
                if self._stopped:
                    raise Stopped
                seen = dict(self._reached)
            for shard, ends_of in waiting.items():
                while ends_of and ends_of[0][0] <= seen.get(shard, 0):
                    _, place = heapq.heappop(ends_of)
                    missing[place] -= 1
                    if not missing[place]:
                        yield place
