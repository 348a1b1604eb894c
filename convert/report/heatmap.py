"""verify.svg: layer × module, coloured by how close the kernel's output is to float64. Also stands in verify.html.

Text takes the colour of the page's scheme, light or dark, by a media query: the picture has no background of its own.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

from xpuquant.conversion.report.markdown import matrix_name
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Verdict

_WIDTH = 900.0
_CELL_HEIGHT = 20.0
_CELL_WIDTH = (7.0, 26.0)
_LABEL_CHARACTER = 6.6
_TOP, _BOTTOM = 46.0, 64.0
_LEAST_RANGE_DB = 12.0
"""Colours span at least this much, so that differences of a tenth of a decibel do not look like a pattern."""

_PALETTE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Five points of viridis (Smith and van der Walt, 2015): even in lightness, and safe for the colour-blind."""

_STYLE = """
.hm text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#24292f}
.hm .soft{fill:#57606a}
.hm .cell{stroke:#fff;stroke-width:1}
.hm .bad{fill:#d1242f}
.hm .none{fill:url(#hatch)}
.hm .cross{stroke:#fff;stroke-width:1.6}
.hm a:hover .cell,.hm a:focus .cell{stroke:#0969da;stroke-width:2}
@media(prefers-color-scheme:dark){.hm text{fill:#e6edf3}.hm .soft{fill:#9da7b3}.hm .cell{stroke:#0d1117}}
"""

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def heat_map(verdict: Verdict, linked: Mapping[Agreement, str] | None = None) -> str:
    """The picture, as a complete SVG element.

    Args:
        linked: run → the id of its row on the page; cells become links to them.
    """
    rows, layers = table_of(verdict.schemes)
    cells = {name: verdict.cell(name) for name in verdict.schemes}
    label = 16 + _LABEL_CHARACTER * max([len(row) for row in rows], default=10)
    step = min(max((_WIDTH - label) / max(len(layers), 1), _CELL_WIDTH[0]), _CELL_WIDTH[1])
    scale = Scale([run for run in cells.values() if run is not None and run.passed and _is_real(run)])
    width = max(label + step * len(layers) + 12, 520)
    height = _TOP + _CELL_HEIGHT * len(rows) + _BOTTOM
    parts = [
        f'<svg class="hm" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{_text(_caption(verdict))}">',
        f"<style>{_STYLE}</style>",
        '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="6" height="6" fill="#8b949e" fill-opacity=".25"/>'
        '<rect width="2" height="6" fill="#8b949e"/></pattern></defs>',
        f'<text x="0" y="14">{_text(_caption(verdict))}</text>',
    ]
    parts += _axis(layers, label, step)
    for y, (row, members) in enumerate(rows.items()):
        top = _TOP + y * _CELL_HEIGHT
        parts.append(f'<text x="{label - 8:.1f}" y="{top + 14:.1f}" text-anchor="end">{_text(row)}</text>')
        for layer, name in members.items():
            x = label + step * layers.index(layer)
            parts.append(_cell(name, cells[name], x, top, step, scale, linked or {}))
    shown = list(cells.values())
    failed = any(run is not None and not run.passed for run in shown)
    unseen = any(run is None or not _is_real(run) for run in shown)
    parts += scale.legend(label, _TOP + _CELL_HEIGHT * len(rows) + 18, failed, unseen)
    return "\n".join([*parts, "</svg>"]) + "\n"


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


