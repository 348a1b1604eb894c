"""Stacked experts on disk: which rows of `gate_up_proj` and `down_proj` are which matrix. Shared by the expert
layouts that store `[E, N, ...]` rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.formats.checkpoint import Slice
from xpuquant.formats.layout import Array, Make, Matrix, Stored
from xpuquant.formats.safetensors import Tensor


@dataclass(frozen=True)
class Interleave:
    """Fills a piece whose rows alternate: first made by `even`, next by `odd`, and so on.

    split  how many of the inputs are `even`'s
    rows   rows of each
    """

    even: Make
    odd: Make
    split: int
    rows: int

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        pairs = out.reshape(self.rows, 2, -1)
        for side, (make, mine) in enumerate(
            ((self.even, arrays[: self.split]), (self.odd, arrays[self.split :]))
        ):
            half = np.empty(out.size // 2, np.uint8)
            make(mine, half)
            pairs[:, side] = half.reshape(self.rows, -1)


def stored_matrices(stored: Stored, packed: int = 1) -> list[Matrix]:
    """Every expert's matrices of a stack stored as rows `[E, N, K/packed]`.

    gpt-oss sources have one fused matrix or two; the stored form is the same, so gate and up are always listed
    (as views of alternating rows where interleaved).
    """
    E, both, upper = stored.tensors["gate_up_proj"].shape
    _, H, lower = stored.tensors["down_proj"].shape
    return [
        Matrix(role, N, K * packed, expert)
        for expert in range(E)
        for role, N, K in (("gate", both // 2, upper), ("up", both // 2, upper), ("down", H, lower))
    ]


def part_rows(stored: Stored, matrix: Matrix, start: int, stop: int) -> tuple[str, Callable[[str], Array]]:
    """Where rows `start:stop` of a matrix lie: the tensor's suffix, and a function that reads the same rows of a
    tensor that shares its row order (the weight, its scale, its bias)."""
    part = "down_proj" if matrix.role == "down" else "gate_up_proj"
    N = stored.tensors[part].shape[1]
    assert matrix.expert is not None
    first = matrix.expert * N
    alternate = stored.scheme.interleaved and matrix.role in ("gate", "up")
    if alternate:
        low, high, step = 2 * start + (matrix.role == "up"), 2 * stop, 2
    else:
        shift = N // 2 if matrix.role == "up" else 0
        low, high, step = start + shift, stop + shift, 1

    def read(suffix: str) -> Array:
        flat = _flatten(stored.tensors[suffix])
        rows = stored.load(Slice(flat, first + low, first + high))
        return rows[::step]

    return part, read


def _flatten(tensor: Tensor) -> Tensor:
    """The same bytes as `[E * N, ...]`."""
    E, N, *rest = tensor.shape
    return Tensor(tensor.name, tensor.dtype, (E * N, *rest), tensor.file, tensor.begin, tensor.end)
