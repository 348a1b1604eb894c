"""verify.html: a verdict as one page. Nothing is loaded from elsewhere; it opens from a disk without a network.

What stands where, `page.html.j2` says; this is what stands there. A little script sorts the tables; without it
everything is still there to read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xpuquant.conversion.report.bars import histogram
from xpuquant.conversion.report.glossary import CHECKS, COLUMNS
from xpuquant.conversion.report.heatmap import (
    HeatMap,
    Square,
    State,
    colour,
    heat_map,
    of_tolerance,
    percent,
    real_kernels,
    shown_layers,
)
from xpuquant.conversion.report.markdown import checks, matrix_name
from xpuquant.conversion.report.sentences import headline
from xpuquant.conversion.sizes import counted, size
from xpuquant.conversion.verify.verdict import Agreement, Sanity, Verdict
from xpuquant.values import frozen

TEMPLATE = Path(__file__).with_name("page.html.j2")

_MOST_LISTED = 200
_SQUARE_WIDTH = 9.0
"""Pixels of a square of the heat map at the least: by it layers get their numbers."""


@frozen
class Column:
    """A column of a table. Numbers stand at the right."""

    title: str
    is_number: bool = False


@frozen
class Cell:
    """text   what is shown
    kind   CSS classes
    value  what is sorted by, where that is another thing than the text
    """

    text: str
    kind: str = ""
    value: float | None = None


@frozen
class Row:
    """One row of a table. `id` is what a link of the heat map names."""

    cells: Sequence[Cell]
    id: str = ""
    is_total: bool = False


@frozen
class Table:
    """Columns, and rows of as many cells. The first cell of a row names it."""

    columns: Sequence[Column]
    rows: Sequence[Row]


@frozen
class GridColumn:
    """A layer of the heat map; `is_numbered` where there is room for its number."""

    layer: int
    is_numbered: bool


@frozen
class Grid:
    """The heat map as the page shows it.

    rows   label → a square or none for each column
    links  square → the id of its run's row
    at     where on the scale the largest share stands, 0 to 1; None where it is beyond or nothing was seen
    """

    columns: Sequence[GridColumn]
    rows: Mapping[str, Sequence[Square | None]]
    links: Mapping[Square, str]
    states: frozenset[State]
    said: str
    at: float | None
    ends: tuple[str, str]


def render_page(verdict: Verdict) -> str:
    """The whole page."""
    # 80 ms, which a conversion has no use for until its end.
    from jinja2 import Environment, StrictUndefined

    def printable(value: Any) -> Any:
        """Names come from strangers' files: escaped by the environment, and without control characters."""
        if not isinstance(value, str) or hasattr(value, "__html__"):
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
    ran = sorted((run for run in verdict.kernels if run.ran), key=lambda run: run.used or 0.0, reverse=True)
    ids = {run: f"r{i}" for i, run in enumerate(ran)}
    return template.render(
        title=verdict.repo,
        outcome=str(verdict.outcome),
        sentence=headline(verdict)[:1].upper() + headline(verdict)[1:],
        facts=_facts(verdict),
        checks=checks(verdict),
        failures=[finding.line() for finding in verdict.failing],
        gaps=[gap.line() for gap in verdict.gaps],
        warnings=[finding.line() for finding in verdict.warnings],
        grid=_grid(heat_map(verdict), ids, real_kernels(verdict)) if verdict.schemes else None,
        histogram=histogram(ran),
        sizes=_sizes(verdict.before, verdict.after),
        runs=_runs(ids) if ran else None,
        sanity=_sanity(verdict.sanity) if verdict.sanity else None,
        not_run=_not_run(verdict),
        unchecked=verdict.unchecked,
        modules=len(verdict.schemes),
        most_listed=_MOST_LISTED,
        glossary={"Checks": CHECKS, "Columns": COLUMNS},
    ).lstrip()


def _facts(verdict: Verdict) -> dict[str, str]:
    """What a reader asks first. What is not known is not named."""
    schemes = Counter(verdict.schemes.values())
    before, after = sum(verdict.before.values()), sum(verdict.after.values())
    setting = verdict.setting
    facts = {
        "Checked": setting.date if setting else "",
        "Model": verdict.model,
        "Stored as": ", ".join(f"{scheme} ({counted(count, 'module')})" for scheme, count in schemes.items()),
        "Tensors": size(after) + (f", {size(before)} in the source" if before else "") if after else "",
        "Source": verdict.source,
        "Compared with": verdict.basis,
        "Hardware": setting.hardware if setting else "",
        "Versions": ", ".join(f"{tool} {version}" for tool, version in setting.versions.items()) if setting else "",
        "Written by": verdict.producer or "unknown",
    }
    return {name: said for name, said in facts.items() if said}


def _grid(shown: HeatMap, ids: Mapping[Agreement, str], kernels: str) -> Grid:
    numbered, largest = shown_layers(shown.layers, _SQUARE_WIDTH), shown.largest
    used = None if largest is None or largest.run is None else largest.run.used
    links = {square: ids[square.run] for square in shown.squares if square.run is not None and square.run in ids}
    said = ""
    if largest is not None and largest.run is not None:
        said = f"{of_tolerance(used)}, {matrix_name(largest.run)} ({kernels or largest.run.backend})"
    return Grid(
        columns=[GridColumn(layer, layer in numbered) for layer in shown.layers],
        rows={label: [members.get(layer) for layer in shown.layers] for label, members in shown.rows.items()},
        links=links,
        states=shown.states,
        said=said,
        at=round(used, 3) if used is not None and used <= 1 else None,
        ends=(colour(0), colour(1)),
    )


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
        *_columns("Module"),
        *_numbers("Of tolerance"),
        *_columns("Backend", "Acts", "M"),
        *_numbers("N", "K", "Rows"),
        *_numbers("Rel. error", "Deviation", "Tolerance", "SQNR dB", "Max abs", "Cosine", "Wrong layout"),
        *_columns("Scheme"),
    ]
    return Table(columns, [Row(_run(run), anchor) for run, anchor in ids.items()])


def _run(run: Agreement) -> Sequence[Cell]:
    error, sqnr, wrong = run.error or 0.0, run.sqnr_db, run.wrong_layout
    return (
        Cell(matrix_name(run)),
        Cell(percent(run.used), "num" if run.passed else "num bad", run.used),
        Cell(run.backend),
        Cell(run.activation),
        Cell(" ".join(map(str, run.M))),
        _number(run.N),
        _number(run.K),
        _number(run.rows),
        _number(error, f"{error:.2e}"),
        _number(run.deviation, f"{run.deviation:.1e}"),
        _number(run.tolerance, f"{run.tolerance:.1e}"),
        _number(-1.0 if sqnr is None else min(sqnr, 999.0), "" if sqnr is None else f"{sqnr:.1f}"),
        _number(run.max_abs, f"{run.max_abs:.1e}"),
        _number(run.cosine, f"{run.cosine:.7f}"),
        _number(wrong or 0.0, "" if wrong is None else f"{wrong:.1e}"),
        Cell(run.scheme),
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
