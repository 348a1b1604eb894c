"""The decoded half of `diff`: modules that two repos store in other ways, compared by what they mean.

Matrices of one module meet by the module's name, role and expert (`diff_sides.py`), and are compared block by block: as
codes and scales first, which is exact and cheap, and where those differ as the numbers that a layer multiplies by. A
matrix that one side has in floats is compared as numbers. What is not compared so stays in the list of tensors that
differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from xpuquant.conversion.diff_sides import FloatView, MatrixPlace, Side, View, WeightView
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.verify.exactness import difference_beside
from xpuquant.conversion.verify.verdict import CONTRADICTIONS, contradiction
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.dtypes import BITS
from xpuquant.formats.weights.floats import view
from xpuquant.formats.weights.packed import rows_difference, unpacked_rows
from xpuquant.values import frozen


@frozen(sealed=True)
class ModuleValues:
    """A module that both sides have, each stored in its own way.

    elements    of its matrices
    differ      elements of other values
    max_abs     the largest difference of two finite values
    largest     the largest finite magnitude in A, to measure that by
    first       where the first difference is; None where there is none
    beside      what differs beside its matrices: a bias of an expert, a scale of activations; None where nothing does
    problem     why it could not be compared; None where it was
    """

    name: str
    elements: int
    differ: int = 0
    max_abs: float = 0.0
    largest: float = 0.0
    first: str | None = None
    beside: str | None = None
    problem: str | None = None

    @property
    def same(self) -> bool:
        return not self.differ and self.beside is None and self.problem is None


@frozen(sealed=True)
class _Pair:
    """A module that is stored otherwise on the two sides.

    matrices  where in the module, the matrix in A, the matrix in B
    tensors   of either side, that are spoken of when they are compared
    """

    name: str
    first: Side
    second: Side
    elements: int
    matrices: list[tuple[str, View, View]]
    tensors: set[str]

    @property
    def nbytes(self) -> int:
        """Of its tensors on both sides."""
        return sum(side.nbytes(self.tensors) for side in (self.first, self.second))


def fetch_modules(ours: Side, theirs: Side, suspects: set[str], reporter: Reporter) -> None:
    """Download the shards of the modules to which tensors that differ belong, where a side is on the Hub.

    Raises: as `Side.fetch`.
    """
    pairs, _ = _pairs(ours, theirs, suspects)
    for side in (ours, theirs):
        side.fetch({name for pair in pairs for name in pair.tensors}, reporter)


def compare_modules(
    ours: Side, theirs: Side, suspects: set[str], reporter: Reporter
) -> tuple[list[ModuleValues], set[str]]:
    """Compare the modules to which tensors that differ belong.

    Args:
        suspects: tensors that are not the same bytes under the same name on both sides.

    Returns:
        What was found, and the tensors, of either side, that it speaks of.
    """
    pairs, wrong = _pairs(ours, theirs, suspects)
    found = list(wrong.values())
    spoken = (ours.dropped | theirs.dropped) & suspects
    spoken |= set[str]().union(*(_tensors(name, ours, theirs) for name in wrong))
    fetch_modules(ours, theirs, suspects, reporter)
    reporter.phase("decode", sum(pair.nbytes for pair in pairs))
    for pair in pairs:
        try:
            found.append(_compare(pair))
        except CONTRADICTIONS as error:
            found.append(ModuleValues(pair.name, pair.elements, problem=contradiction(error)))
        spoken |= pair.tensors
        reporter.advance(pair.nbytes)
    return found, spoken


def _pairs(ours: Side, theirs: Side, suspects: set[str]) -> tuple[list[_Pair], dict[str, ModuleValues]]:
    """Modules that both sides have and store otherwise, and those of which that cannot be told, with the reason."""
    pairs: list[_Pair] = []
    wrong: dict[str, ModuleValues] = {}
    for name, first, second in _leading(ours, theirs):
        try:
            pair = _paired(name, first, second, suspects, swapped=first is not ours)
        except CONTRADICTIONS as error:
            wrong[name] = ModuleValues(name, 0, problem=contradiction(error))
            continue
        pairs += [] if pair is None else [pair]
    return pairs, wrong


def _leading(ours: Side, theirs: Side) -> Iterator[tuple[str, Side, Side]]:
    """Every module, the side whose matrices are walked, and the one that is asked for its. A checkpoint leads: its rows
    are read in larger blocks."""
    lead, other = (theirs, ours) if ours.is_converted and not theirs.is_converted else (ours, theirs)
    for name in dict.fromkeys([*lead.names(), *other.names()]):
        yield (name, lead, other) if name in lead.names() else (name, other, lead)


def _tensors(name: str, first: Side, second: Side) -> set[str]:
    """A module's tensors, of both sides, whose meaning is compared; those beside its matrices where they can be."""
    both = name in first.names() and name in second.names()
    mixed = both and first.is_converted != second.is_converted
    stacks = first.biases(name) is not None and second.biases(name) is not None
    return set[str]().union(
        *(side.tensors_of(name, biases=mixed or stacks, input_scales=mixed) for side in (first, second))
    )


