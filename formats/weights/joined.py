"""One matrix whose rows are those of several source matrices, one after the other.

Needed where a producer cut a fused axis in two without undoing its order: gpt-oss alternates gate and up rows, and
some versions of llm-compressor saved the first half of that axis as `gate_proj` and the second as `up_proj`.
Joined again, the rows are in the order of the fused axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.formats.checkpoint import Slice
from xpuquant.formats.weights.base import Array, IntWeight, Weight
from xpuquant.formats.weights.decoded import Decoded


@dataclass(frozen=True, kw_only=True)
class Joined(Weight):
    """The rows of `parts`, in order. Every part has the same K and the same groups of columns."""

    parts: tuple[Weight, ...]

    @property
    def kind(self) -> str:
        return self.parts[0].kind

    def decode_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        return tuple(part for weight, a, b in self.windows(start, stop) for part in weight.decode_inputs(a, b))

    def decode(self, arrays: Sequence[Array], start: int, stop: int) -> Decoded:
        decoded: list[Decoded] = []
        position = 0
        for weight, a, b in self.windows(start, stop):
            count = len(weight.decode_inputs(a, b))
            if a < b:
                decoded.append(weight.decode(arrays[position : position + count], a, b))
            position += count
        first = decoded[0]
        offsets = np.cumsum([0] + [len(each.scale) for each in decoded])
        return Decoded(
            first.number,
            np.concatenate([each.codes for each in decoded]),
            np.concatenate([each.scale for each in decoded]),
            np.concatenate([each.row + offset for each, offset in zip(decoded, offsets, strict=False)]),
            first.col,
        )

    def windows(self, start: int, stop: int) -> Iterator[tuple[Weight, int, int]]:
        """(part, its rows) of rows `start:stop`; every part is listed, so that its inputs keep their places."""
        top = 0
        for weight in self.parts:
            a, b = (min(max(at - top, 0), weight.N) for at in (start, stop))
            yield weight, a, b
            top += weight.N


@dataclass(frozen=True, kw_only=True)
class JoinedInt(Joined, IntWeight):
    """Joined integer weights, for the layouts that take those. `groups_of` is that of any part in act-order."""

    def word_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        return tuple(
            part
            for weight, a, b in self.windows(start, stop)
            if isinstance(weight, IntWeight)
            for part in weight.word_inputs(a, b)
        )

    def words(self, arrays: Sequence[Array], out: Array, start: int) -> None:
        position = row = 0
        for weight, a, b in self.windows(start, start + len(out)):
            assert isinstance(weight, IntWeight)
            count = len(weight.word_inputs(a, b))
            if a < b:
                weight.words(arrays[position : position + count], out[row : row + b - a], a)
            position, row = position + count, row + b - a

    def scale_inputs(self) -> tuple[Slice, ...]:
        return tuple(part for weight in self._ints for part in weight.scale_inputs())

    def scales(self, arrays: Sequence[Array]) -> Array:
        position = 0
        found: list[Array] = []
        for weight in self._ints:
            count = len(weight.scale_inputs())
            found.append(weight.scales(arrays[position : position + count]))
            position += count
        return np.concatenate(found, axis=1)

    def code_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        raise NotImplementedError("the parts make their own words")

    def code_words(self, arrays: Sequence[Array], out: Array) -> None:
        raise NotImplementedError("the parts make their own words")

    def zero_inputs(self) -> tuple[Slice, ...]:
        raise NotImplementedError("no layout of experts has zero points")

    def zeros(self, arrays: Sequence[Array], start: int, stop: int) -> Array:
        raise NotImplementedError("no layout of experts has zero points")

    @property
    def _ints(self) -> list[IntWeight]:
        return [weight for weight in self.parts if isinstance(weight, IntWeight)]


def join(name: str, first: Weight, second: Weight, fact: str) -> Weight:
    """The rows of `first`, then those of `second`, as one weight called `name`."""
    N, tensors = first.N + second.N, (*first.tensors, *second.tensors)
    facts = tuple(dict.fromkeys((*first.facts, *second.facts, fact)))
    if isinstance(first, IntWeight) and isinstance(second, IntWeight):
        return JoinedInt(
            name=name,
            format=first.format,
            N=N,
            K=first.K,
            tensors=tensors,
            facts=facts,
            parts=(first, second),
            bits=max(first.bits, second.bits),
            group_size=first.group_size,
            symmetric=first.symmetric and second.symmetric,
            scale_dtype=first.scale_dtype,
            groups_of=first.groups_of if second.groups_of is None else second.groups_of,
        )
    return Joined(name=name, format=first.format, N=N, K=first.K, tensors=tensors, facts=facts, parts=(first, second))


def parts(weight: Weight) -> tuple[Weight, ...]:
    """The source matrices whose rows a weight consists of."""
    return weight.parts if isinstance(weight, Joined) else (weight,)
