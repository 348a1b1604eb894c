"""Integer experts of a layer as pieces of stacked tensors: the codes, scales and zero points of one expert after the
other."""

from __future__ import annotations

from collections.abc import Sequence

from xpuquant.formats.layouts.base import Piece
from xpuquant.formats.layouts.fillers import FillGroupScales, FillInterleaved, FillWords, word_pieces
from xpuquant.formats.layouts.modules import ExpertStack, Module
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD
from xpuquant.formats.weights.base import row_blocks
from xpuquant.formats.weights.integers import IntWeight, divide_groups

Experts = dict[str, list[IntWeight]]
"""Role → weight of each expert, in order."""


def int_stack(module: Module) -> tuple[ExpertStack, Experts] | None:
    """A stack all of whose matrices are integer weights, and these; None for any other module."""
    if not isinstance(module, ExpertStack):
        return None
    experts = {
        role: [weight for weight in members if isinstance(weight, IntWeight)]
        for role, members in module.weights.items()
    }
    complete = all(len(members) == len(module.weights[role]) for role, members in experts.items())
    return (module, experts) if complete else None


def all_weights(experts: Experts) -> list[IntWeight]:
    """The matrices of every role and expert."""
    return [weight for members in experts.values() for weight in members]


def stacked_scale_dtype(experts: Experts, asked: str | None) -> str:
    """Label of the one dtype in which the scales of a stack are stored: float32 holds both others exactly."""
    dtypes = {weight.scale_dtype for weight in all_weights(experts)}
    return asked or (next(iter(dtypes)) if len(dtypes) == 1 else "F32")


def expert_words(members: Sequence[IntWeight], alternate: bool, signed: bool) -> list[Piece]:
    """The words of one expert in a stacked tensor; rows of the two members by turns where they `alternate`."""
    if not alternate:
        return [piece for weight in members for piece in word_pieces(weight, signed)]
    gate, up = members
    return [
        FillInterleaved(
            FillWords(gate, start, stop, signed).piece(),
            FillWords(up, start, stop, signed).piece(),
            stop - start,
        ).piece()
        for start, stop in row_blocks(gate.N, gate.K, NIBBLES_PER_WORD)
    ]


def expert_scales(members: Sequence[IntWeight], alternate: bool, size: int, dtype: str) -> list[Piece]:
    """The scales of one expert in a stacked tensor, in groups of `size` columns."""
    pieces = [FillGroupScales(each, divide_groups(each, size), dtype, by_row=True).piece() for each in members]
    if not alternate:
        return pieces
    gate, up = pieces
    return [FillInterleaved(gate, up, members[0].N).piece()]
