"""What every step of a verification needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.converted import Repo
from xpuquant.conversion.sources.base import Source
from xpuquant.kernels.base import Backend


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
    """

    repo: Repo
    backends: Sequence[Backend] = ()
    jobs: int = 1
    progress: Progress = _silent
    full: bool = False
    every: bool = False


@dataclass(frozen=True)
class Origin:
    """What the repo was converted from: the source, and the plan of its conversion."""

    plan: Plan
    source: Source
