"""Which group size a kernel can take, and which source scale each of its groups repeats.

A kernel's groups are equally long runs of stored columns. The source may have one group for the whole row, a
short last group, or (act-order) groups gathered by a permutation. All of them are runs of columns that share a
scale, so any common divisor of the run lengths is an exact group size: scale rows are repeated, never changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.formats.weights.base import Array, IntWeight

GROUP_MULTIPLE = 32
"""oneDNN's int4 matmul as vllm-xpu-kernels calls it (`XPUwNa16LinearKernel.can_implement`): g % 32 == 0."""


@dataclass(frozen=True)
class Regrouping:
    """How to lay out scale rows for groups of `size` columns.

    size    columns per output group
    source  source group of each output group; None where it is the identity
    """

    size: int
    source: tuple[int, ...] | None

    def rows(self, scales: Array) -> Array:
        """`[K/size, N]` from the source's `[G, N]` (the same array where nothing changes)."""
        return scales if self.source is None else scales[np.array(self.source)]


def source_group_size(claimed: int, K: int, G: int) -> int | None:
    """Columns per group where K columns have G groups: what the config claims if that gives G (the last group may
    be short), else K/G. None where neither does.

    Args:
        claimed: the config's group size; -1, 0 or more than K for one group of K.
    """
    size = claimed if 0 < claimed <= K else K
    if -(-K // size) == G:
        return size
    return K // G if G and K % G == 0 else None


def runs(weight: IntWeight) -> list[tuple[int, int]]:
    """(source group, columns) of each run of stored columns that shares a group, in stored order."""
    if weight.groups_of is None:
        full, last = divmod(weight.K, weight.group_size)
        return [(g, weight.group_size) for g in range(full)] + [(full, last)] * (last > 0)
    groups = np.sort(weight.groups_of)
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    lengths = np.diff(np.append(starts, weight.K))
    return [(int(groups[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]


def regroup(weight: IntWeight, sizes: Sequence[int] | None = None, also: Iterable[int] = ()) -> Regrouping | None:
    """The coarsest exact grouping a kernel can take, or None.

    Args:
        weight: the source weight.
        sizes: the sizes the kernel has, or None for any multiple of 32.
        also: further lengths the size must divide (the groups of a sibling it shares a tensor with).
    """
    found = runs(weight)
    common = math.gcd(*(length for _, length in found), *also)
    if sizes is None:
        size = common if common % GROUP_MULTIPLE == 0 else 0
    else:
        size = max((size for size in sizes if common % size == 0), default=0)
    if not size:
        return None
    source = [group for group, length in found for _ in range(length // size)]
    identity = source == list(range(weight.groups))
    return Regrouping(size, None if identity else tuple(source))
