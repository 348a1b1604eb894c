"""The decoded half of `diff`: modules that two repos store in other ways, compared by what they mean.

A side is a quantized checkpoint of any format that is read, a repo that was converted, or a model that is not
quantized. Matrices of one module meet by the module's name, role and expert, and are compared block by block: as codes
and scales first, which is exact and cheap, and where those differ as the numbers that a layer multiplies by. A matrix
that one side has in floats is compared as numbers. What is not compared so stays in the list of tensors that differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xpuquant.conversion.repo.converted import Repo, open_repo
from xpuquant.conversion.sources.base import Source, read_slice
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.conversion.verify.exactness import (
    BLOCK_CODES,
    difference_beside,
    find_matrix,
    in_rows,
    matrices_by_role,
    packed_blocks,
)
from xpuquant.conversion.verify.verdict import CONTRADICTIONS, contradiction
from xpuquant.errors import UsageError
from xpuquant.formats.checkpoint import Array, Slice, columns, rows
from xpuquant.formats.dtypes import BITS, FLOATS
from xpuquant.formats.layouts.base import Matrix, Stored
from xpuquant.formats.layouts.modules import ExpertStack, Module, gather_modules
from xpuquant.formats.readers.reading import read
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import QUANT_METHOD
from xpuquant.formats.weights.base import ROWS_MULTIPLE, Weight, row_blocks
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.floats import is_upended, view
from xpuquant.formats.weights.packed import Rows, rows_difference, unpacked_rows


@dataclass(frozen=True)
class ModuleValues:
    """A module that both sides have, each stored in its own way.

    elements    of its matrices
    differ      elements of other values
    max_abs     the largest difference of two finite values
    largest     the largest finite magnitude in A, to measure that by
    first       where the first difference is; None where there is none
    problem     why it could not be compared; None where it was
    """

    name: str
    elements: int
    differ: int = 0
    max_abs: float = 0.0
    largest: float = 0.0
    first: str | None = None
    problem: str | None = None

    @property
    def same(self) -> bool:
        return not self.differ and self.problem is None


@dataclass(frozen=True)
class View:
    """One `[N, K]` matrix of a side, to be read in blocks of rows."""

    N: int
    K: int

    def rows(self, start: int, stop: int) -> Rows:
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[int, int, Rows]]:
        """All rows, in blocks that suit the way it is stored."""
        for start, stop in row_blocks(self.N, self.K, ROWS_MULTIPLE, BLOCK_CODES):
            yield start, stop, self.rows(start, stop)


@dataclass(frozen=True)
class _WeightView(View):
    source: Source
    weight: Weight

    def rows(self, start: int, stop: int) -> Rows:
        recipe = self.weight.as_packed(start, stop)
        return in_rows(recipe.build([read_slice(self.source, part) for part in recipe.inputs]))

    def blocks(self) -> Iterator[tuple[int, int, Rows]]:
        for start, stop, block in packed_blocks(self.weight, self.source):
            yield start, stop, in_rows(block)


@dataclass(frozen=True)
class _StoredView(View):
    repo: Repo
    stored: Stored
    matrix: Matrix

    def rows(self, start: int, stop: int) -> Rows:
        return in_rows(self.repo.layout(self.stored).as_packed(self.stored, self.matrix, start, stop))


@dataclass(frozen=True)
class _FloatView(View):
    side: Side
    tensor: Tensor
    upended: bool = False

    def rows(self, start: int, stop: int) -> Rows:
        data = self.side.read((columns if self.upended else rows)(self.tensor, start, stop))
        values = np.ascontiguousarray(data.T if self.upended else data).astype(np.float64)
        one, none = np.ones((1, 1)), np.zeros(len(values), np.int64)
        return Decoded("float", values, one, none, np.zeros(values.shape[1], np.int64))


MatrixPlace = tuple[str, int | None]
"""Role and expert of a matrix in its module."""


class Side:
    """One of the two, opened: its modules and what belongs to none.

    source   the checkpoint that it is; None for a converted repo
    modules  name → module of the checkpoint, as the readers find it
    stored   name → module of the converted repo
    plain    name → float tensor that is no part of a quantized module
    dropped  tensors that say nothing: the readers leave them out of a conversion
    """

    def __init__(self, folder: Path) -> None:
        self.modules: dict[str, Module] = {}
        self.stored: Mapping[str, Stored] = {}
        self.repo: Repo | None = None
        self.source: Source | None = None
        self.dropped: set[str] = set()
        source = LocalSource(folder)
        if source.checkpoint.method == QUANT_METHOD:
            self.repo = open_repo(folder)
            self.stored = self.repo.modules
            plain: Mapping[str, Tensor] = self.repo.plain
        else:
            self.source = source
            plain = source.checkpoint.tensors
            if source.checkpoint.quantization:
                plain = self._read(source)
        self.plain = {name: tensor for name, tensor in plain.items() if tensor.dtype in FLOATS}

    def _read(self, source: Source) -> Mapping[str, Tensor]:
        reading = read(source.checkpoint)
        self.modules = {module.name: module for module in gather_modules(source.checkpoint, reading.weights)}
        used = {tensor.name for weight in reading.weights for tensor in weight.tensors}
        rest = {tensor.name: tensor for tensor in reading.rest}
        unread = {name for name in source.checkpoint.tensors if name not in used and name not in rest}
        self.dropped = {name for name in unread if not any(name.startswith(f"{at}.") for at in reading.refused)}
        return rest

    def read(self, box: Slice) -> Array:
        """A slice of one of its tensors."""
        if self.repo is not None:
            return self.repo.reader.read(box)
        assert self.source is not None
        return read_slice(self.source, box)

    def names(self) -> list[str]:
        """Its quantized modules."""
        return [*self.modules, *self.stored]

    def views(self, name: str) -> dict[MatrixPlace, View]:
        """The matrices of one of its modules."""
        if name in self.modules and self.source is not None:
            found = self.modules[name].matrices()
            return {(role, at): _WeightView(weight.N, weight.K, self.source, weight) for role, at, weight in found}
        stored = self.stored.get(name)
        if stored is None or self.repo is None:
            return {}
        matrices = matrices_by_role(self.repo, stored)
        return {place: _StoredView(m.N, m.K, self.repo, stored, m) for place, m in matrices.items()}

    def view(self, name: str, place: MatrixPlace, theirs: View) -> View | None:
        """The matrix in which this side has another side's; None where it has none."""
        mine = self.views(name).get(place)
        if mine is not None:
            return mine
        stored = self.stored.get(name)
        if stored is not None and self.repo is not None:
            matrix = find_matrix(matrices_by_role(self.repo, stored), *place)
            return _StoredView(matrix.N, matrix.K, self.repo, stored, matrix)
        return self._floats(name, place, theirs)

    def _floats(self, name: str, place: MatrixPlace, theirs: View) -> View | None:
        """The same matrix where it is not quantized."""
        weight = theirs.weight if isinstance(theirs, _WeightView) else None
        role, expert = place
        if weight is not None and weight.stack in self.plain and expert is not None:
            stack, upended = self.plain[weight.stack], is_upended(weight)
            return _FloatView(weight.N, weight.K, self, view(stack, stack.dtype, stack.shape[1:], expert), upended)
        below = name if expert is None else f"{name}.{expert}.{role}_proj"
        tensor = self.plain.get(f"{below if weight is None else weight.name}.weight")
        if tensor is None or len(tensor.shape) != 2:
            return None
        return _FloatView(*tensor.shape, self, tensor)

    def tensors_of(self, name: str, *, with_all: bool) -> set[str]:
        """The tensors whose meaning is compared where a module's matrices are.

        Args:
            with_all: what stands beside the matrices, biases of experts and scales of activations, is compared too.
        """
        if name in self.stored:
            tensors = self.stored[name].tensors.items()
            return {t.name for suffix, t in tensors if with_all or not suffix.endswith(("bias", "input_scale"))}
        if name not in self.modules:
            return set()
        module = self.modules[name]
        found = {tensor.name for _, _, weight in module.matrices() for tensor in weight.tensors}
        if with_all:
            biases = module.biases.values() if isinstance(module, ExpertStack) else ()
            return found | {part.tensor.name for parts in biases for part in parts}
        return {one for one in found if not one.endswith("input_scale")}


