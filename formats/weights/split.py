"""Some rows of another matrix, as a weight: what undoes a fused gate and up projection.

Fused matrices hold all gate rows, then all up rows; gpt-oss's alternate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from xpuquant.formats.checkpoint import Slice, rows
from xpuquant.formats.layouts.base import OutTensor, Piece
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD
from xpuquant.formats.weights.base import Array, IntWeight, Weight
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.floats import FloatWeight


@dataclass(frozen=True)
class Rows:
    """Rows `first`, `first + step`, ... of a fused matrix."""

    first: int
    step: int

    def window(self, start: int, stop: int) -> tuple[int, int]:
        """The fused rows that hold rows `start:stop`."""
        return self.first + start * self.step, self.first + (stop - 1) * self.step + 1


@dataclass(frozen=True, kw_only=True)
class SplitInt(IntWeight):
    """`picked` rows of an integer weight without zero points."""

    fused: IntWeight
    picked: Rows

    def word_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        return self.fused.word_inputs(*self.picked.window(start, stop))

    def words(self, arrays: Sequence[Array], out: Array, start: int) -> None:
        first, last = self.picked.window(start, start + len(out))
        wide = np.empty((last - first, self.K // NIBBLES_PER_WORD), np.uint32)
        self.fused.words(arrays, wide, first)
        out[...] = wide[:: self.picked.step]

    def scale_inputs(self) -> tuple[Slice, ...]:
        return self.fused.scale_inputs()

    def scales(self, arrays: Sequence[Array]) -> Array:
        first, last = self.picked.window(0, self.N)
        return self.fused.scales(arrays)[:, first : last : self.picked.step]

    def decode_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        return self.fused.decode_inputs(*self.picked.window(start, stop))

    def decode(self, arrays: Sequence[Array], start: int, stop: int) -> Decoded:
        decoded = self.fused.decode(arrays, *self.picked.window(start, stop))
        step = self.picked.step
        return replace(decoded, codes=decoded.codes[::step], row=decoded.row[::step])

    def code_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        raise NotImplementedError("the fused weight makes the words")

    def code_words(self, arrays: Sequence[Array], out: Array) -> None:
        raise NotImplementedError("the fused weight makes the words")

    def zero_inputs(self) -> tuple[Slice, ...]:
        raise NotImplementedError("fused weights with zero points are refused")

    def zeros(self, arrays: Sequence[Array], start: int, stop: int) -> Array:
        raise NotImplementedError("fused weights with zero points are refused")


@dataclass(frozen=True, kw_only=True)
class SplitFloat(FloatWeight):
    """`picked` rows of a float weight, whose tensors these are. Where rows are skipped, each has its own scales."""

    picked: Rows

    def code_rows(self, start: int, stop: int) -> Slice:
        return super().code_rows(*self.picked.window(start, stop))

    def scale_rows(self, start: int, stop: int) -> Slice:
        if self.granularity == "tensor":
            return rows(self.scale, 0, 1)
        return super().scale_rows(*self.picked.window(start, stop))

    def grid(self, stored: Array) -> Array:
        return super().grid(stored)[:: self.picked.step]

    def decode(self, arrays: Sequence[Array], start: int, stop: int) -> Decoded:
        decoded = super().decode(arrays, start, stop)
        return replace(decoded, codes=decoded.codes[:: self.picked.step])


@dataclass(frozen=True)
class SplitBias:
    """`count` rows of a fused bias, which is the concatenation of `parts`."""

    parts: tuple[Slice, ...]
    picked: Rows
    count: int

    def values(self, arrays: Sequence[Array]) -> Array:
        """The bias from the arrays of `parts`."""
        fused = np.concatenate([array.reshape(-1) for array in arrays])
        first, last = self.picked.window(0, self.count)
        return fused[first : last : self.picked.step]

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        values = self.values(arrays)
        out.view(values.dtype)[...] = values

    def tensor(self, name: str) -> OutTensor:
        """The bias as a tensor of the output."""
        dtype = self.parts[0].tensor.dtype
        size = self.parts[0].nbytes // max(1, int(np.prod(self.parts[0].shape)))
        return OutTensor(name, dtype, (self.count,), (Piece(self.parts, size * self.count, self),))


Split = SplitInt | SplitFloat


def split(weight: Weight, alternating: bool) -> tuple[Split, Split] | str:
    """gate and up of `....gate_up_proj`, or why they cannot be told apart exactly."""
    half = weight.N // 2
    picks = (Rows(0, 2), Rows(1, 2)) if alternating else (Rows(0, 1), Rows(half, 1))
    parent = weight.name.removesuffix("gate_up_proj")
    fact = f"{'alternating rows' if alternating else 'a half'} of gate_up_proj"
    names = (f"{parent}gate_proj", f"{parent}up_proj")
    if isinstance(weight, IntWeight):
        if not weight.symmetric and not weight.widened:
            return "fused gate and up rows with zero points"
        ints = [
            SplitInt(
                name=name,
                format=weight.format,
                K=weight.K,
                N=half,
                tensors=weight.tensors,
                facts=(*weight.facts, fact),
                bits=weight.bits,
                group_size=weight.group_size,
                symmetric=weight.symmetric,
                scale_dtype=weight.scale_dtype,
                groups_of=weight.groups_of,
                fused=weight,
                picked=picked,
            )
            for name, picked in zip(names, picks, strict=True)
        ]
        return ints[0], ints[1]
    if type(weight) is not FloatWeight:
        return f"{weight.kind}, fused"
    block = (half, weight.K) if weight.granularity == "tensor" else weight.block
    if weight.granularity == "block" and (alternating or half % block[0]) and block[0] > 1:
        return f"gate and up rows share blocks of {block[0]} rows"
    floats = [
        SplitFloat(
            name=name,
            format=weight.format,
            N=half,
            K=weight.K,
            tensors=weight.tensors,
            facts=(*weight.facts, fact),
            element=weight.element,
            granularity=weight.granularity,
            block=block,
            codes=weight.codes,
            scale=weight.scale,
            transposed=weight.transposed,
            exponent_shift=weight.exponent_shift,
            picked=picked,
        )
        for name, picked in zip(names, picks, strict=True)
    ]
    return floats[0], floats[1]
