"""Exactness: every value of the output decodes to exactly what the source decodes to.

What flows: each matrix is cut into row blocks; a worker reads a block of the source and the same rows of the output,
decodes both to the common form of `formats/decoded.py` by code that shares nothing with the conversion's fast path, and
compares integers and scale values for equality. Tensors that were passed through are compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from xpuquant.convert.plan import Plan, PlannedModule
from xpuquant.convert.repo import Repo
from xpuquant.convert.source import Source
from xpuquant.errors import DamagedError, XpuquantError
from xpuquant.formats.checkpoint import Array, Slice, as_array, whole
from xpuquant.formats.decoded import Decoded, difference
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layout import ExpertStack, Matrix, Stored
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weight import PIECE_BYTES, Weight, row_blocks

_BLOCK_CODES = 1 << 20
"""Codes decoded at once: both sides and their temporaries stay in a few megabytes."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Checked:
    """The verdict on one module or passed tensor.

    matrices  matrices compared; 0 for a passed tensor
    error     None where everything is equal; otherwise the first difference
    """

    name: str
    matrices: int
    error: str | None


def check_exact(plan: Plan, source: Source, repo: Repo, jobs: int, progress: Progress) -> list[Checked]:
    """Compare everything the plan describes with everything the repo holds.

    Raises:
        DamagedError: the repo's tensors are not those of the plan, by name, dtype or shape.
        EnvironmentFault: unreadable files.
    """
    _same_tensors(plan, repo)

    def module(planned: PlannedModule) -> Checked:
        weights = planned.weights
        errors = _check_module(planned, source, repo, plan.options.scale_dtype)
        progress(planned.nbytes)
        return Checked(planned.conversion.name, len(weights), errors)

    def passed(tensor: Tensor) -> Checked:
        error = _same_bytes(source, whole(tensor), repo, whole(repo.tensors[tensor.name]))
        progress(tensor.nbytes)
        return Checked(tensor.name, 0, error)

    with ThreadPoolExecutor(jobs, "verify") as workers:
        # Largest first, so that no worker is left with a long one at the end.
        largest = sorted(plan.modules, key=lambda planned: -planned.nbytes)
        running = [workers.submit(module, planned) for planned in largest]
        running += [workers.submit(passed, tensor) for tensor in plan.passed]
        try:
            return [future.result() for future in running]
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _same_tensors(plan: Plan, repo: Repo) -> None:
    wanted = {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}
    for name in wanted.keys() - repo.tensors.keys():
        raise DamagedError(f"{name} is missing from the output")
    for name in repo.tensors.keys() - wanted.keys():
        raise DamagedError(f"{name} is in the output, but the source gives no such tensor")
    for name, tensor in wanted.items():
        held = repo.tensors[name]
        if (held.dtype, held.shape) != (tensor.dtype, tensor.shape):
            raise DamagedError(
                f"{name} is {held.dtype} {list(held.shape)}, the source gives {tensor.dtype} {list(tensor.shape)}"
            )


def _check_module(planned: PlannedModule, source: Source, repo: Repo, scale_dtype: str | None) -> str | None:
    cast = None if scale_dtype is None else numpy_dtype(scale_dtype)
    stored = repo.modules.get(planned.conversion.name)
    if planned.conversion.scheme is None:
        return _first(_check_rounded(weight, source, repo) for _, _, weight in planned.weights)
    if stored is None or stored.scheme != planned.conversion.scheme:
        return (
            f"config.json says {stored.scheme.label() if stored else 'nothing'}, "
            f"the source gives {planned.conversion.scheme.label()}"
        )
    try:
        matrices = {(matrix.role, matrix.expert): matrix for matrix in repo.layout(stored).matrices(stored)}
    except DamagedError as error:
        return str(error)
    error = _first(
        _check_matrix(
            weight, source, repo, stored, matrices.get((role, expert)) or _fused(matrices, role, expert), cast
        )
        for role, expert, weight in planned.weights
    )
    return error or _check_biases(planned, source, repo)


def _first(errors: Iterator[str | None]) -> str | None:
    return next((error for error in errors if error is not None), None)


