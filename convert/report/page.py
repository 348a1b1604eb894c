"""verify.html: a verdict as one page. Nothing is loaded from elsewhere; it opens from a disk without a network.

What stands where, `page.html.j2` says; this is what stands there. A little script sorts the tables; without it
everything is still there to read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpuquant.conversion.report.heatmap import heat_map
from xpuquant.conversion.report.markdown import checks, matrix_name
from xpuquant.conversion.report.sentences import headline
from xpuquant.conversion.sizes import size
from xpuquant.conversion.verify.agreement import BINS
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Sanity, Verdict

TEMPLATE = Path(__file__).with_name("page.html.j2")

_MOST_LISTED = 200
_BAR_STEP = 36.0
_BAR_BASE = 112.0
_BAR_HEIGHT = 76.0
_LABELLED_SHARE = 0.05
"""Bars of a smaller share have no room for their figure."""


@dataclass(frozen=True)
class Column:
    """A column of a table. Numbers stand at the right."""

    title: str
    is_number: bool = False


@dataclass(frozen=True)
class Cell:
    """text   what is shown
    kind   CSS classes
    value  what is sorted by, where that is another thing than the text
    """

    text: str
    kind: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table. `id` is what a link of the heat map names."""

    cells: Sequence[Cell]
    id: str = ""
    is_total: bool = False


@dataclass(frozen=True)
class Table:
    """Columns, and rows of as many cells."""

    columns: Sequence[Column]
    rows: Sequence[Row]


