"""A matrix whose rows are those of several source matrices, and one whose rows are some of a source matrix's.

Producers fuse gate and up: all gate rows, then all up rows, or alternating as in gpt-oss (`split_gate_up` undoes it).
Some cut the fused axis in two without undoing its order: versions of llm-compressor saved the first half of gpt-oss's
alternating rows as `gate_proj` and the second as `up_proj`. `join_rows` puts them in the order of the fused axis again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from xpuquant.formats.checkpoint import Array, Slice, rows
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD
from xpuquant.formats.weights.base import (
    ArrayRecipe,
    Arrays,
    DecodedRecipe,
    FillRecipe,
    Recipe,
    RowsRecipe,
    Weight,
    all_inputs,
    deal,
)
from xpuquant.formats.weights.decoded import Decoded, Scaled
from xpuquant.formats.weights.floats import FloatWeight
from xpuquant.formats.weights.integers import OCTET_ZERO, IntWeight
from xpuquant.formats.weights.packed import WORD_ZERO, Packed, Rows, unpacked_rows
from xpuquant.values import frozen


@frozen
class Window:
    """Rows `start:stop` of one of the joined matrices. May be empty: then it is listed for its inputs, which keep
    their places in every recipe.

    place  which rows of the asked-for ones these are
    """

    start: int
    stop: int
    place: slice

    @property
    def empty(self) -> bool:
        return self.start >= self.stop


def _windows(members: tuple[Weight, ...], start: int, stop: int) -> list[Window]:
    """What rows `start:stop` of the joined matrix are, one window to a member."""
    found: list[Window] = []
    top = 0
    for member in members:
        first, last = (min(max(at - top, 0), member.N) for at in (start, stop))
        found.append(Window(first, last, slice(top + first - start, top + last - start)))
        top += member.N
    return found


@frozen(kw_only=True)
class JoinedRows(Weight):
    """The rows of `members`, in order. Every member has the same K and the same groups of columns."""

    members: tuple[Weight, ...]

    @property
    def kind(self) -> str:
        return self.members[0].kind

    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        windows = _windows(self.members, start, stop)
        recipes = [
            member.decoded(window.start, window.stop) for member, window in zip(self.members, windows, strict=True)
        ]

        def build(arrays: Arrays) -> Decoded:
            each = zip(windows, recipes, deal(recipes, arrays), strict=True)
            return _stacked([recipe.build(mine) for window, recipe, mine in each if not window.empty])

        return Recipe(all_inputs(recipes), build)

    def as_packed(self, start: int, stop: int) -> RowsRecipe:
        windows = _windows(self.members, start, stop)
        recipes = [
            member.as_packed(window.start, window.stop) for member, window in zip(self.members, windows, strict=True)
        ]

        def build(arrays: Arrays) -> Rows:
            each = zip(windows, recipes, deal(recipes, arrays), strict=True)
            members = [recipe.build(mine) for window, recipe, mine in each if not window.empty]
            packed = [rows for rows in members if isinstance(rows, Packed)]
            if len(packed) == len(members):
                return _stacked_packed(packed)
            return _stacked([unpacked_rows(rows) for rows in members])

        return Recipe(all_inputs(recipes), build)


def _stacked(decoded: list[Decoded]) -> Decoded:
    """Rows of several weights as those of one."""
    codes = np.concatenate([each.codes for each in decoded])
    return Decoded(decoded[0].number, codes, *_stacked_scales(decoded))


def _stacked_packed(packed: list[Packed]) -> Packed:
    """The same of packed rows."""
    zeros = None
    if any(each.zeros is not None for each in packed):
        zeros = np.concatenate([each.zero_points() for each in packed])
    codes = np.concatenate([each.codes for each in packed])
    return Packed(packed[0].number, codes, zeros, *_stacked_scales(packed))


def _stacked_scales(rows: Sequence[Scaled]) -> tuple[Array, Array, Array]:
    """(scale, row, col) of rows of several weights."""
    tops = np.cumsum([0] + [len(each.scale) for each in rows[:-1]])
    row = np.concatenate([each.row + top for each, top in zip(rows, tops, strict=True)])
    scales = [each.scale for each in rows]
    if len({scale.dtype for scale in scales}) > 1:
        # float32 has every value of each; there is no other dtype that exponents and bfloat16 have in common.
        scales = [scale.astype(np.float32) for scale in scales]
    return np.concatenate(scales), row, rows[0].col


@frozen(kw_only=True)
class JoinedIntRows(JoinedRows, IntWeight):
    """Joined integer weights, for the layouts that take those. `groups_of` is that of any member in act-order."""

    members: tuple[IntWeight, ...]

    def words(self, start: int, stop: int) -> FillRecipe:
        windows = _windows(self.members, start, stop)
        each = zip(self.members, windows, strict=True)
        return _filled(windows, [member.words(window.start, window.stop) for member, window in each])

    def octets(self, start: int, stop: int) -> FillRecipe:
        windows = _windows(self.members, start, stop)
        each = zip(self.members, windows, strict=True)
        return _filled(windows, [member.octets(window.start, window.stop) for member, window in each])

    def scales(self) -> ArrayRecipe:
        return _side_by_side([member.scales() for member in self.members])

    def zeros(self, start: int, stop: int) -> ArrayRecipe:
        windows = _windows(self.members, start, stop)
        each = zip(self.members, windows, strict=True)
        return _side_by_side([self._zeros_of(member, window.start, window.stop) for member, window in each])

    def _zeros_of(self, member: IntWeight, start: int, stop: int) -> ArrayRecipe:
        """`zeros`, and 8 or 128 for a member that needs none beside one that does."""
        needed = member.has_octet_zeros if self.bits == 8 else member.has_zero_points
        if needed:
            return member.zeros(start, stop)
        zero = OCTET_ZERO if self.bits == 8 else WORD_ZERO
        return Recipe((), lambda arrays: np.full((member.groups, stop - start), zero, np.uint8))


def _filled(windows: list[Window], recipes: list[FillRecipe]) -> FillRecipe:
    """The rows of joined matrices, each filled by its own."""

    def fill(arrays: Arrays, out: Array) -> None:
        for window, recipe, mine in zip(windows, recipes, deal(recipes, arrays), strict=True):
            if not window.empty:
                recipe.build(mine, out[window.place])

    return Recipe(all_inputs(recipes), fill)


def _side_by_side(recipes: list[ArrayRecipe]) -> ArrayRecipe:
    """`[G, N]` arrays as one, the columns of each after those of the one before."""

    def build(arrays: Arrays) -> Array:
        each = zip(recipes, deal(recipes, arrays), strict=True)
        return np.concatenate([recipe.build(mine) for recipe, mine in each], axis=1)

    return Recipe(all_inputs(recipes), build)


def join_rows(name: str, first: Weight, second: Weight, fact: str) -> Weight:
    """The rows of `first`, then those of `second`, as one weight called `name`."""
    joined = {
        "name": name,
        "N": first.N + second.N,
        "tensors": (*first.tensors, *second.tensors),
        "facts": tuple(dict.fromkeys((*first.facts, *second.facts, fact))),
        "bias": None,
    }
    if isinstance(first, IntWeight) and isinstance(second, IntWeight):
        joined |= {
            "bits": max(first.bits, second.bits),
            "symmetric": first.symmetric and second.symmetric,
            "groups_of": first.groups_of if second.groups_of is None else second.groups_of,
        }
        return JoinedIntRows(**(_common(IntWeight, first) | joined), members=(first, second))
    return JoinedRows(**(_common(Weight, first) | joined), members=(first, second))


def _common(kind: type[Any], weight: Weight) -> dict[str, Any]:
    """The fields that every weight of a kind has."""
    return {field.name: getattr(weight, field.name) for field in fields(kind)}


def source_matrices(weight: Weight) -> tuple[Weight, ...]:
    """The source matrices whose rows a weight consists of."""
    return weight.members if isinstance(weight, JoinedRows) else (weight,)


@frozen
class RowStride:
    """Rows `first`, `first + step`, ... of a fused matrix."""

    first: int
    step: int

    def window(self, start: int, stop: int) -> tuple[int, int]:
        """The fused rows that hold rows `start:stop`."""
        return self.first + start * self.step, self.first + (stop - 1) * self.step + 1


@frozen(kw_only=True)
class IntRows(IntWeight):
    """Some rows of an integer weight."""

    fused: IntWeight
    stride: RowStride

    def words(self, start: int, stop: int) -> FillRecipe:
        first, last = self.stride.window(start, stop)
        recipe = self.fused.words(first, last)

        def fill(arrays: Arrays, out: Array) -> None:
            wide = np.empty((last - first, self.K // NIBBLES_PER_WORD), np.uint32)
            recipe.build(arrays, wide)
            out[...] = wide[:: self.stride.step]

        return Recipe(recipe.inputs, fill)

    def octets(self, start: int, stop: int) -> FillRecipe:
        first, last = self.stride.window(start, stop)
        recipe = self.fused.octets(first, last)

        def fill(arrays: Arrays, out: Array) -> None:
            wide = np.empty((last - first, self.K), np.uint8)
            recipe.build(arrays, wide)
            out[...] = wide[:: self.stride.step]

        return Recipe(recipe.inputs, fill)

    def scales(self) -> ArrayRecipe:
        recipe = self.fused.scales()
        first, last = self.stride.window(0, self.N)
        return Recipe(recipe.inputs, lambda arrays: recipe.build(arrays)[:, first : last : self.stride.step])

    def zeros(self, start: int, stop: int) -> ArrayRecipe:
        recipe = self.fused.zeros(*self.stride.window(start, stop))
        return Recipe(recipe.inputs, lambda arrays: recipe.build(arrays)[:, :: self.stride.step])

    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        return _every_nth(self.fused.decoded(*self.stride.window(start, stop)), self.stride.step)

    def as_packed(self, start: int, stop: int) -> RowsRecipe:
        return Weight.as_packed(self, start, stop)


@frozen(kw_only=True)
class FloatRows(FloatWeight):
    """Some rows of a float weight, whose tensors these are. Where rows are skipped, each has its own scales."""

    stride: RowStride

    def code_rows(self, start: int, stop: int) -> Slice:
        return super().code_rows(*self.stride.window(start, stop))

    def scales(self, start: int, stop: int) -> ArrayRecipe:
        if self.granularity == "tensor":
            return Recipe((rows(self.scale, 0, 1),), self._table)
        recipe = super().scales(*self.stride.window(start, stop))
        return Recipe(recipe.inputs, lambda arrays: recipe.build(arrays)[:: self.stride.step])

    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        recipe = super().decoded(start, stop)

        def build(arrays: Arrays) -> Decoded:
            decoded = recipe.build(arrays)
            return replace(decoded, codes=decoded.codes[:: self.stride.step])

        return Recipe(recipe.inputs, build)

    def as_packed(self, start: int, stop: int) -> RowsRecipe:
        recipe = super().as_packed(start, stop)

        def build(arrays: Arrays) -> Rows:
            rows = recipe.build(arrays)
            if not isinstance(rows, Packed):
                return rows  # from `decoded`, which has taken the stride
            return replace(rows, codes=np.ascontiguousarray(rows.codes[:: self.stride.step]))

        return Recipe(recipe.inputs, build)


def _every_nth(recipe: DecodedRecipe, step: int) -> DecodedRecipe:
    """Every `step`th of the decoded rows."""

    def build(arrays: Arrays) -> Decoded:
        decoded = recipe.build(arrays)
        return replace(decoded, codes=decoded.codes[::step], row=decoded.row[::step])

    return Recipe(recipe.inputs, build)


@frozen
class BiasRows:
    """`count` rows of a fused bias, which is the concatenation of `parts`."""

    parts: tuple[Slice, ...]
    stride: RowStride
    count: int

    @property
    def dtype(self) -> str:
        """safetensors label."""
        return self.parts[0].tensor.dtype

    def values(self) -> ArrayRecipe:
        """`[count]` in the source's dtype."""

        def build(arrays: Arrays) -> Array:
            fused = np.concatenate([array.reshape(-1) for array in arrays])
            first, last = self.stride.window(0, self.count)
            return fused[first : last : self.stride.step]

        return Recipe(self.parts, build)


