"""Exactness: every value of the output decodes to exactly what the source decodes to.

What flows: a worker takes a module, walks its matrices in blocks of rows that fit the cache, decodes the block from the
source and from the output to the common form of `weights/decoded.py`, by code that shares nothing with the conversion's
fast path, and compares integers and scale values for equality. The same pass counts what `sanity.py` warns of
and digests the decoded form, so that a later check needs no source (`recorded.py`). Unquantized tensors are compared
byte by byte. Scales that were rounded on request are compared with the rounded ones, and what that changed is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.plan.survey import PlannedModule
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.converted import ReadableRepo, StoredModules
from xpuquant.conversion.sources.base import Source, read_slice
from xpuquant.conversion.verify.column_cache import ColumnCache
from xpuquant.conversion.verify.context import Check, Origin
from xpuquant.conversion.verify.digests import MatrixDigest, module_digest
from xpuquant.conversion.verify.proof import Checked, Claim, Rounding
from xpuquant.conversion.verify.rounding import RoundedScales, change
from xpuquant.conversion.verify.sanity import SanityCount
from xpuquant.conversion.verify.threads import Call
from xpuquant.conversion.verify.verdict import CONTRADICTIONS, Sanity, contradiction
from xpuquant.errors import DamagedError
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.checkpoint import Array, Slice, as_bytes, columns, rows, whole
from xpuquant.formats.layouts.base import Matrix, Stored
from xpuquant.formats.layouts.modules import ExpertStack, Module
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import PIECE_BYTES, ROWS_MULTIPLE, Arrays, Recipe, Weight, row_blocks
from xpuquant.formats.weights.decoded import Decoded, in_order, to_bf16
from xpuquant.formats.weights.floats import FloatWeight, is_upended, view
from xpuquant.formats.weights.packed import PackedColumns, Rows, rows_difference
from xpuquant.formats.weights.parts import BiasRows

BLOCK_CODES = 4 << 20
"""Codes decoded at once: a matrix of a small expert in one go, for every block costs the same few hundred microseconds
beside its bytes; both sides and their temporaries still stay in the third-level cache."""

R = TypeVar("R")

Matrices = Mapping[tuple[str, int | None], Matrix]
"""The matrices of a stored module by role and expert."""


Found = tuple[Checked, Sanity | None]
Compare = Callable[[], Found]

Known = Mapping[str, Found]
"""Module or unquantized tensor → what a comparison found of it, and counted."""

NOTHING: Known = {}


def check_exact(origin: Origin, check: Check, known: Known = NOTHING) -> tuple[list[Checked], dict[str, Sanity]]:
    """Compare everything the plan describes with everything the repo holds.

    Args:
        known: what need not be compared again, because the very bytes that the repo holds have been.

    Returns:
        The verdict on each module and unquantized tensor, with its digest; what was counted, per module.

    Raises:
        DamagedError: the repo's tensors are not those of the plan, by name, dtype or shape.
        EnvironmentFault: unreadable files.
    """
    plan, source, repo = origin.plan, origin.source, check.repo
    _same_tensors(plan, repo)

    def module(planned: PlannedModule) -> tuple[Checked, Sanity | None]:
        return _ModuleCheck(planned, source, check).result()

    def dequantized(name: str, weights: Sequence[Weight]) -> tuple[Checked, Sanity | None]:
        return _check_dequantized(repo.tensors[name], weights, source, repo, check.progress), None

    def passed(tensor: Tensor) -> tuple[Checked, Sanity | None]:
        return _check_bytes(source, tensor, repo, check.progress), None

    def bias(split: BiasRows, name: str) -> tuple[Checked, Sanity | None]:
        return _check_split_bias(split, source, repo.tensors[name], repo), None

    # Largest first, so that no worker is left with a long one at the end.
    largest = sorted(plan.modules, key=lambda planned: -planned.nbytes)
    calls: list[tuple[str, Compare, Iterable[str]]] = [
        (planned.conversion.name, partial(module, planned), (tensor.name for tensor in planned.conversion.tensors))
        for planned in largest
        if planned.conversion.scheme is not None
    ]
    calls += [(name, partial(dequantized, name, weights), (name,)) for name, weights in _by_tensor(plan).items()]
    calls += [(one.name, partial(passed, one), (one.name,)) for one in plan.passed]
    calls += [(name, partial(bias, split, name), (name,)) for name, split in plan.split_biases.items()]

    def once(name: str, call: Compare, tensors: Sequence[Tensor]) -> Found:
        found = known[name] if name in known else call()
        check.done_with(tensors)
        return found

    held = [(name, call, [repo.tensors[tensor] for tensor in tensors]) for name, call, tensors in calls]
    results = check.run([Call(partial(once, *of), of[-1]) for of in held])
    return [checked for checked, _ in results], {c.name: sanity for c, sanity in results if sanity is not None}


def _same_tensors(plan: Plan, repo: ReadableRepo) -> None:
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


class _ModuleCheck:
    """One module against the source: what its matrices have in common while they are compared."""

    def __init__(self, planned: PlannedModule, source: Source, check: Check) -> None:
        scheme, stored = planned.conversion.scheme, check.repo.modules.get(planned.conversion.name)
        assert scheme is not None, "a dequantized module is compared as bf16"
        self._planned = planned
        self._source = source
        self._check = check
        self._scheme = scheme
        self._stored = stored if stored is None else replace(stored, load=ColumnCache(stored.load))
        self._sanity = SanityCount(scheme.symmetric)
        self._digests: list[MatrixDigest] = []
        self._rounding = None if planned.conversion.rounded is None else Rounding(planned.conversion.rounded)

    def result(self) -> tuple[Checked, Sanity | None]:
        """What was found, and counted where all of it could be decoded."""
        name, weights, stored = self._planned.conversion.name, self._planned.weights, self._stored
        if stored is None or stored.scheme != self._scheme:
            said = stored.scheme.label() if stored else "nothing"
            return self._checked(f"config.json says {said}, the source gives {self._scheme.label()}"), None
        try:
            matrices = matrices_by_role(self._check.repo, stored)
            for role, expert, weight in weights:
                wrong = self._compare(weight, stored, find_matrix(matrices, role, expert))
                if wrong is not None:
                    return self._checked(wrong if weight.name == name else f"{weight.name}: {wrong}"), None
                self._check.progress(self._planned.nbytes // max(len(weights), 1))
            wrong = difference_beside(self._planned.source, self._source, stored)
        except CONTRADICTIONS as fault:
            return self._checked(contradiction(fault)), None
        return self._checked(wrong, module_digest(stored, self._digests)), self._sanity.sanity

    def _checked(self, error: str | None, digest: str | None = None) -> Checked:
        name, matrices = self._planned.conversion.name, len(self._planned.weights)
        claim = Claim.EXACT if self._rounding is None else Claim.ROUNDED
        return Checked(name, matrices, error, digest, claim, self._rounding)

    def _compare(self, weight: Weight, stored: Stored, matrix: Matrix) -> str | None:
        """The first difference of a matrix."""
        if (matrix.N, matrix.K) != (weight.N, weight.K):
            return f"output is [{matrix.N}, {matrix.K}], source [{weight.N}, {weight.K}]"
        layout, digest = self._check.repo.layout(stored), MatrixDigest(matrix)
        rounded = None if self._rounding is None else RoundedScales(self._rounding.dtype)
        # Rows that one row of scales covers: a block of rows may begin among them.
        covered = weight.block[0] if isinstance(weight, FloatWeight) else 1
        for start, stop, expected in _blocks(weight.as_compared, weight, self._source):
            if rounded is not None:
                expected = rounded.round(expected, continued=start % covered != 0)
            try:
                actual = in_rows(layout.as_packed(stored, matrix, start, stop))
            except CONTRADICTIONS as fault:
                return contradiction(fault)
            wrong = rows_difference(expected if isinstance(expected, PackedColumns) else in_rows(expected), actual)
            if wrong is not None:
                return f"rows {start}:{stop}: {wrong}"
            digest.update(actual)
            self._sanity.update(actual)
        self._digests.append(digest)
        if rounded is None or self._rounding is None:
            return None
        self._rounding += rounded.rounding
        wrong = rounded.error()
        return wrong and f"{_scale_name(weight)}: {wrong}"


def _scale_name(weight: Weight) -> str:
    """The source's tensor of a weight's scales."""
    names = (tensor.name for tensor in weight.tensors)
    return next((name for name in names if "scale" in name.rpartition(".")[2]), weight.name)


def matrices_by_role(repo: StoredModules, stored: Stored) -> Matrices:
    """The matrices of a stored module by (role, expert). Raises DamagedError where the contract is broken."""
    return {(matrix.role, matrix.expert): matrix for matrix in repo.layout(stored).matrices(stored)}


def find_matrix(matrices: Matrices, role: str, expert: int | None) -> Matrix:
    """One matrix, or `gate_up` of a source that has both in one: the rows of gate and up as they are stored.

    Raises:
        DamagedError: the module has no such matrix.
    """
    fused = role == "gate_up"
    matrix = matrices.get(("gate" if fused else role, expert))
    if matrix is None:
        raise DamagedError(f"the output has no {role} matrix of expert {expert}")
    return Matrix(role, 2 * matrix.N, matrix.K, expert) if fused else matrix


def in_rows(rows: Rows) -> Rows:
    """The same with its codes contiguous: comparing, digesting and counting walk them row by row."""
    codes = rows.codes
    return rows if codes.flags.c_contiguous else replace(rows, codes=in_order(codes))


def decoded_blocks(weight: Weight, source: Source) -> Iterator[tuple[int, int, Decoded]]:
    """The source's rows, decoded, block by block."""
    return _blocks(weight.decoded, weight, source)


