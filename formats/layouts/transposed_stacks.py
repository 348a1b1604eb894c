"""Stacked fp8 experts, stored as the grouped GEMM reads them: physically transposed, `[E, K, N]`.

The columns of `gate_up_proj` are all gate, then all up; gpt-oss alternates gate, up. Shared by the fp8 and MXFP8
expert layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import columns, rows
from xpuquant.formats.layouts.base import Array, ExpertStack, Matrix, OutTensor, Piece, Stored
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import row_blocks
from xpuquant.formats.weights.floats import FloatWeight, view
from xpuquant.formats.weights.joined import parts

STACKS = ("gate_up_proj", "down_proj")

_LINE_BYTES = 64
"""Rows of the output are columns of the source, and are cut in multiples of a line of the cache."""


@dataclass(frozen=True)
class SideBySide:
    """Fills rows `[n, N]` of a transposed stack: the columns of each matrix after those of the one before, or
    alternating.

    widths     N of each matrix
    alternate  columns of the two matrices alternate
    """

    widths: tuple[int, ...]
    alternate: bool

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        from xpuquant.formats.packing.convert_loops import transpose_bytes

        total = sum(self.widths)
        target = out.reshape(-1, total)
        left = 0
        for i, (array, width) in enumerate(zip(arrays, self.widths, strict=True)):
            place = target[:, i::2] if self.alternate else target[:, left : left + width]
            transpose_bytes(array.view(np.uint8), place)
            left += width

    def cut(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """Rows of the output, which are columns of every input."""
        total = sum(self.widths)
        for first, last in row_blocks(piece.nbytes // total, total, _LINE_BYTES, limit):
            inputs = tuple(columns(part.tensor, part.start + first, part.start + last) for part in piece.inputs)
            yield Piece(inputs, (last - first) * total, self)


def float_parts(stack: ExpertStack, role: str, expert: int) -> list[FloatWeight]:
    """The source matrices of one expert's role: one, or several to be joined."""
    return [part for part in parts(stack.weights[role][expert]) if isinstance(part, FloatWeight)]


def all_parts(stack: ExpertStack) -> list[FloatWeight]:
    return [part for role in stack.weights for e in range(stack.experts) for part in float_parts(stack, role, e)]


def is_float_stack(stack: ExpertStack) -> bool:
    """Whether every matrix of the stack is a float weight."""
    sources = [part for role in stack.weights.values() for weight in role for part in parts(weight)]
    return all(isinstance(part, FloatWeight) for part in sources)


def stack_facts(stack: ExpertStack) -> tuple[str, ...]:
    """What was decided about the experts, each thing once."""
    weights = [weight for role in stack.weights.values() for weight in role]
    return tuple(dict.fromkeys(fact for weight in weights for fact in weight.facts))


def one_dtype(stack: ExpertStack) -> str | None:
    """Why the codes of a stack cannot share tensors, or None."""
    dtypes = {part.dtype for part in all_parts(stack)}
    return f"experts of one layer have weights of {' and '.join(sorted(dtypes))}" if len(dtypes) > 1 else None


def transposed_tensor(stack: ExpertStack, name: str, roles: tuple[str, ...]) -> OutTensor:
    """`[E, K, N]` codes of `gate_up_proj` or `down_proj`."""
    pieces: list[Piece] = []
    for e in range(stack.experts):
        members = [part for role in roles for part in float_parts(stack, role, e)]
        widths = tuple(weight.N for weight in members)
        # A source that has it as `[K, N]` already is one matrix: experts fused in one tensor.
        verbatim = members[0].transposed
        make = None if verbatim else SideBySide(widths, stack.interleaved and len(roles) == 2)
        for start, stop in row_blocks(members[0].K, sum(widths), _LINE_BYTES):
            inputs = tuple(weight.code_columns(start, stop) for weight in members)
            pieces.append(Piece(inputs, (stop - start) * sum(widths), make))
    shape = (stack.experts, members[0].K, sum(widths))
    return OutTensor(f"{stack.name}.{name}", members[0].dtype, shape, tuple(pieces))


def transposed_matrices(stored: Stored) -> list[Matrix]:
    """Every expert's gate, up and down of a transposed stack.

    Raises:
        DamagedError: not fp8 `[E, K, N]` of the scheme's type.
    """
    for part in STACKS:
        weight = stored.tensors[part]
        wanted = stored.scheme.weight_dtype
        if weight.dtype != wanted or len(weight.shape) != 3:
            raise DamagedError(
                f"{weight.name} is {weight.dtype} {list(weight.shape)}, config.json says {wanted} [E, K, N]"
            )
    E, H, both = stored.tensors["gate_up_proj"].shape
    experts, I, N = stored.tensors["down_proj"].shape
    if (experts, I, N) != (E, both // 2, H):
        raise DamagedError(f"{stored.name}: down_proj is {[experts, I, N]}, gate_up_proj {[E, H, both]}")
    return [
        Matrix(role, N, K, expert)
        for expert in range(E)
        for role, N, K in (("gate", I, H), ("up", I, H), ("down", H, I))
    ]


def stored_columns(scheme_interleaved: bool, N: int, matrix: Matrix, start: int, stop: int) -> slice:
    """Which of the N columns of a stack are rows `start:stop` of a matrix."""
    if matrix.role in ("gate", "up"):
        if scheme_interleaved:
            return slice(2 * start + (matrix.role == "up"), 2 * stop, 2)
        shift = N // 2 if matrix.role == "up" else 0
        return slice(start + shift, stop + shift)
    return slice(start, stop)


def stored_codes(stored: Stored, matrix: Matrix, start: int, stop: int) -> tuple[str, slice, Array]:
    """(stack's name, the columns taken, the array `[K, n]`) of rows `start:stop` of a matrix."""
    part = "down_proj" if matrix.role == "down" else "gate_up_proj"
    weight = expert_tensor(stored.tensors[part], matrix)
    taken = stored_columns(stored.scheme.interleaved, weight.shape[1], matrix, start, stop)
    codes = stored.load(columns(weight, taken.start, taken.stop))
    return part, taken, codes[:, :: taken.step or 1]


def expert_tensor(tensor: Tensor, matrix: Matrix) -> Tensor:
    """The expert's slice of a stacked tensor, without the leading E."""
    assert matrix.expert is not None
    return view(tensor, tensor.dtype, tensor.shape[1:], matrix.expert)


def stack_suffixes(scheme: Scheme) -> tuple[str, ...]:
    """Tensors of a stack of experts, in every float layout."""
    names = tuple(name for part in STACKS for name in (part, f"{part}_scale"))
    return names + tuple(f"{part}_bias" for part in STACKS) * scheme.bias


def expert_scale(stored: Stored, part: str, matrix: Matrix) -> Array:
    """The scales of one expert: `[1]`, or its slice of the stacked tensor."""
    tensor = stored.tensors[f"{part}_scale"]
    assert matrix.expert is not None
    if len(tensor.shape) == 1:
        return stored.load(rows(tensor, matrix.expert, matrix.expert + 1))
    expert = expert_tensor(tensor, matrix)
    return stored.load(rows(expert, 0, expert.shape[0]))


def expert_bias(stored: Stored, part: str, matrix: Matrix, taken: slice) -> dict[str, Array]:
    """`bias` of the rows taken, where the scheme has biases."""
    if not stored.scheme.bias:
        return {}
    tensor = stored.tensors[f"{part}_bias"]
    assert matrix.expert is not None
    row = stored.load(rows(tensor, matrix.expert, matrix.expert + 1))
    return {"bias": row[0, taken]}