def split_gate_up(weight: Weight, alternating: bool) -> tuple[IntRows | FloatRows, IntRows | FloatRows] | str:
    """gate and up of `....gate_up_proj`, or why they cannot be told apart exactly."""
    half = weight.N // 2
    strides = (RowStride(0, 2), RowStride(1, 2)) if alternating else (RowStride(0, 1), RowStride(half, 1))
    parent = weight.name.removesuffix("gate_up_proj")
    fact = f"{'alternating rows' if alternating else 'a half'} of gate_up_proj"
    names = (f"{parent}gate_proj", f"{parent}up_proj")
    halves = [{"name": name, "N": half, "facts": (*weight.facts, fact), "bias": None} for name in names]
    if isinstance(weight, IntWeight):
        if weight.has_zero_points:
            return "fused gate and up rows with zero points"
        same = _common(IntWeight, weight)
        gate, up = (
            IntRows(**(same | own), fused=weight, stride=stride) for own, stride in zip(halves, strides, strict=True)
        )
        return gate, up
    if type(weight) is not FloatWeight:
        return f"{weight.kind}, fused"
    block = (half, weight.K) if weight.granularity == "tensor" else weight.block
    if weight.granularity == "block" and (alternating or half % block[0]) and block[0] > 1:
        return f"gate and up rows share blocks of {block[0]} rows"
    same = _common(FloatWeight, weight) | {"block": block, "input_scale": None, "scale_value": None}
    first, second = (FloatRows(**(same | own), stride=stride) for own, stride in zip(halves, strides, strict=True))
    return first, second