def packed_blocks(weight: Weight, source: Source) -> Iterator[tuple[int, int, Rows]]:
    """The source's rows, packed where they can be, block by block."""
    return _blocks(weight.as_packed, weight, source)


def _blocks(
    recipe_of: Callable[[int, int], Recipe[Callable[[Arrays], R]]], weight: Weight, source: Source
) -> Iterator[tuple[int, int, R]]:
    """Slices that are parts of longer rows are read in larger blocks than rows are made: strided reads want long runs,
    arithmetic wants the cache."""
    of_all = recipe_of(0, weight.N)
    row_bytes = sum(part.nbytes for part in of_all.inputs) // weight.N
    is_cut = any(part.axis == 1 for part in of_all.inputs)
    limit = PIECE_BYTES if is_cut else BLOCK_CODES * row_bytes // weight.K
    for top, bottom in row_blocks(weight.N, row_bytes, ROWS_MULTIPLE, limit):
        outer = of_all if bottom - top == weight.N else recipe_of(top, bottom)
        arrays = [read_slice(source, part) for part in outer.inputs]
        for start, stop in row_blocks(bottom - top, weight.K, ROWS_MULTIPLE, BLOCK_CODES):
            if stop - start == bottom - top:
                yield top, bottom, outer.build(arrays)
                continue
            recipe = recipe_of(top + start, top + stop)
            both = zip(recipe.inputs, outer.inputs, arrays, strict=True)
            yield top + start, top + stop, recipe.build([part.inside(of, array) for part, of, array in both])


