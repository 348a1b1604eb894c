"""The threads of a verification: its steps give them calls, and take the results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

from xpuquant.conversion.options import cores
from xpuquant.conversion.write.arrivals import Arrivals
from xpuquant.formats.safetensors import Tensor
from xpuquant.values import frozen

T = TypeVar("T")


@frozen
class Call(Generic[T]):
    """A part of the work that depends on no other.

    make   does it
    reads  the output's tensors that it reads; they may still be being written
    """

    make: Callable[[], T]
    reads: Iterable[Tensor] = ()

    def nbytes(self) -> int:
        """Bytes of what it reads."""
        return sum(tensor.nbytes for tensor in self.reads)

    def ends(self) -> dict[str, int]:
        """Shard → bytes from its front that have to be there."""
        found: dict[str, int] = {}
        for tensor in self.reads:
            found[tensor.file] = max(found.get(tensor.file, 0), tensor.end)
        return found


@contextmanager
def pool_of(jobs: int) -> Iterator[Executor]:
    """`jobs` threads, but no more than processors: all of it is arithmetic, and more would only take each other's
    caches. What has not begun when the first error leaves the block is not begun."""
    with ThreadPoolExecutor(min(jobs, cores()), "verify") as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def results_of(pool: Executor, calls: Sequence[Call[T]], arrivals: Arrivals | None = None) -> list[T]:
    """Results of the calls, in order. Raises the first error.

    Args:
        arrivals: what of the output can be read by now; None: all of it. Calls begin as what they read arrives; the
            first that fails stops what is to arrive.
    """
    if arrivals is None:
        return [future.result() for future in [pool.submit(call.make) for call in calls]]
    running: dict[int, Future[T]] = {}

    def begun(call: Call[T]) -> T:
        arrivals.queued(-call.nbytes())
        arrivals.check()
        return call.make()

    def ended(future: Future[T]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            arrivals.stop(error)

    for place in arrivals.in_turn([call.ends() for call in calls]):
        arrivals.queued(calls[place].nbytes())
        running[place] = pool.submit(begun, calls[place])
        running[place].add_done_callback(ended)
    return [running[place].result() for place in range(len(calls))]


def run_all(jobs: int, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of the calls, in order, from `jobs` threads. The first error stops what has not begun."""
    with pool_of(jobs) as pool:
        return results_of(pool, [Call(call) for call in calls])
