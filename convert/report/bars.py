"""How large the errors of single outputs are: a bar for each power of ten that occurs, and dtype of the activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xpuquant.conversion.sizes import counted
from xpuquant.conversion.verify.agreement import BINS
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement
from xpuquant.values import frozen

WIDTH, HEIGHT = 420.0, 150.0
_BASE = 118.0
_TALLEST = 90.0
_GAP = 8.0
_LABELLED_SHARE = 0.05
"""Bars of a smaller share have no room for their figure."""


@frozen
class Bar:
    """A bar, in units of the picture."""

    colour: int
    x: float
    y: float
    width: float
    height: float
    said: str
    label: str

    @property
    def middle(self) -> float:
        return round(self.x + self.width / 2, 1)


@frozen
class Edge:
    """What stands below a group of bars."""

    x: float
    text: str


@frozen
class Histogram:
    """Shares of |error| / rms of the outputs."""

    outputs: int
    backends: str
    dtypes: Sequence[str]
    edges: Sequence[Edge]
    bars: Sequence[Bar]
    size: tuple[float, float] = (WIDTH, HEIGHT)
    base: float = _BASE


def histogram(ran: Sequence[Agreement]) -> Histogram | None:
    """Of the runs of real kernels; of the reference where there are no others. None where nothing was counted."""
    real = [run for run in ran if run.backend != REFERENCE] or list(ran)
    counts: dict[str, list[int]] = {}
    for run in real:
        held = counts.setdefault(run.activation, [0] * (len(BINS) + 1))
        counts[run.activation] = [a + b for a, b in zip(held, run.histogram or held, strict=True)]
    shares = {
        # Of one colour on every page, whichever ran first.
        dtype: [count / sum(of_dtype) for count in of_dtype]
        for dtype, of_dtype in sorted(counts.items(), reverse=True)
        if sum(of_dtype)
    }
    if not shares:
        return None
    filled = [i for i in range(len(BINS) + 1) if any(of_dtype[i] for of_dtype in shares.values())]
    first, last = max(filled[0] - 1, 0), min(filled[-1] + 1, len(BINS))
    step = WIDTH / (last - first + 1)
    highest = max(max(of_dtype) for of_dtype in shares.values())
    bars = [
        _bar(order, len(shares), i, (i - first) * step, step, dtype, counts[dtype][i], of_dtype[i], highest)
        for order, (dtype, of_dtype) in enumerate(shares.items())
        for i in range(first, last + 1)
    ]
    return Histogram(
        outputs=sum(sum(of_dtype) for of_dtype in counts.values()),
        backends=", ".join(dict.fromkeys(run.backend for run in real)),
        dtypes=list(shares),
        edges=[Edge(round((i - first + 0.5) * step, 1), _upper(i)) for i in range(first, last + 1)],
        bars=bars,
    )


def _bar(
    order: int, dtypes: int, i: int, x: float, step: float, dtype: str, count: int, share: float, highest: float
) -> Bar:
    width = (step - _GAP) / dtypes
    height = max(2.0, share / highest * _TALLEST) if count else 0.0
    below = f"errors up to {BINS[i]:.0e}" if i < len(BINS) else "larger errors"
    return Bar(
        colour=order % 3,
        x=round(x + _GAP / 2 + order * width, 1),
        y=round(_BASE - height, 1),
        width=round(width, 1),
        height=round(height, 1),
        said=f"{dtype}: {below} of the rms: {counted(count, 'output')}, {share:.1%}",
        label=f"{share:.0%}" if share >= _LABELLED_SHARE else "",
    )


def _upper(i: int) -> str:
    if i == len(BINS):
        return "more"
    return "10" + str(round(math.log10(BINS[i]))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