def open_sides(a: str, b: str) -> tuple[Side, Side] | str:
    """Both sides, or why they are not decoded."""
    for name in (a, b):
        if not Path(name).is_dir():
            return f"only folders here are decoded, {name} is none"
    try:
        return Side(Path(a)), Side(Path(b))
    except (UsageError, *CONTRADICTIONS) as error:
        return contradiction(error) if isinstance(error, CONTRADICTIONS) else str(error)


def compare_modules(ours: Side, theirs: Side, suspects: set[str]) -> tuple[list[ModuleValues], set[str]]:
    """Compare the modules to which tensors that differ belong.

    Args:
        suspects: tensors that are not the same bytes under the same name on both sides.

    Returns:
        What was found, and the tensors, of either side, that it speaks of.
    """
    # The side that is a checkpoint leads: its rows are read in larger blocks, and a stored module is asked for its.
    swapped = ours.source is None and theirs.source is not None
    lead, other = (theirs, ours) if swapped else (ours, theirs)
    found: list[ModuleValues] = []
    spoken = (ours.dropped | theirs.dropped) & suspects
    for name in dict.fromkeys([*lead.names(), *other.names()]):
        first, second = (lead, other) if name in lead.names() else (other, lead)
        both = name in first.names() and name in second.names()
        # Between a checkpoint and a conversion what stands beside the matrices is compared as well.
        with_all = both and (first.source is None) != (second.source is None)
        tensors = first.tensors_of(name, with_all=with_all) | second.tensors_of(name, with_all=with_all)
        if not tensors & suspects:
            continue
        try:
            result = _compare(name, first, second, swapped=first is not ours, with_all=with_all)
        except CONTRADICTIONS as error:
            result = ModuleValues(name, 0, problem=contradiction(error)), set()
        if result is not None:
            found.append(result[0])
            spoken |= tensors | result[1]
    return found, spoken


