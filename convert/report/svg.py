"""verify.svg: the heat map as a picture for a model card. It says what it shows: verdict, unit, legend, date.

Cards show it as an image, on pages whose scheme is not always the reader's: so it has a ground of its own, light or
dark by a media query. Its text is broken into lines here, since SVG breaks none.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence

from xpuquant.conversion.report.heatmap import (
    FAILED_COLOUR,
    HeatMap,
    Square,
    State,
    colour,
    heat_map,
    of_tolerance,
    real_kernels,
    shown_layers,
)
from xpuquant.conversion.report.sentences import exactness
from xpuquant.conversion.sizes import counted
from xpuquant.conversion.verify.verdict import Outcome, Verdict

_WIDTH = 720.0
_MARGIN = 24.0
_SQUARE_HEIGHT = 20.0
_SQUARE_WIDTH = (7.0, 28.0)
_CHARACTER = 6.9
"""Usual width of one at 13 px: lines are broken by it."""

_LABEL_CHARACTERS = 44
"""Longer names of rows lose their beginning."""

_BAR = 200.0
_MARKS = {Outcome.VERIFIED: ("✓", "ok"), Outcome.FAILED: ("✗", "bad"), Outcome.NOT_VERIFIED: ("?", "warn")}

_STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1f2328}
.ground{fill:#ffffff;stroke:#d0d7de}
.head{font-size:18px;font-weight:600}
.soft{fill:#57606a}
.ok{fill:#1a7f37}
.bad{fill:#cf222e}
.warn{fill:#9a6700}
.line{stroke:#1f2328;stroke-width:2}
.cross{stroke:#fff;stroke-width:1.6}
@media(prefers-color-scheme:dark){
text{fill:#e6edf3}
.ground{fill:#0d1117;stroke:#30363d}
.soft{fill:#9da7b3}
.ok{fill:#3fb950}
.bad{fill:#f85149}
.warn{fill:#d29922}
.line{stroke:#e6edf3}
}
"""

_HATCH = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#8b949e" fill-opacity=".25"/>'
    '<rect width="2" height="6" fill="#8b949e"/></pattern></defs>'
)


def picture(verdict: Verdict) -> str:
    """The picture, as a complete SVG file."""
    shown = heat_map(verdict)
    label = 12 + _CHARACTER * max([len(_label(row)) for row in shown.rows], default=0)
    step = min(max((_WIDTH - 2 * _MARGIN - label) / max(len(shown.layers), 1), _SQUARE_WIDTH[0]), _SQUARE_WIDTH[1])
    width = max(_WIDTH, 2 * _MARGIN + label + step * len(shown.layers))
    most = int((width - 2 * _MARGIN) / _CHARACTER)
    mark, kind = _MARKS[verdict.outcome]
    name, outcome = verdict.repo, str(verdict.outcome)
    y = _MARGIN + 16
    body = [
        f'<text class="head" x="{_MARGIN}" y="{y}"><tspan class="{kind}">{mark} {outcome}</tspan> '
        f"<tspan>{_text(_fit(name, width - 2 * _MARGIN - 170, 1.4))}</tspan></text>"
    ]
    for line, of in ((exactness(verdict.proof) + ".", ""), (_explained(verdict, shown), "soft")):
        for part in textwrap.wrap(line, most, break_on_hyphens=False):
            y += 20
            body.append(f'<text class="{of}" x="{_MARGIN}" y="{y}">{_text(part)}</text>')
    y += 36
    if shown.rows:
        body += _axis(shown.layers, _MARGIN + label, y - 8, step)
        for row, members in shown.rows.items():
            end = _MARGIN + label - 8
            body.append(f'<text x="{end:.1f}" y="{y + 14:.1f}" text-anchor="end">{_text(_label(row))}</text>')
            for layer, square in members.items():
                body.append(_drawn(square, _MARGIN + label + step * shown.layers.index(layer), y, step))
            y += _SQUARE_HEIGHT
        body += _legend(shown, y + 22)
        y += 80
    for part in textwrap.wrap(_stamp(verdict), most, break_on_hyphens=False):
        body.append(f'<text class="soft" x="{_MARGIN}" y="{y:.0f}">{_text(part)}</text>')
        y += 20
    height = y + _MARGIN - 26
    head = [
        f'<svg class="hm" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-labelledby="title what">',
        f'<title id="title">{_text(f"{name}: {outcome}")}</title>',
        f'<desc id="what">{_text(said_of(verdict))}</desc>',
        f"<style>{_STYLE}</style>",
        _HATCH,
        f'<rect class="ground" x=".5" y=".5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="8"/>',
    ]
    return "\n".join([*head, *body, "</svg>"]) + "\n"