def _by_tensor(plan: Plan) -> dict[str, list[Weight]]:
    """Dequantized tensor → the matrices in it: one, or those of experts."""
    found: dict[str, list[Weight]] = {}
    for planned in plan.dequantized:
        for _, _, weight in planned.weights:
            found.setdefault(weight.stack or f"{weight.name}.weight", []).append(weight)
    return found


def matrices_in(tensor: Tensor) -> int:
    """Matrices of a dequantized tensor: `[N, K]`, or those of experts `[E, N, K]`."""
    return tensor.shape[0] if len(tensor.shape) == 3 else 1


def _check_dequantized(
    tensor: Tensor, weights: Sequence[Weight], source: Source, repo: ReadableRepo, progress: Progress
) -> Checked:
    """A dequantized tensor: bf16 values are the exact ones, rounded once, and none became infinite or 0; and the sha256
    of its bytes."""
    rounding, matrices = Rounding("BF16"), matrices_in(tensor)
    for weight in weights:
        changed, error = _dequantized(weight, source, repo)
        rounding += changed
        if error is not None:
            return Checked(tensor.name, matrices, error, None, Claim.DEQUANTIZED, rounding)
    digest = tensor_digest(repo, tensor, progress)
    return Checked(tensor.name, matrices, None, digest, Claim.DEQUANTIZED, rounding)


def _dequantized(weight: Weight, source: Source, repo: ReadableRepo) -> tuple[Rounding, str | None]:
    """What rounding changed in a dequantized matrix, and the first difference."""
    tensor, turned = _dequantized_tensor(weight, repo), is_upended(weight)
    rounding = Rounding("BF16")
    for start, stop, decoded in decoded_blocks(weight, source):
        values = decoded.values()
        expected = to_bf16(values)
        actual = repo.read((columns if turned else rows)(tensor, start, stop))
        actual = np.ascontiguousarray(actual.T if turned else actual)
        if not np.array_equal(expected.view(np.uint16), actual.view(np.uint16)):
            return rounding, f"{weight.name}, rows {start}:{stop}: not the source's values rounded to bf16"
        changed, lost = change("BF16", values, expected.astype(np.float64))
        rounding += changed
        if lost.any():
            became = f"{values[lost][0]:g} becomes {expected[lost][0]:g}"
            what = f"{int(np.count_nonzero(lost))} values do not fit bf16 ({became})"
            return rounding, f"{weight.name}, rows {start}:{stop}: {what}"
    return rounding, None


