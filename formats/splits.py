"""In what steps a stored module can be cut for tensor parallelism.

Asked before a download, by the plan (`plan/tensor_parallel.py`), and at load, by vLLM's plugin: both say the same,
because both ask here. vLLM splits q, k, v, gate and up along N, o and down along K, and the intermediate features I of
experts, which are rows of gate and up and columns of down.
"""

from __future__ import annotations

import math

from xpuquant.formats.scheme import ARK_LAYOUTS, ARK_MULTIPLE, Scheme

_WORD = 8
"""Nibbles of an int32; rows of an expert's matrix in the C++ checks of the grouped GEMM (vllm-xpu-kernels)."""

_PLANES = ("int8_linear", "nvfp4_linear")
"""Layouts of two planes, which lie beside each other within a group: no group of these can be cut."""


def has_zero_words(scheme: Scheme) -> bool:
    """Whether a linear has `qzeros`, of which a word holds eight rows."""
    return not scheme.symmetric or scheme.layout == "int8_linear"


def rows_step(scheme: Scheme) -> int:
    """What the rows of a linear that a rank has are a multiple of."""
    return scheme.block_n or (_WORD if has_zero_words(scheme) else 1)


def group_on_rank(scheme: Scheme, K: int, part: int) -> int:
    """Columns of a linear to a scale, on a rank that has `part` of its K columns; 0: a scale covers them all, or a row.

    A group as long as K stays one on every rank.
    """
    whole = scheme.group_size == K and part < K and scheme.layout not in _PLANES
    return part if whole else scheme.group_size


def columns_step(scheme: Scheme, K: int, part: int) -> int:
    """What the columns of a linear that a rank has, `part` of K, are a multiple of."""
    group = group_on_rank(scheme, K, part)
    return group if group and group != part else 1 if part == K else _WORD


def intermediate_step(scheme: Scheme) -> int:
    """What the intermediate features that a rank has of every expert are a multiple of. No group is cut, however long:
    the stacks hold a scale for each."""
    return math.lcm(
        _WORD, scheme.group_size or 1, scheme.block_n or 1, ARK_MULTIPLE if scheme.layout in ARK_LAYOUTS else 1
    )
