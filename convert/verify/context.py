"""What every step of a verification needs to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.converted import Repo
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.verify.threads import results_of, run_all
from xpuquant.kernels.base import Backend

T = TypeVar("T")


def _silent(nbytes: int) -> None:
    pass


@dataclass(frozen=True)
class Check:
    """A repo to verify, and how thoroughly.

    repo      open
    backends  kernels to run; see `select`
    jobs      threads
    progress  told of bytes that have been checked
    full      all rows of each distinct shape by backends that are fast enough, not a sample
    every     all rows of every matrix, whatever they cost
    pool      the threads, where several steps share them; None: each step has `jobs` of its own
    """

    repo: Repo
    backends: Sequence[Backend] = ()
    jobs: int = 1
    progress: Progress = _silent
    full: bool = False
    every: bool = False
    pool: Executor | None = None

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results of the calls, in order; see `run_all`."""
        return run_all(self.jobs, calls) if self.pool is None else results_of(self.pool, calls)


@dataclass(frozen=True)
class Origin:
    """What the repo was converted from: the source, and the plan of its conversion."""

    plan: Plan
    source: Source
