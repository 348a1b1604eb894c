"""The threads of a verification: its steps give them calls, and take the results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from xpuquant.conversion.options import cores

T = TypeVar("T")


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


def results_of(pool: Executor, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of the calls, in order. Raises the first error."""
    running = [pool.submit(call) for call in calls]
    return [future.result() for future in running]


def run_all(jobs: int, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of the calls, in order, from `jobs` threads. The first error stops what has not begun."""
    with pool_of(jobs) as pool:
        return results_of(pool, calls)
