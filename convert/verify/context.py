"""What every step of a verification needs to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.converted import ReadableRepo
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.verify.threads import Call, pool_of, results_of
from xpuquant.conversion.write.arrivals import Arrivals
from xpuquant.formats.safetensors import Tensor
from xpuquant.kernels.base import Backend
from xpuquant.values import frozen

T = TypeVar("T")


def _silent(nbytes: int) -> None:
    pass


def _forget(tensors: Iterable[Tensor]) -> None:
    pass


@frozen
class Check:
    """A repo to verify, and how thoroughly.

    repo      open
    backends  kernels to run; see `select`
    jobs      threads
    progress  told of bytes that have been checked
    full      all rows of each distinct shape by backends that are fast enough, not a sample
    every     all rows of every matrix, whatever they cost
    pool      the threads, where several steps share them; None: each step has `jobs` of its own
    done_with told of tensors that have been compared
    arrivals  what of the repo's shards can be read by now, where they are still being written; None: all of them
    """

    repo: ReadableRepo
    backends: Sequence[Backend] = ()
    jobs: int = 1
    progress: Progress = _silent
    full: bool = False
    every: bool = False
    pool: Executor | None = None
    arrivals: Arrivals | None = None
    done_with: Callable[[Iterable[Tensor]], None] = _forget

    def stopping(self) -> AbstractContextManager[None]:
        """What fails in the block stops what is to arrive: no other step waits for it."""
        return nullcontext() if self.arrivals is None else self.arrivals.stopping()

    def run(self, calls: Sequence[Call[T]]) -> list[T]:
        """Results of the calls, in order; see `results_of`."""
        if self.pool is not None:
            return results_of(self.pool, calls, self.arrivals)
        with pool_of(self.jobs) as pool:
            return results_of(pool, calls, self.arrivals)


@frozen
class Origin:
    """What the repo was converted from: the source, and the plan of its conversion."""

    plan: Plan
    source: Source