def said_of(verdict: Verdict) -> str:
    """The picture in words, for who cannot see it."""
    shown, largest = heat_map(verdict), heat_map(verdict).largest
    said = [f"{str(verdict.outcome).capitalize()}: {exactness(verdict.proof)}"]
    modules = counted(len(shown.squares), "module")
    if largest is None or largest.run is None:
        said.append(f"a square for each of {modules}; no kernel library computed them where this was checked")
    else:
        failed = sum(square.state is State.FAILED for square in shown.squares)
        said.append(f"a square for each of {modules}, coloured by how much of its tolerance a kernel used")
        said.append(f"at most {of_tolerance(largest.run.used)} ({real_kernels(verdict) or largest.run.backend})")
        said.append(f"{failed:,} failed" if failed else "none failed")
    return "; ".join(said)


def _explained(verdict: Verdict, shown: HeatMap) -> str:
    """What squares and colours mean."""
    largest = shown.largest
    if largest is None or largest.run is None:
        return "Each square is a module. No kernel library computed them where this was checked."
    by = real_kernels(verdict) or largest.run.backend
    return (
        f"Each square is a module: the largest error of its outputs by {by} against float64, as a share of the error "
        f"that rounding explains, its tolerance. The largest here: {of_tolerance(largest.run.used)}."
    )


def _stamp(verdict: Verdict) -> str:
    setting = verdict.setting
    if setting is None:
        return verdict.producer
    versions = ", ".join(f"{tool} {version}" for tool, version in setting.versions.items())
    return f"{setting.date} · {versions}"


def _axis(layers: Sequence[int], left: float, y: float, step: float) -> list[str]:
    numbered = shown_layers(layers, step)
    parts = [f'<text class="soft" x="{left - 8:.1f}" y="{y:.1f}" text-anchor="end">layer</text>'] * bool(numbered)
    return parts + [
        f'<text class="soft" x="{left + step * (i + 0.5):.1f}" y="{y:.1f}" text-anchor="middle">{layer}</text>'
        for i, layer in enumerate(layers)
        if layer in numbered
    ]


def _drawn(square: Square, x: float, y: float, step: float) -> str:
    inner = f'x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{step - 1:.1f}" height="{_SQUARE_HEIGHT - 1:.1f}"'
    title = f"<title>{_text(square.said)}</title>"
    if square.state is State.FAILED:
        return f'<g><rect class="cell bad" {inner}/>{_cross(x + step / 2, y + _SQUARE_HEIGHT / 2, step)}{title}</g>'
    return f'<rect class="cell" {inner} rx="1" fill="{square.colour or "url(#hatch)"}">{title}</rect>'


def _cross(x: float, y: float, step: float) -> str:
    arm = min(4.0, step / 2 - 2)
    return (
        f'<path class="cross" d="M{x - arm:.1f} {y - arm:.1f}L{x + arm:.1f} {y + arm:.1f}'
        f'M{x - arm:.1f} {y + arm:.1f}L{x + arm:.1f} {y - arm:.1f}"/>'
    )


def _legend(shown: HeatMap, y: float) -> list[str]:
    """The scale from 0 to the tolerance with the pass line at its end; then what occurs beside it."""
    x, parts = _MARGIN, list[str]()
    if State.PASSED in shown.states or State.FAILED in shown.states:
        stops = "".join(f'<stop offset="{share:g}" stop-color="{colour(share)}"/>' for share in (0, 0.25, 0.5, 0.75, 1))
        end = x + _BAR
        parts += [
            f'<defs><linearGradient id="scale">{stops}</linearGradient></defs>',
            f'<rect x="{x}" y="{y}" width="{_BAR}" height="12" fill="url(#scale)"/>',
            f'<rect x="{end}" y="{y}" width="20" height="12" fill="{FAILED_COLOUR}"/>',
            f'<path class="line" d="M{end} {y - 6}V{y + 18}"/>',
            f'<text class="soft" x="{x}" y="{y + 30}">0 %</text>',
            f'<text x="{end}" y="{y + 30}" text-anchor="middle">100 %: pass line</text>',
        ]
        largest = shown.largest
        if largest is not None and largest.run is not None and (largest.run.used or 0.0) < 0.6:
            at = x + _BAR * (largest.run.used or 0.0)
            parts.append(f'<path class="line" d="M{at:.1f} {y + 14}l4 7h-8z"><title>largest here</title></path>')
        x = end + 90
    for state, swatch, said in (
        (State.FAILED, f'fill="{FAILED_COLOUR}"', "fails"),
        (State.UNSEEN, 'fill="url(#hatch)"', "no kernel library computed it"),
    ):
        if state in shown.states:
            parts.append(f'<rect x="{x}" y="{y}" width="20" height="12" {swatch}/>')
            parts.append(_cross(x + 10, y + 6, 12) if state is State.FAILED else "")
            parts.append(f'<text class="soft" x="{x + 28}" y="{y + 11}">{said}</text>')
            x += 28 + _CHARACTER * len(said) + 20
    return parts


def _label(row: str) -> str:
    return row if len(row) <= _LABEL_CHARACTERS else "…" + row[1 - _LABEL_CHARACTERS :]


def _fit(text: str, width: float, scale: float = 1.0) -> str:
    most = int(width / (_CHARACTER * scale))
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(text: str) -> str:
    """Escaped; names come from strangers' files."""
    return html.escape("".join(c if c.isprintable() else "?" for c in text), quote=True)
