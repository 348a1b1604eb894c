"""What this machine does at most: the limits that no conversion passes.

A conversion hashes every byte of its output with sha256, which only one core can do for one shard, and has them on the
disk when it returns. It reads each byte of the source out of the page cache and writes each byte of the output: two
copies in memory.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_BLOCK_BYTES = 1 << 20
_MEMORY_BYTES = 256 << 20
_SECONDS = 0.5


@dataclass(frozen=True)
class Rates:
    """Bytes a second: sha256 on one core, a copy in memory on one core; and how many cores."""

    sha256: float
    copy: float
    cores: int

    def sentence(self) -> str:
        """For the head of a table."""
        hashed, copied = self.sha256 / 1e9, self.copy / 1e9
        return f"limits: sha256 {hashed:.2f} GB/s and copies in memory {copied:.1f} GB/s a core, {self.cores} cores"

    def floor(self, written: int, disk_seconds: float) -> str:
        """What so many bytes of output cost at least, and which limit that is.

        Args:
            disk_seconds: of a durable copy of them.
        """
        seconds = {
            "disk": disk_seconds,
            "sha256": written / self.sha256 / self.cores,
            "memory": 2 * written / self.copy / self.cores,
        }
        longest = max(seconds, key=lambda name: seconds[name])
        return f"{longest} {seconds[longest]:.2f} s ({', '.join(f'{name} {s:.2f}' for name, s in seconds.items())})"


def measure_rates() -> Rates:
    """Measure them, for half a second of processor time each."""
    block = np.random.default_rng(0).bytes(_BLOCK_BYTES)
    digest = hashlib.sha256()
    wide, target = np.ones(_MEMORY_BYTES, np.uint8), np.zeros(_MEMORY_BYTES, np.uint8)
    return Rates(
        _rate(lambda: digest.update(block), len(block)),
        _rate(lambda: np.copyto(target, wide), _MEMORY_BYTES),
        len(os.sched_getaffinity(0)),
    )


def _rate(work: Callable[[], None], nbytes: int) -> float:
    work()  # once before: pages of fresh memory are not what is measured
    began = time.process_time()
    times = 0
    while time.process_time() - began < _SECONDS:
        work()
        times += 1
    return times * nbytes / (time.process_time() - began)
