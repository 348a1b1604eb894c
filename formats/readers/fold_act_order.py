"""Act-order without a permutation at run time: the layers before deliver their output in the order it is wanted.

A gated MLP is `down(act(gate(x)) * up(x))`, and what stands between is done element by element. Where `down_proj` was
quantized in act-order, storing the rows of `gate_proj` and `up_proj` in its column order gives the same sum without
`g_idx`: exact, because no code, zero point or scale changes, only where it is stored. `down_proj` then splits over
ranks like any other linear.

The price: the three matrices are no longer comparable one by one with the source's. An adapter (LoRA) trained on the
source does not fit them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from xpuquant.formats.architecture import expert_of, has_plain_gated_mlp
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers.gptq import GptqWeight
from xpuquant.formats.weights.base import Weight

_PARTS = ("gate_proj", "up_proj", "down_proj")


def fold_act_orders(checkpoint: Checkpoint, weights: Sequence[Weight]) -> list[Weight]:
    """The same weights, with every act-order that a gated MLP can absorb folded into its rows."""
    if not has_plain_gated_mlp(checkpoint):
        return list(weights)
    by_name = {weight.name: weight for weight in weights}
    mlps = {
        parent: parts
        for weight in weights
        if weight.name.endswith(".down_proj") and expert_of(weight.name) is None
        for parent in [weight.name.removesuffix(".down_proj")]
        if (parts := _parts(by_name, parent)) is not None
    }
    for parent in _with_more_inside(checkpoint, mlps.keys()):
        del mlps[parent]
    for gate, up, down in mlps.values():
        order = down.order
        assert order is not None
        rows = order.astype(np.int32)
        for weight in (gate, up):
            fact = "rows stored in the order of down_proj's columns"
            by_name[weight.name] = replace(weight, rows=rows, facts=(*weight.facts, fact))
        fact = "act-order folded into the rows of gate_proj and up_proj"
        by_name[down.name] = replace(down, folded=True, facts=(*down.facts, fact))
    return [by_name[weight.name] for weight in weights]


def _parts(by_name: dict[str, Weight], parent: str) -> tuple[GptqWeight, GptqWeight, GptqWeight] | None:
    """gate, up and down of an MLP whose down_proj is act-order; None for any other."""
    gate, up, down = (by_name.get(f"{parent}.{part}") for part in _PARTS)
    if not (isinstance(gate, GptqWeight) and isinstance(up, GptqWeight) and isinstance(down, GptqWeight)):
        return None
    return (gate, up, down) if down.act_order and gate.N == up.N == down.K else None


def _with_more_inside(checkpoint: Checkpoint, parents: Iterable[str]) -> set[str]:
    """MLPs that hold more than the three matrices: a norm between them, or biases, which would have to move too."""
    inside = {f"{parent}." for parent in parents}
    found: set[str] = set()
    for name in checkpoint.tensors:
        at = name.find(".")
        while at >= 0:
            prefix, rest = name[: at + 1], name[at + 1 :]
            if prefix in inside:
                part, _, suffix = rest.partition(".")
                if part not in _PARTS or (suffix == "bias" and part != "down_proj"):
                    found.add(prefix[:-1])
            at = name.find(".", at + 1)
    return found
