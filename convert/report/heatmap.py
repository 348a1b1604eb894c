"""Layer × module: how much of its tolerance a kernel used. What is shown, for the page and for the card's picture.

The scale is anchored: 0 is float64's own result, 100 % is the tolerance, and what is beyond fails. So a healthy model
looks healthy, whatever its decibels are, and two pictures can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum

from xpuquant.conversion.report.markdown import matrix_name
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Verdict
from xpuquant.values import frozen

NEAR, FAR = (15, 133, 133), (184, 122, 32)
"""RGB at 0 and at the tolerance: teal and amber, told apart by those who see no red or no green. Both stand out by 3 to
1 from a white and from a dark page, as do all between them."""

FAILED_COLOUR = "#cf222e"
_MANY_TIMES = 10.0

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


class State(StrEnum):
    """What a square says."""

    PASSED = "passed"
    FAILED = "failed"
    UNSEEN = "unseen"
    """No kernel ran, or the float64 reference alone, which says nothing of kernels."""


@frozen
class Square:
    """One module: the run that stands for it (see `Verdict.cell`), and that run in words."""

    module: str
    state: State
    run: Agreement | None
    said: str

    @property
    def colour(self) -> str | None:
        """`#rrggbb`; None where nothing was seen."""
        if self.state is State.UNSEEN or self.run is None:
            return None
        return FAILED_COLOUR if self.state is State.FAILED else colour(self.run.used or 0.0)


@frozen
class HeatMap:
    """rows    label → layer → square
    layers  those that occur, in order; -1 is for modules without a number in their name
    """

    rows: Mapping[str, Mapping[int, Square]]
    layers: Sequence[int]

    @property
    def squares(self) -> Sequence[Square]:
        return [square for members in self.rows.values() for square in members.values()]

    @property
    def states(self) -> frozenset[State]:
        """Those that occur: a legend explains no others."""
        return frozenset(square.state for square in self.squares)

    @property
    def largest(self) -> Square | None:
        """The square nearest to its tolerance, or farthest beyond it."""
        seen = [square for square in self.squares if square.state is not State.UNSEEN]
        return max(seen, key=lambda square: (square.run and square.run.used) or 0.0, default=None)


def heat_map(verdict: Verdict) -> HeatMap:
    """Every quantized module of a verdict."""
    rows, layers = table_of(verdict.schemes)
    squares = {
        label: {layer: _square(name, verdict.cell(name)) for layer, name in members.items()}
        for label, members in rows.items()
    }
    return HeatMap(squares, layers)


def table_of(modules: Sequence[str] | Mapping[str, str]) -> tuple[dict[str, dict[int, str]], list[int]]:
    """Row label → layer → module, and the layers. A module without a number in its name is in layer -1."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for name in modules:
        match = _LAYER.search(name)
        key = (name[: match.start()], name[match.end() :].lstrip(".")) if match else ("", name)
        found.setdefault(key, {})[int(match[1]) if match else -1] = name
    several = len({prefix for prefix, _ in found if prefix}) > 1
    rows: dict[str, dict[int, str]] = {}
    for (prefix, rest), members in found.items():
        label = f"{prefix}.*.{rest}" if several and prefix else rest
        rows.setdefault(label or prefix, {}).update(members)
    return rows, sorted({layer for members in rows.values() for layer in members})


def colour(share: float) -> str:
    """`#rrggbb` of a share of the tolerance, 0 to 1."""
    at = min(max(share, 0.0), 1.0)
    return "#" + "".join(f"{round(near + (far - near) * at):02x}" for near, far in zip(NEAR, FAR, strict=True))


def percent(share: float | None) -> str:
    """`22 %`, `<1 %`; of many times the tolerance `35 ×`; nothing of None."""
    if share is None:
        return ""
    if share >= _MANY_TIMES:
        return "∞" if math.isinf(share) else f"{share:,.0f} ×"
    return "<1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def of_tolerance(share: float | None) -> str:
    """`22 % of the tolerance`, `35 times the tolerance`."""
    if share is None or math.isinf(share):
        return "beyond any tolerance"
    return f"{share:,.0f} times the tolerance" if share >= _MANY_TIMES else f"{percent(share)} of the tolerance"


def shown_layers(layers: Sequence[int], step: float, room: float = 24.0) -> frozenset[int]:
    """Which layers have their number written above them, where a column is `step` wide and a number takes `room`."""
    every = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000) if n * step >= room or n == 1000)
    return frozenset(layer for layer in layers if layer >= 0 and layer % every == 0)


def real_kernels(verdict: Verdict) -> str:
    """The kernel libraries that ran, the reference left out; empty where none did."""
    return ", ".join(dict.fromkeys(run.backend for run in verdict.kernels if run.ran and run.backend != REFERENCE))


def _square(name: str, run: Agreement | None) -> Square:
    if run is None:
        return Square(name, State.UNSEEN, None, f"{name}: no kernel ran")
    if run.backend == REFERENCE and run.passed:
        return Square(name, State.UNSEEN, run, f"{name}: only the float64 reference ran")
    said = "accepts a wrong layout: its agreement shows nothing" if run.blind else of_tolerance(run.used)
    state = State.PASSED if run.passed else State.FAILED
    verb = "" if run.passed else "fails, "
    return Square(name, state, run, f"{matrix_name(run)}: {verb}{run.backend} {run.activation}, {said}")