def _dequantized_tensor(weight: Weight, repo: ReadableRepo) -> Tensor:
    """The bf16 `[N, K]` of a matrix (`[K, N]` where upended): a tensor, or an expert's part of one."""
    if not weight.stack:
        return repo.tensors[f"{weight.name}.weight"]
    expert = expert_of(weight.name)
    assert expert is not None, "only experts are stacked"
    stack = repo.tensors[weight.stack]
    return view(stack, stack.dtype, stack.shape[1:], expert[1])


def difference_beside(module: Module, source: Source, stored: Stored) -> str | None:
    """The first difference of what a stored module has beside its matrices: biases of experts, activation scales."""
    return _check_biases(module, source, stored) or _check_input_scale(module, source, stored)


def _check_biases(stack: Module, source: Source, stored: Stored) -> str | None:
    """Stacked expert biases: the same values in the rows of their matrices."""
    if not isinstance(stack, ExpertStack) or not stack.biases:
        return None
    upper, down = (stored.array(f"{part}_bias") for part in stored.scheme.stacks)
    half = upper.shape[1] // 2
    # Halves that were joined to one matrix have two biases, in the order of its rows.
    alternate = stack.interleaved and "gate" in stack.weights
    rows = {
        "gate_up": upper,
        "down": down,
        "gate": upper[:, 0::2] if alternate else upper[:, :half],
        "up": upper[:, 1::2] if alternate else upper[:, half:],
    }
    if not stack.gated:
        rows["up"] = upper
    for role, slices in stack.biases.items():
        for expert, part in enumerate(slices):
            if not np.array_equal(read_slice(source, part).reshape(-1), rows[role][expert], equal_nan=True):
                return f"{part.tensor.name} differs (bias of {role}, expert {expert})"
    return None


def _check_input_scale(module: Module, source: Source, stored: Stored) -> str | None:
    """A static activation scale: the same value, widened to float32."""
    if not stored.scheme.input_scale:
        return None
    held = stored.array("input_scale").reshape(-1)
    for _, _, weight in module.matrices():
        tensor = getattr(weight, "input_scale", None)
        if tensor is None:
            return f"{weight.name}.input_scale: the source has none"
        expected = read_slice(source, whole(tensor)).reshape(-1)
        if not np.array_equal(expected.astype(np.float32), held, equal_nan=True):
            return f"{weight.name}.input_scale is {held[0]}, source has {expected[0]}"
    return None


def _check_bytes(source: Source, tensor: Tensor, repo: ReadableRepo, progress: Progress) -> Checked:
    """An unquantized tensor: the same bytes, and their sha256."""
    digest = hashlib.sha256()
    for start, stop in byte_blocks(tensor):
        before = read_slice(source, Slice(as_bytes(tensor), start, stop))
        after = read_bytes(repo, repo.tensors[tensor.name], start, stop)
        if not np.array_equal(before, after):
            return Checked(tensor.name, 0, "bytes differ from the source's")
        digest.update(after.data)
        progress(after.size)
    return Checked(tensor.name, 0, None, digest.hexdigest())


def _check_split_bias(split: BiasRows, source: Source, held: Tensor, repo: ReadableRepo) -> Checked:
    """A bias out of a stacked or fused one: the same values, and the sha256 of its bytes."""
    actual = repo.read(whole(held))
    expected = split.values().build([read_slice(source, part) for part in split.parts])
    if not np.array_equal(expected, actual, equal_nan=True):
        return Checked(held.name, 0, "differs from its rows of the source's")
    return Checked(held.name, 0, None, hashlib.sha256(actual.view(np.uint8).data).hexdigest())


def byte_blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Bytes of a tensor, a few megabytes at a time."""
    return row_blocks(tensor.nbytes, 1, limit=4 << 20)


def read_bytes(repo: ReadableRepo, tensor: Tensor, start: int, stop: int) -> Array:
    """Bytes `start:stop` of one of the repo's tensors."""
    return repo.read(Slice(as_bytes(tensor), start, stop))


def tensor_digest(repo: ReadableRepo, tensor: Tensor, progress: Progress) -> str:
    """sha256 of the bytes of one of the repo's tensors, in hex."""
    digest = hashlib.sha256()
    for start, stop in byte_blocks(tensor):
        data = read_bytes(repo, tensor, start, stop)
        digest.update(data.data)
        progress(data.size)
    return digest.hexdigest()
