"""Copies into host memory by threads of our own, while weights are loaded.

torch's `copy_` between host tensors splits the work evenly over OpenMP threads that spin until the slowest is
done. While a checkpoint is read the slowest one waits for page faults, or for a core that somebody else has, and
the spinning takes up to twice the processor time of the copying itself. Here whoever is free takes the next
piece. Copies to a device are left to torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

# Bytes that a thread takes at a time.
_PIECE = 4 << 20
# numpy knows neither bfloat16 nor fp8: bytes are moved as integers of the same width.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class HostCopies(TorchFunctionMode):
    """While active: `target.copy_(source)` of host tensors of one dtype and shape goes piece by piece."""

    def __enter__(self) -> Any:
        cpus = _allowed()
        self.pool = ThreadPoolExecutor(min(len(cpus), torch.get_num_threads()), "xpuquant-copy", _bind, (cpus,))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self.pool.shutdown()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and not kwargs and _only_moves(*args):
            self._copy(*args)
            return args[0]
        return func(*args, **(kwargs or {}))

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        word = _WORDS[target.dtype.itemsize]
        to, of = target.view(word).numpy(), source.view(word).numpy()
        rows = max(1, _PIECE * len(to) // target.nbytes)
        if rows >= len(to):
            np.copyto(to, of)
            return
        pieces = [slice(row, row + rows) for row in range(0, len(to), rows)]
        for _ in self.pool.map(lambda piece: np.copyto(to[piece], of[piece]), pieces):
            pass  # an error in a thread is raised here


def _only_moves(target: Any, source: Any, *flags: Any) -> bool:
    """Whether the copy moves bytes of host memory and does nothing else."""
    return (
        isinstance(source, torch.Tensor)
        and target.device.type == source.device.type == "cpu"
        and target.layout == source.layout == torch.strided
        and target.dtype == source.dtype
        and target.shape == source.shape
        and target.ndim > 0
        and target.numel() > 0
        and target.dtype.itemsize in _WORDS
        and not (target.requires_grad or source.requires_grad or flags)
    )


def _allowed() -> set[int]:
    """Processors that any thread of this process may use: vLLM's CPU worker binds each thread to one."""
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    cpus = os.sched_getaffinity(0)
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            cpus |= os.sched_getaffinity(int(thread.name))
    return cpus


def _bind(cpus: set[int]) -> None:
    """Let this thread run on `cpus`, where it would inherit the one that its parent is bound to."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