class Scale:
    """Decibels to colours."""

    def __init__(self, runs: Sequence[Agreement]) -> None:
        values = [run.sqnr_db for run in runs if run.sqnr_db is not None and math.isfinite(run.sqnr_db)]
        low, high = (min(values), max(values)) if values else (0.0, 0.0)
        middle = (low + high) / 2
        self.low = min(low, middle - _LEAST_RANGE_DB / 2)
        self.high = max(high, middle + _LEAST_RANGE_DB / 2)
        self.is_empty = not values

    def colour(self, sqnr_db: float) -> str:
        at = min(max((sqnr_db - self.low) / (self.high - self.low), 0.0), 1.0) * (len(_PALETTE) - 1)
        first = min(int(at), len(_PALETTE) - 2)
        mixed = (a + (b - a) * (at - first) for a, b in zip(_PALETTE[first], _PALETTE[first + 1], strict=True))
        return "#" + "".join(f"{round(value):02x}" for value in mixed)

    def legend(self, x: float, y: float, bad: bool, none: bool) -> list[str]:
        parts: list[str] = []
        if not self.is_empty:
            steps = 40
            for i in range(steps):
                db = self.low + (self.high - self.low) * (i + 0.5) / steps
                parts.append(f'<rect x="{x + 4 * i:.0f}" y="{y}" width="4.5" height="10" fill="{self.colour(db)}"/>')
            parts.append(f'<text class="soft" x="{x:.0f}" y="{y + 25}">{self.low:.0f} dB</text>')
            end = x + 4 * steps
            parts.append(f'<text class="soft" x="{end:.0f}" y="{y + 25}" text-anchor="end">{self.high:.0f} dB</text>')
            x = end + 24
        if bad:
            parts.append(f'<rect class="bad" x="{x:.0f}" y="{y}" width="14" height="10"/>')
            parts.append(f'<text class="soft" x="{x + 20:.0f}" y="{y + 9.5}">fails</text>')
            x += 70
        if none:
            parts.append(f'<rect class="none" x="{x:.0f}" y="{y}" width="14" height="10"/>')
            parts.append(f'<text class="soft" x="{x + 20:.0f}" y="{y + 9.5}">no real kernel ran here</text>')
        return parts


def _axis(layers: Sequence[int], label: float, step: float) -> list[str]:
    every = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 50, 1000) if n * step >= 22)
    shown = [(i, layer) for i, layer in enumerate(layers) if layer >= 0 and layer % every == 0]
    return [f'<text class="soft" x="{label - 8:.1f}" y="{_TOP - 7}" text-anchor="end">layer</text>'] * bool(shown) + [
        f'<text class="soft" x="{label + step * (i + 0.5):.1f}" y="{_TOP - 7}" text-anchor="middle">{layer}</text>'
        for i, layer in shown
    ]


def _cell(
    name: str,
    run: Agreement | None,
    x: float,
    y: float,
    width: float,
    scale: Scale,
    linked: Mapping[Agreement, str],
) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_CELL_HEIGHT:.1f}"'
    if run is None or (not _is_real(run) and run.passed):
        said = "no kernel ran" if run is None else "only the float64 reference ran"
        return f'<rect class="cell none" {box}><title>{_text(f"{name}: {said}")}</title></rect>'
    sqnr = run.sqnr_db
    figure = f"relative error {run.error:.1e}" + (f", {sqnr:.1f} dB" if sqnr is not None else "")
    title = f"<title>{_text(f'{matrix_name(run)}: {run.backend}, {figure}')}</title>"
    if not run.passed:
        a, b = (x + width / 2 - 4, x + width / 2 + 4), (y + _CELL_HEIGHT / 2 - 4, y + _CELL_HEIGHT / 2 + 4)
        drawn = (
            f'<g><rect class="cell bad" {box}/><path class="cross" d="M{a[0]:.1f} {b[0]:.1f}L{a[1]:.1f} {b[1]:.1f}'
            f'M{a[0]:.1f} {b[1]:.1f}L{a[1]:.1f} {b[0]:.1f}"/>{title}</g>'
        )
    else:
        drawn = f'<rect class="cell" {box} fill="{scale.colour(math.inf if sqnr is None else sqnr)}">{title}</rect>'
    return f'<a href="#{linked[run]}">{drawn}</a>' if run in linked else drawn


def _is_real(run: Agreement) -> bool:
    return run.backend != REFERENCE


def _caption(verdict: Verdict) -> str:
    names = dict.fromkeys(run.backend for run in verdict.kernels if run.ran and _is_real(run))
    return f"Kernel output against float64, signal to noise per module ({', '.join(names) or 'no real kernel ran'})"


def _text(text: str) -> str:
    """Escaped; names come from strangers' files."""
    return html.escape("".join(c if c.isprintable() else "?" for c in text), quote=True)