def render_page(verdict: Verdict) -> str:
    """The whole page."""
    # 80 ms, which a conversion has no use for until its end.
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def printable(value: Any) -> Any:
        """Names come from strangers' files: escaped by the environment, and without control characters."""
        if not isinstance(value, str) or isinstance(value, Markup):
            return value
        return "".join(c if c.isprintable() else "?" for c in value)

    environment = Environment(
        autoescape=True,
        finalize=printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    ran = [run for run in verdict.kernels if run.ran]
    ids = {run: f"r{i}" for i, run in enumerate(ran)}
    return template.render(
        title=verdict.repo,
        producer=verdict.producer or "unknown",
        outcome=str(verdict.outcome),
        sentence=headline(verdict),
        checks=_checks(verdict),
        failures=[finding.line() for finding in verdict.failing],
        gaps=[gap.line() for gap in verdict.gaps],
        warnings=[finding.line() for finding in verdict.warnings],
        heat_map=Markup(heat_map(verdict, ids)) if verdict.schemes else None,
        histogram=_histogram(ran),
        sizes=_sizes(verdict.before, verdict.after),
        runs=_runs(ids) if ran else None,
        sanity=_sanity(verdict.sanity) if verdict.sanity else None,
        not_run=_not_run(verdict),
        unchecked=verdict.unchecked,
        modules=len(verdict.schemes),
        most_listed=_MOST_LISTED,
    ).lstrip()


def _checks(verdict: Verdict) -> Table:
    rows = []
    for check, result, what in checks(verdict):
        kind = "bad" if result.startswith("FAIL") else "ok" if result.startswith("pass") else "soft"
        rows.append(Row((Cell(check), Cell(result, f"{kind} wrap"), Cell(what, "wrap"))))
    return Table(_columns("Check", "Result", "What was looked at"), rows)


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram, in units of its picture."""

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


@dataclass(frozen=True)
class Histogram:
    """Shares of |error| / rms, a bar for each power of ten and dtype of the activations."""

    outputs: int
    backends: str
    dtypes: Sequence[str]
    edges: Sequence[str]
    bars: Sequence[Bar]


def _histogram(ran: Sequence[Agreement]) -> Histogram | None:
    real = [run for run in ran if run.backend != REFERENCE] or list(ran)
    counts: dict[str, list[int]] = {}
    for run in real:
        held = counts.setdefault(run.activation, [0] * (len(BINS) + 1))
        counts[run.activation] = [a + b for a, b in zip(held, run.histogram or held, strict=True)]
    counts = {dtype: of_dtype for dtype, of_dtype in counts.items() if sum(of_dtype)}
    if not counts:
        return None
    return Histogram(
        outputs=sum(sum(of_dtype) for of_dtype in counts.values()),
        backends=", ".join(dict.fromkeys(run.backend for run in real)),
        dtypes=list(counts),
        edges=[f"10{_superscript(round(math.log10(edge)))}" for edge in BINS] + ["more"],
        bars=[
            _bar(order, len(counts), i, dtype, count, sum(of_dtype))
            for order, (dtype, of_dtype) in enumerate(counts.items())
            for i, count in enumerate(of_dtype)
        ],
    )


def _bar(order: int, dtypes: int, i: int, dtype: str, count: int, total: int) -> Bar:
    width, share = (_BAR_STEP - 6) / dtypes, count / total
    height = max(2.0, share * _BAR_HEIGHT) if count else 0.0
    below = f"errors up to {BINS[i]:.0e}" if i < len(BINS) else "larger errors"
    return Bar(
        colour=order % 3,
        x=round(3 + i * _BAR_STEP + order * width, 1),
        y=round(_BAR_BASE - height, 1),
        width=round(width, 1),
        height=round(height, 1),
        said=f"{dtype}: {below} of the rms: {count} outputs, {share:.1%}",
        label=f"{share:.0%}" if share >= _LABELLED_SHARE else "",
    )


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _sizes(before: Mapping[str, int], after: Mapping[str, int]) -> Table | None:
    """Bytes by dtype, of the source where that is known and of the output."""
    if not after:
        return None
    known = {title: sizes for title, sizes in (("Source", before), ("Converted", after)) if sizes}
    columns = [Column("Stored as"), *(Column(title, is_number=True) for title in known)]
    rows = [
        Row([Cell(dtype), *(_size(sizes.get(dtype, 0)) for sizes in known.values())])
        for dtype in dict.fromkeys((*after, *before))
    ]
    totals = [_size(sum(sizes.values())) for sizes in known.values()]
    return Table(columns, [*rows, Row([Cell("total"), *totals], is_total=True)])


def _size(nbytes: int) -> Cell:
    return _number(nbytes, size(nbytes))


def _runs(ids: Mapping[Agreement, str]) -> Table:
    columns = [
        *_columns("Module", "Backend", "Scheme"),
        *_numbers("N", "K", "Rows"),
        *_columns("M", "Acts"),
        *_numbers("Rel. error", "Deviation", "Tolerance", "SQNR dB", "Max abs", "Cosine", "Wrong layout"),
    ]
    return Table(columns, [Row(_run(run), anchor) for run, anchor in ids.items()])


def _run(run: Agreement) -> Sequence[Cell]:
    error, sqnr, wrong = run.error or 0.0, run.sqnr_db, run.wrong_layout
    return (
        Cell(matrix_name(run)),
        Cell(run.backend),
        Cell(run.scheme),
        _number(run.N),
        _number(run.K),
        _number(run.rows),
        Cell(" ".join(map(str, run.M))),
        Cell(run.activation),
        _number(error, f"{error:.2e}"),
        Cell(f"{run.deviation:.1e}", "num" if run.passed else "num bad", run.deviation),
        _number(run.tolerance, f"{run.tolerance:.1e}"),
        _number(-1.0 if sqnr is None else min(sqnr, 999.0), "" if sqnr is None else f"{sqnr:.1f}"),
        _number(run.max_abs, f"{run.max_abs:.1e}"),
        _number(run.cosine, f"{run.cosine:.7f}"),
        _number(wrong or 0.0, "" if wrong is None else f"{wrong:.1e}"),
    )


def _sanity(sanity: Mapping[str, Sanity]) -> Table:
    titles = ("Scales", "NaN, Inf", "Zero", "Dead groups", "Largest / rms scale", "Codes at an end")
    rows = []
    for name, h in sanity.items():
        outlier = h.scale_max / h.scale_typical if h.scale_typical else 0.0
        ends = h.saturated / max(h.codes, 1)
        cells = (
            Cell(name),
            _number(h.groups, f"{h.groups:,}"),
            _number(h.bad_scales + h.bad_codes),
            _number(h.zero_scales),
            _number(h.dead_groups),
            _number(outlier, f"{outlier:.1f}"),
            _number(ends, f"{ends:.2%}"),
        )
        rows.append(Row(cells))
    return Table([Column("Module"), *_numbers(*titles)], rows)


def _not_run(verdict: Verdict) -> Table | None:
    refused = {(run.backend, run.reason or "") for run in verdict.kernels if not run.ran}
    rows = [Row((Cell(name), Cell(why, "wrap"))) for name, why in (*verdict.unavailable.items(), *sorted(refused))]
    return Table(_columns("Backend", "Reason"), rows) if rows else None


def _columns(*titles: str) -> Sequence[Column]:
    return [Column(title) for title in titles]


def _numbers(*titles: str) -> Iterable[Column]:
    return [Column(title, is_number=True) for title in titles]


def _number(value: float, shown: str | None = None) -> Cell:
    return Cell(str(value) if shown is None else shown, "num", value)