def _fused(matrices: dict[tuple[str, int | None], Matrix], role: str, expert: int | None) -> Matrix:
    """`gate_up` of a source that has both in one tensor: the rows of gate and up together."""
    assert role == "gate_up"
    gate = matrices["gate", expert]
    return Matrix(role, 2 * gate.N, gate.K, expert)


def _check_matrix(
    weight: Weight, source: Source, repo: Repo, stored: Stored, matrix: Matrix, cast: object
) -> str | None:
    layout = repo.layout(stored)
    if (matrix.N, matrix.K) != (weight.N, weight.K):
        return f"{weight.name}: output is [{matrix.N}, {matrix.K}], source [{weight.N}, {weight.K}]"
    for start, stop, expected in decoded_blocks(weight, source):
        try:
            actual = layout.decode(stored, matrix, start, stop)
        except XpuquantError as error:
            return f"{weight.name}: {error}"
        error = difference(expected, actual, cast)
        if error is not None:
            return f"{weight.name}, rows {start}:{stop}: {error}"
    return None


def decoded_blocks(weight: Weight, source: Source) -> Iterator[tuple[int, int, Decoded]]:
    """The source's rows, decoded, block by block. Source slices are read in larger blocks than are decoded: strided
    reads want long runs, decoding wants the cache."""
    for top, bottom in row_blocks(weight.N, weight.K, 8, PIECE_BYTES):
        outer = weight.decode_inputs(top, bottom)
        arrays = [read(source, part) for part in outer]
        for start, stop in row_blocks(bottom - top, weight.K, 8, _BLOCK_CODES):
            inner = weight.decode_inputs(top + start, top + stop)
            narrowed = [_narrow(*parts) for parts in zip(inner, outer, arrays, strict=True)]
            yield top + start, top + stop, weight.decode(narrowed, top + start, top + stop)


def read(source: Source, part: Slice) -> Array:
    """A slice of the source as an array."""
    out = np.empty(part.nbytes, np.uint8)
    source.read_into(part, out)
    return as_array(part, out)


def _narrow(inner: Slice, outer: Slice, array: Array) -> Array:
    window = slice(inner.start - outer.start, inner.stop - outer.start)
    return array[(slice(None),) * inner.axis + (window,)]


def _check_rounded(weight: Weight, source: Source, repo: Repo) -> str | None:
    """A dequantized matrix: bf16 values are the exact ones, rounded once."""
    tensor = repo.tensors[f"{weight.name}.weight"]
    for start, stop, decoded in decoded_blocks(weight, source):
        expected = decoded.values().astype(np.float32).astype(numpy_dtype("BF16"))
        actual = repo.reader.read(Slice(tensor, start, stop))
        if not np.array_equal(expected.view(np.uint16), actual.view(np.uint16)):
            return f"{weight.name}, rows {start}:{stop}: not the source's values rounded to bf16"
    return None


def _check_biases(planned: PlannedModule, source: Source, repo: Repo) -> str | None:
    """Stacked expert biases: the same values in the rows of their matrices."""
    stack = planned.source
    if not isinstance(stack, ExpertStack) or not stack.biases:
        return None
    stored = repo.modules[stack.name]
    upper, down = stored.array("gate_up_proj_bias"), stored.array("down_proj_bias")
    half = upper.shape[1] // 2
    rows = {
        "gate_up": upper, "down": down,
        "gate": upper[:, 0::2] if stack.interleaved else upper[:, :half],
        "up": upper[:, 1::2] if stack.interleaved else upper[:, half:],
    }  # fmt: skip
    for role, slices in stack.biases.items():
        for expert, part in enumerate(slices):
            if not np.array_equal(read(source, part).reshape(-1), rows[role][expert]):
                return f"{stack.weights[role][expert].name}.bias differs"
    return None


def _same_bytes(source: Source, theirs: Slice, repo: Repo, ours: Slice) -> str | None:
    row_bytes = theirs.nbytes // max(theirs.stop, 1)
    for start, stop in row_blocks(theirs.stop, row_bytes, limit=4 << 20):
        before: Sequence[int] = read(source, Slice(theirs.tensor, start, stop)).reshape(-1).view(np.uint8)  # type: ignore[assignment]
        after = repo.reader.read(Slice(ours.tensor, start, stop)).reshape(-1).view(np.uint8)
        if not np.array_equal(before, after):
            return "bytes differ from the source's"
    return None
