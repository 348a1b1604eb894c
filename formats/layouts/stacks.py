"""The experts of a layer on disk, `gate_up_proj` and `down_proj` in one tensor each, and which rows are which matrix.

A stack lies as rows, `[E, N, ...]`, or (fp8) physically transposed, `[E, K, N]`, as the grouped GEMM reads it. Rows of
`gate_up_proj`, or its columns where transposed, are all gate, then all up; gpt-oss alternates gate, up. Experts without
a gate have `up_proj` in its place: what is said of `gate_up_proj` `[E, 2I, ...]` holds for `up_proj` `[E, I, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array, Slice, columns, rows
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Matrix, OutTensor, Piece, Stored
from xpuquant.formats.layouts.fillers import LINE_BYTES, FillInterleaved, FillSideBySide
from xpuquant.formats.layouts.modules import ExpertStack, Module
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import row_blocks
from xpuquant.formats.weights.floats import ELEMENTS, FloatWeight, view
from xpuquant.formats.weights.parts import source_matrices

GEMM_N_MULTIPLE = 8
"""Rows of an expert's matrix: C++ check of the grouped GEMM (vllm-xpu-kernels csrc/xpu/grouped_gemm)."""

# What is written.


def roles_of_stacks(stack: ExpertStack) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(name, roles in it) of each stacked tensor."""
    first, second = Scheme("", gated=stack.gated).stacks
    return (first, stack.upper_roles), (second, ("down",))


def alternates(stack: ExpertStack, roles: tuple[str, ...]) -> bool:
    """Whether two matrices are to be stored row by row in turns. One that already is both is in its order."""
    return stack.interleaved and len(roles) == 2


def bias_tensor(stack: ExpertStack, name: str) -> OutTensor:
    """`gate_up_proj_bias` `[E, 2I]` or `down_proj_bias` `[E, H]`, in the row order of the weights."""
    roles = tuple(role for role in stack.biases if (role == "down") == (name == "down_proj"))
    dtype = stack.biases["down"][0].tensor.dtype
    item = numpy_dtype(dtype).itemsize
    pieces: list[Piece] = []
    for expert in range(stack.experts):
        copies = [Piece((bias,), bias.shape[-1] * item) for bias in (stack.biases[role][expert] for role in roles)]
        # Gate and up that were joined to one matrix have two biases still, which are in its order already.
        if alternates(stack, roles) and "gate_up" not in stack.weights:
            gate, up = copies
            pieces.append(FillInterleaved(gate, up, gate.nbytes // item).piece())
        else:
            pieces += copies
    N = sum(stack.biases[role][0].shape[-1] for role in roles)
    return OutTensor(f"{stack.name}.{name}_bias", dtype, (stack.experts, N), tuple(pieces))


def float_members(stack: ExpertStack, roles: tuple[str, ...], expert: int) -> tuple[FloatWeight, ...]:
    """The source matrices of some roles of one expert: one each, or several to be joined."""
    sources = [source for role in roles for source in source_matrices(stack.weights[role][expert])]
    return tuple(source for source in sources if isinstance(source, FloatWeight))


def float_stack(module: Module) -> tuple[ExpertStack, list[FloatWeight]] | None:
    """A stack all of whose source matrices are float weights, and these; None for any other module."""
    if not isinstance(module, ExpertStack):
        return None
    sources = [source for _, _, weight in module.matrices() for source in source_matrices(weight)]
    floats = [source for source in sources if isinstance(source, FloatWeight)]
    return (module, floats) if len(floats) == len(sources) else None


def fp8_stack(module: Module) -> tuple[ExpertStack, list[FloatWeight]] | None:
    """A stack all of whose source matrices are FP8 with float scales, and these; None for any other module."""
    if (floats := float_stack(module)) is None:
        return None
    return None if any(source.is_mx or source.dtype not in ELEMENTS for source in floats[1]) else floats


def several_dtypes(sources: Sequence[FloatWeight]) -> str | None:
    """Why the codes of a stack cannot share tensors, or None."""
    dtypes = {source.dtype for source in sources}
    return f"experts of one layer have weights of {' and '.join(sorted(dtypes))}" if len(dtypes) > 1 else None


def transposed_tensor(stack: ExpertStack, name: str, roles: tuple[str, ...]) -> OutTensor:
    """`[E, K, N]` codes of `gate_up_proj` or `down_proj`."""
    pieces: list[Piece] = []
    for expert in range(stack.experts):
        members = float_members(stack, roles, expert)
        widths = tuple(weight.N for weight in members)
        # A source that has it as `[K, N]` already is one matrix: experts fused in one tensor.
        filler = None if members[0].transposed else FillSideBySide(widths, alternates(stack, roles))
        for start, stop in row_blocks(members[0].K, sum(widths), LINE_BYTES):
            inputs = tuple(weight.code_columns(start, stop) for weight in members)
            pieces.append(Piece(inputs, (stop - start) * sum(widths), filler))
    shape = (stack.experts, members[0].K, sum(widths))
    return OutTensor(f"{stack.name}.{name}", members[0].dtype, shape, tuple(pieces))


# What is read back.


def stack_suffixes(scheme: Scheme) -> tuple[str, ...]:
    """Tensors of a stack of experts."""
    names = tuple(name for part in scheme.stacks for name in (part, f"{part}_scale"))
    return names + tuple(f"{part}_bias" for part in scheme.stacks) * scheme.bias


def part_of(scheme: Scheme, matrix: Matrix) -> str:
    """Which stacked tensor holds a matrix."""
    return scheme.stacks[matrix.role == "down"]


def place(stored: Stored, N: int, matrix: Matrix, start: int, stop: int) -> slice:
    """Which of the N rows (columns, where transposed) of an expert are rows `start:stop` of a matrix."""
    if matrix.role not in ("gate", "up") or not stored.scheme.gated:
        return slice(start, stop, 1)
    if stored.scheme.interleaved:
        return slice(2 * start + (matrix.role == "up"), 2 * stop, 2)
    shift = N // 2 if matrix.role == "up" else 0
    return slice(start + shift, stop + shift, 1)


def stored_matrices(stored: Stored, packed: int = 1) -> list[Matrix]:
    """Every expert's matrices of a stack stored as rows `[E, N, K/packed]`.

    gpt-oss sources have one fused matrix or two; the stored form is the same, so gate and up are always listed
    (as views of alternating rows where interleaved).
    """
    first, second = stored.scheme.stacks
    E, rows_of_first, upper = stored.tensors[first].shape
    _, H, lower = stored.tensors[second].shape
    return _matrices(stored.scheme, E, rows_of_first, upper * packed, H, lower * packed)


def _matrices(scheme: Scheme, E: int, rows_of_first: int, upper_K: int, H: int, lower_K: int) -> list[Matrix]:
    roles = ("gate", "up") if scheme.gated else ("up",)
    uppers = [(role, rows_of_first // len(roles), upper_K) for role in roles]
    return [Matrix(role, N, K, expert) for expert in range(E) for role, N, K in (*uppers, ("down", H, lower_K))]


def part_rows(stored: Stored, matrix: Matrix, start: int, stop: int) -> tuple[str, Callable[[str], Array]]:
    """Where rows `start:stop` of a matrix lie: the tensor's suffix, and a function that reads the same rows of a
    tensor that shares its row order (the weight, its scale, its bias)."""
    part = part_of(stored.scheme, matrix)
    N = stored.tensors[part].shape[1]
    assert matrix.expert is not None, "a matrix of a stack is an expert's"
    top = matrix.expert * N
    taken = place(stored, N, matrix, start, stop)

    def read(suffix: str) -> Array:
        flat = _flatten(stored.tensors[suffix])
        return np.ascontiguousarray(stored.load(Slice(flat, top + taken.start, top + taken.stop))[:: taken.step])

    return part, read


def _flatten(tensor: Tensor) -> Tensor:
    """The same bytes as `[E * N, ...]`."""
    E, N, *rest = tensor.shape
    return Tensor(tensor.name, tensor.dtype, (E * N, *rest), tensor.file, tensor.begin, tensor.end)


def transposed_matrices(stored: Stored) -> list[Matrix]:
    """Every expert's gate, up and down of a transposed stack.

    Raises:
        DamagedError: not fp8 `[E, K, N]` of the scheme's type.
    """
    first, second = stored.scheme.stacks
    for part in (first, second):
        weight = stored.tensors[part]
        wanted = stored.scheme.weight_dtype
        if weight.dtype != wanted or len(weight.shape) != 3:
            raise DamagedError(
                f"{weight.name} is {weight.dtype} {list(weight.shape)}, config.json says {wanted} [E, K, N]"
            )
    E, H, columns_of_first = stored.tensors[first].shape
    experts, I, N = stored.tensors[second].shape
    if (experts, I * (1 + stored.scheme.gated), N) != (E, columns_of_first, H):
        raise DamagedError(f"{stored.name}: {second} is {[experts, I, N]}, {first} {[E, H, columns_of_first]}")
    return _matrices(stored.scheme, E, columns_of_first, H, H, I)


def transposed_codes(stored: Stored, matrix: Matrix, start: int, stop: int) -> tuple[str, slice, Array]:
    """(stack's name, the columns taken, the array `[K, n]`) of rows `start:stop` of a matrix."""
    part = part_of(stored.scheme, matrix)
    weight = _expert_tensor(stored.tensors[part], matrix)
    taken = place(stored, weight.shape[1], matrix, start, stop)
    codes = stored.load(columns(weight, taken.start, taken.stop))
    return part, taken, codes[:, :: taken.step]


def expert_scale(stored: Stored, part: str, matrix: Matrix) -> Array:
    """The scales of one expert: `[1]`, or its slice of the stacked tensor."""
    tensor = stored.tensors[f"{part}_scale"]
    assert matrix.expert is not None, "a matrix of a stack is an expert's"
    if len(tensor.shape) == 1:
        return stored.load(rows(tensor, matrix.expert, matrix.expert + 1))
    expert = _expert_tensor(tensor, matrix)
    return stored.load(rows(expert, 0, expert.shape[0]))


def expert_bias(stored: Stored, part: str, matrix: Matrix, taken: slice) -> dict[str, Array]:
    """`bias` of the rows taken, where the scheme has biases."""
    if not stored.scheme.bias:
        return {}
    assert matrix.expert is not None, "a matrix of a stack is an expert's"
    row = stored.load(rows(stored.tensors[f"{part}_bias"], matrix.expert, matrix.expert + 1))
    return {"bias": row[0, taken]}


def _expert_tensor(tensor: Tensor, matrix: Matrix) -> Tensor:
    """The expert's slice of a stacked tensor, without the leading E."""
    assert matrix.expert is not None, "a matrix of a stack is an expert's"
    return view(tensor, tensor.dtype, tensor.shape[1:], matrix.expert)