def _compare(
    name: str, first: Side, second: Side, *, swapped: bool, with_all: bool
) -> tuple[ModuleValues, set[str]] | None:
    """One module, and the float tensors that are it on the second side; None where that side has no such module."""
    places = first.views(name)
    pairs: list[tuple[str, View, View]] = []
    floats: set[str] = set()
    for (role, expert), mine in places.items():
        its = second.view(name, (role, expert), mine)
        if its is None:
            return None
        if isinstance(its, _FloatView):
            floats.add(its.tensor.name)
        where = "" if expert is None else f"expert {expert} {role}, "
        pairs.append((where, its, mine) if swapped else (where, mine, its))
    elements = sum(mine.N * mine.K for mine in places.values())
    total = ModuleValues(name, elements)
    for where, a, b in pairs:
        if (a.N, a.K) != (b.N, b.K):
            return ModuleValues(name, elements, problem=f"is [{a.N}, {a.K}] in A and [{b.N}, {b.K}] in B"), floats
        total = _add(total, where, a, b)
    if with_all:
        source, stored = (first, second) if first.source is not None else (second, first)
        assert source.source is not None
        wrong = difference_beside(source.modules[name], source.source, stored.stored[name])
        if wrong is not None:
            return ModuleValues(name, elements, problem=wrong), floats
    return total, floats


def _add(total: ModuleValues, where: str, a: View, b: View) -> ModuleValues:
    """What was found so far, and one more matrix."""
    leads = isinstance(a, _WeightView) or not isinstance(b, _WeightView)
    differ, max_abs, largest, first = total.differ, total.max_abs, total.largest, total.first
    for start, stop, block in (a if leads else b).blocks():
        x, y = (block, b.rows(start, stop)) if leads else (a.rows(start, stop), block)
        if type(x) is type(y) and rows_difference(x, y) is None:
            continue
        u, v = unpacked_rows(x).values(), unpacked_rows(y).values()
        largest = max(largest, _largest(u))
        wrong = (u != v) & ~(np.isnan(u) & np.isnan(v))
        if not wrong.any():
            continue
        if first is None:
            n, k = np.argwhere(wrong)[0]
            first = f"{where}[{start + n}, {k}]: {_shown(u[n, k], v[n, k])}"
        differ += int(np.count_nonzero(wrong))
        max_abs = max(max_abs, _largest(u[wrong] - v[wrong]))
    return ModuleValues(total.name, total.elements, differ, max_abs, largest, first)


def _shown(a: float, b: float) -> str:
    """Two values that differ, with as many digits as tell them apart."""
    pairs = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in (3, 6, 17))
    return " against ".join(next(pair for pair in pairs if pair[0] != pair[1]))


def _largest(values: Array) -> float:
    """The largest finite magnitude."""
    magnitudes = np.abs(values)
    return float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))


def same_floats(ours: Side, theirs: Side, names: Sequence[str]) -> dict[str, ModuleValues]:
    """Unquantized tensors of one shape and two float types, compared as numbers."""
    found = {}
    for name in names:
        a, b = ours.plain.get(name), theirs.plain.get(name)
        if a is None or b is None or a.shape != b.shape:
            continue
        count = a.nbytes * 8 // BITS[a.dtype]
        K = a.shape[-1] if len(a.shape) > 1 else 1
        N = count // K if K else 0
        views = [_FloatView(N, K, of, view(one, one.dtype, (N, K))) for of, one in ((ours, a), (theirs, b))]
        found[name] = _add(ModuleValues(name, count), "", *views)
    return found
