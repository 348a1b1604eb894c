"""Stacked experts on disk: which rows of `gate_up_proj` and `down_proj` are which matrix, and how pieces fill them.
Shared by the expert layouts that store `[E, N, ...]` rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.formats.checkpoint import Slice
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Array, Cast, ExpertStack, Make, Matrix, OutTensor, Piece, Stored
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
        for side, (make, mine) in enumerate(((self.even, arrays[: self.split]), (self.odd, arrays[self.split :]))):
            half = np.empty(out.size // 2, np.uint8)
            make(mine, half)
            pairs[:, side] = half.reshape(self.rows, -1)


def upper_roles(stack: ExpertStack) -> tuple[str, ...]:
    """The roles that make up `gate_up_proj`: gate and up, or the one that already is both."""
    return tuple(role for role in stack.weights if role != "down")


def interleaved(
    inputs: tuple[tuple[Slice, ...], tuple[Slice, ...]], makes: tuple[Make, Make], rows: int, row_bytes: int
) -> Piece:
    """A piece whose rows alternate: the first row of gate, the first of up, the second of gate, ...

    Args:
        inputs: of gate, of up.
        makes: fill `rows` rows of `row_bytes` each.
    """
    even, odd = makes
    return Piece(inputs[0] + inputs[1], 2 * rows * row_bytes, Interleave(even, odd, len(inputs[0]), rows))


def bias_tensor(stack: ExpertStack, part: str) -> OutTensor:
    """`gate_up_proj_bias` `[E, 2I]` or `down_proj_bias` `[E, H]`, in the row order of the weights."""
    roles = tuple(role for role in stack.biases if (role == "down") == (part == "down_proj"))
    dtype = stack.biases["down"][0].tensor.dtype
    item = numpy_dtype(dtype).itemsize
    pieces: list[Piece] = []
    for e in range(stack.experts):
        slices = [stack.biases[role][e] for role in roles]
        # Gate and up that were joined to one matrix are in its order already.
        if len(slices) == 2 and stack.interleaved and "gate_up" not in stack.weights:
            casts = (Cast(dtype), Cast(dtype))
            pieces.append(interleaved(((slices[0],), (slices[1],)), casts, slices[0].shape[-1], item))
        else:
            pieces += [Piece((bias,), bias.shape[-1] * item, Cast(dtype)) for bias in slices]
    N = sum(stack.biases[role][0].shape[-1] for role in roles)
    return OutTensor(f"{stack.name}.{part}_bias", dtype, (stack.experts, N), tuple(pieces))


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
        return np.ascontiguousarray(rows[::step])

    return part, read


def _flatten(tensor: Tensor) -> Tensor:
    """The same bytes as `[E * N, ...]`."""
    E, N, *rest = tensor.shape
    return Tensor(tensor.name, tensor.dtype, (E * N, *rest), tensor.file, tensor.begin, tensor.end)