def _paired(name: str, first: Side, second: Side, suspects: set[str], *, swapped: bool) -> _Pair | None:
    """A module's matrices on both sides; None where it is the same, or the second side has no such module."""
    tensors = _tensors(name, first, second)
    if not tensors & suspects:
        return None
    matrices: list[tuple[str, View, View]] = []
    places = first.views(name)
    for (role, expert), mine in places.items():
        found = _met(name, (role, expert), mine, first, second)
        if found is None:
            return None
        for part, of_first, of_second in found:
            where = "" if expert is None else f"expert {expert} {part}, "
            matrices.append((where, of_second, of_first) if swapped else (where, of_first, of_second))
            held = of_second.float_tensor()
            tensors |= set() if held is None else {held.name}
    elements = sum(mine.N * mine.K for mine in places.values())
    return _Pair(name, first, second, elements, matrices, tensors)


def _met(name: str, place: MatrixPlace, mine: View, first: Side, second: Side) -> list[tuple[str, View, View]] | None:
    """A matrix of the first side, and what the second has of it: the same matrix, or gate and up in two, where the
    first has both in one; None where it has not."""
    its = second.view(name, place, mine)
    if its is not None:
        return [(place[0], mine, its)]
    if place[0] != "gate_up":
        return None
    parts = []
    for (role, expert), half in first.halves(name, place, mine).items():
        its = second.view(name, (role, expert), half)
        if its is None:
            return None
        parts.append((role, half, its))
    return parts


def _compare(pair: _Pair) -> ModuleValues:
    """One module: its matrices, and what both sides have beside them."""
    total = ModuleValues(pair.name, pair.elements)
    for where, a, b in pair.matrices:
        if (a.N, a.K) != (b.N, b.K):
            return replace(total, problem=f"{where}is [{a.N}, {a.K}] in A and [{b.N}, {b.K}] in B")
        total = _add(total, where, a, b)
    return replace(total, beside=_difference_beside(pair))


def _difference_beside(pair: _Pair) -> str | None:
    """The first difference of biases of experts and of scales of activations."""
    name, first, second = pair.name, pair.first, pair.second
    if first.is_converted != second.is_converted and name in first.names() and name in second.names():
        checkpoint, repo = (second, first) if first.is_converted else (first, second)
        return difference_beside(checkpoint.modules[name], checkpoint.source, repo.stored[name])
    if first.biases(name) is None or second.biases(name) is None:
        return None
    mine, other = first.bias_values(name), second.bias_values(name)
    if mine.keys() != other.keys():
        return "only one side has biases of its experts"
    for (role, expert), values in mine.items():
        if not np.array_equal(values, other[role, expert], equal_nan=True):
            return f"the bias of {role}, expert {expert}, differs"
    return None


def _add(total: ModuleValues, where: str, a: View, b: View) -> ModuleValues:
    """What was found so far, and one more matrix."""
    leads = isinstance(a, WeightView) or not isinstance(b, WeightView)
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


def same_floats(ours: Side, theirs: Side, names: Sequence[str], reporter: Reporter) -> dict[str, ModuleValues]:
    """Unquantized tensors of one shape and two float types, compared as numbers."""
    found = {}
    pairs = {name: (ours.plain.get(name), theirs.plain.get(name)) for name in names}
    alike = {name: (a, b) for name, (a, b) in pairs.items() if a is not None and b is not None and a.shape == b.shape}
    for side in (ours, theirs):
        side.fetch(alike, reporter)
    for name, (a, b) in alike.items():
        count = a.nbytes * 8 // BITS[a.dtype]
        K = a.shape[-1] if len(a.shape) > 1 else 1
        N = count // K if K else 0
        views = [FloatView(N, K, of, view(one, one.dtype, (N, K))) for of, one in ((ours, a), (theirs, b))]
        found[name] = _add(ModuleValues(name, count), "", *views)
    return found
