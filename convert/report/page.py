"""verify.html: a verdict as one page. Nothing is loaded from elsewhere; it opens from a disk without a network.

A little script sorts the tables; without it everything is still there to read.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from xpuquant.conversion.report.heatmap import heat_map
from xpuquant.conversion.report.markdown import checks, matrix_name
from xpuquant.conversion.verify.agreement import BINS
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Finding, Health, Verdict

_MOST_LISTED = 200

_CSS = """
:root{color-scheme:light dark;--fg:#1f2328;--soft:#57606a;--bg:#fff;--line:#d0d7de;--band:#f6f8fa;--ok:#1a7f37;
--bad:#d1242f;--warn:#9a6700;--bar:#21918c}
@media(prefers-color-scheme:dark){:root{--fg:#e6edf3;--soft:#9da7b3;--bg:#0d1117;--line:#30363d;--band:#161b22;
--ok:#3fb950;--bad:#f85149;--warn:#d29922;--bar:#35b7a9}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:24px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:24px;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:17px;margin:32px 0 8px}
p{margin:4px 0}.soft{color:var(--soft)}.ok{color:var(--ok)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.scroll{overflow-x:auto}ul{margin:4px 0;padding-left:20px}li{overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:13px;width:100%}
th,td{padding:4px 10px;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
td.wrap{white-space:normal}td.num,th.num{text-align:right;font-variant-numeric:tabular-nums}
thead th{background:var(--band);position:sticky;top:0}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--bar)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
tr:target td{background:color-mix(in srgb,var(--bar) 25%,transparent)}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:32px}
.chart text{font:12px system-ui,sans-serif;fill:var(--fg)}.chart .soft{fill:var(--soft)}
.chart .bar0{fill:var(--bar)}.chart .bar1{fill:#6e7fd1}
.chart .bar2{fill:#c98a2b}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.sort")) {
  table.querySelectorAll("th").forEach((head, column) => head.querySelector("button").onclick = () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b), n = Number(x) - Number(y);
      return (Number.isNaN(n) ? x.localeCompare(y, undefined, {numeric: true}) : n) * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  });
}
"""


def page(verdict: Verdict) -> str:
    """The whole page."""
    ran = [run for run in verdict.kernels if run.ran]
    ids = {run: f"r{i}" for i, run in enumerate(ran)}
    state = '<span class="ok">verified</span>' if verdict.passed else '<span class="bad">failed</span>'
    sections = [
        f"<h1>{_text(verdict.repo)}: {state}</h1>",
        f'<p class="soft">Written by {_text(verdict.producer or "unknown")}.</p>',
        _table(("Check", "Result", "What was looked at"), [_check(*row) for row in checks(verdict)]),
        _findings("Failures", "bad", verdict.failing),
        _findings("Warnings", "warn", verdict.warnings),
    ]
    if verdict.schemes:
        picture = heat_map(verdict, ids)
        sections.append(f'<h2>Kernels, module by module</h2><div class="scroll">{picture}</div>')
    sections.append(
        f'<div class="two"><div>{_histogram(ran)}</div><div>{_bytes(verdict.before, verdict.after)}</div></div>'
    )
    if ran:
        sections += ["<h2>Kernel runs</h2>", _runs(ids)]
    if verdict.health:
        sections += ["<h2>Scales and codes</h2>", _health(verdict.health)]
    sections.append(_not_run(verdict))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{_text(verdict.repo)}: {'verified' if verdict.passed else 'failed'}</title>\n"
        f"<style>{_CSS}</style></head>\n<body>\n" + "\n".join(filter(None, sections)) + "\n"
        f"<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def _check(check: str, result: str, what: str) -> tuple[str, ...]:
    kind = "bad" if result.startswith("FAIL") else "ok" if result.startswith("pass") else "soft"
    return _td(check), f'<td class="{kind}">{_text(result)}</td>', _td(what, "wrap")


def _findings(title: str, kind: str, found: Sequence[Finding]) -> str:
    if not found:
        return ""
    lines = [f"<li>{_text(finding.line())}</li>" for finding in found[:_MOST_LISTED]]
    if len(found) > _MOST_LISTED:
        lines.append(f"<li>and {len(found) - _MOST_LISTED} more, in verify.json</li>")
    return f'<h2 class="{kind}">{title} ({len(found)})</h2><ul>{"".join(lines)}</ul>'


def _histogram(ran: Sequence[Agreement]) -> str:
    """Shares of |error| / rms, a bar for each power of ten and dtype of the activations."""
    real = [run for run in ran if run.backend != REFERENCE] or list(ran)
    groups: dict[str, list[int]] = {}
    for run in real:
        counts = groups.setdefault(run.activation, [0] * (len(BINS) + 1))
        groups[run.activation] = [a + b for a, b in zip(counts, run.histogram or counts, strict=True)]
    groups = {dtype: counts for dtype, counts in groups.items() if sum(counts)}
    if not groups:
        return ""
    width, height, base, step = 400, 176, 112, 36
    each = (step - 6) / len(groups)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="Histogram of errors">']
    for order, (dtype, counts) in enumerate(groups.items()):
        for i, count in enumerate(counts):
            share = count / sum(counts)
            tall = 0.0 if not count else max(2.0, share * 92)
            x = 3 + i * step + order * each
            below = f"errors up to {BINS[i]:.0e}" if i < len(BINS) else "larger errors"
            said = f"{dtype}: {below} of the rms: {count} outputs, {share:.1%}"
            parts.append(
                f'<rect class="bar{order % 3}" x="{x:.1f}" y="{base - tall:.1f}" width="{each:.1f}" '
                f'height="{tall:.1f}"><title>{_text(said)}</title></rect>'
            )
            if share >= 0.05:
                at = f'x="{x + each / 2:.1f}" y="{base - tall - 5:.1f}"'
                parts.append(f'<text {at} text-anchor="middle">{share:.0%}</text>')
        legend = 4 + order * 130
        parts.append(f'<rect class="bar{order % 3}" x="{legend}" y="{base + 46}" width="12" height="10"/>')
        parts.append(f'<text class="soft" x="{legend + 18}" y="{base + 55}">{_text(dtype)} activations</text>')
    for i in range(len(BINS) + 1):
        label = f"10{_superscript(round(math.log10(BINS[i])))}" if i < len(BINS) else "more"
        parts.append(f'<text class="soft" x="{i * step + 18}" y="{base + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="soft" x="4" y="{base + 36}">upper edge of |error| / rms(output)</text></svg>')
    names = ", ".join(dict.fromkeys(run.backend for run in real))
    total = sum(sum(counts) for counts in groups.values())
    return f"<h2>Errors of {total:,} outputs ({_text(names)})</h2>" + "".join(parts)


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _bytes(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    if not after:
        return ""
    rows = []
    for dtype in dict.fromkeys((*after, *before)):
        rows.append(
            (
                _td(dtype),
                *(_number(table.get(dtype, 0), _size(table.get(dtype, 0))) for table in (before, after)),
            )
        )
    totals = [_number(sum(t.values()), f"<b>{_size(sum(t.values()))}</b>") for t in (before, after)]
    if not before:
        rows, totals = [(row[0], row[2]) for row in rows], totals[1:]
    rows.append(("<td><b>total</b></td>", *totals))
    columns = ("Stored as", "Source", "Converted") if before else ("Stored as", "Converted")
    return "<h2>Bytes by dtype</h2>" + _table(columns, rows, numbers=(1, 2))


def _runs(ids: Mapping[Agreement, str]) -> str:
    columns = (
        "Module",
        "Backend",
        "Scheme",
        "N",
        "K",
        "Rows",
        "M",
        "Acts",
        "Rel. error",
        "Deviation",
        "Tolerance",
        "SQNR dB",
        "Max abs",
        "Cosine",
        "Wrong layout",
    )
    rows = []
    for run in ids:
        error = run.error or 0.0
        sqnr = run.sqnr_db
        rows.append(
            (
                _td(matrix_name(run)),
                _td(run.backend),
                _td(run.scheme),
                _number(run.N),
                _number(run.K),
                _number(run.rows),
                _td(" ".join(map(str, run.M))),
                _td(run.activation),
                _number(error, f"{error:.2e}"),
                f'<td class="num{"" if run.passed else " bad"}" data-v="{run.deviation!r}">{run.deviation:.1e}</td>',
                _number(run.tolerance, f"{run.tolerance:.1e}"),
                _number(-1.0 if sqnr is None else min(sqnr, 999.0), "" if sqnr is None else f"{sqnr:.1f}"),
                _number(run.max_abs, f"{run.max_abs:.1e}"),
                _number(run.cosine, f"{run.cosine:.7f}"),
                _number(run.wrong_layout or 0.0, "" if run.wrong_layout is None else f"{run.wrong_layout:.1e}"),
            )
        )
    return _table(columns, rows, numbers=(3, 4, 5, *range(8, 15)), ids=list(ids.values()), sortable=True)


def _health(health: Mapping[str, Health]) -> str:
    columns = (
        "Module",
        "Scales",
        "NaN, Inf",
        "Zero",
        "Dead groups",
        "Largest / rms scale",
        "Codes at an end",
    )
    rows = []
    for name, h in health.items():
        outlier = h.scale_max / h.scale_typical if h.scale_typical else 0.0
        ends = h.saturated / max(h.codes, 1)
        rows.append(
            (
                _td(name),
                _number(h.groups, f"{h.groups:,}"),
                _number(h.bad_scales + h.bad_codes),
                _number(h.zero_scales),
                _number(h.dead_groups),
                _number(outlier, f"{outlier:.1f}"),
                _number(ends, f"{ends:.2%}"),
            )
        )
    return _table(columns, rows, numbers=range(1, 7), sortable=True)


def _not_run(verdict: Verdict) -> str:
    refused = {(run.backend, run.reason or "") for run in verdict.kernels if not run.ran}
    rows = [(_td(name), _td(why, "wrap")) for name, why in (*verdict.unavailable.items(), *sorted(refused))]
    table = f"<h2>Backends that did not run</h2>{_table(('Backend', 'Reason'), rows)}" if rows else ""
    if not verdict.unchecked:
        return table
    lines = "".join(f"<li>{_text(name)}</li>" for name in verdict.unchecked[:_MOST_LISTED])
    title = f"Modules that no real kernel computed here: {len(verdict.unchecked)} of {len(verdict.schemes)}"
    return f'{table}<h2 class="warn">{title}</h2><ul>{lines}</ul>'


def _table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Iterable[int] = (),
    ids: Sequence[str] | None = None,
    sortable: bool = False,
) -> str:
    right = set(numbers)
    heads = "".join(
        f'<th class="num">{title}</th>' if i in right else f"<th>{title}</th>"
        for i, title in enumerate(f"<button>{_text(c)}</button>" if sortable else _text(c) for c in columns)
    )
    body = "\n".join(
        f'<tr id="{ids[i]}">{"".join(row)}</tr>' if ids else f"<tr>{''.join(row)}</tr>" for i, row in enumerate(rows)
    )
    kind = ' class="sort"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _td(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{_text(text)}</td>' if kind else f"<td>{_text(text)}</td>"


def _number(value: float, shown: str | None = None) -> str:
    return f'<td class="num" data-v="{value!r}">{value if shown is None else shown}</td>'


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def _text(text: str) -> str:
    """Escaped; names come from strangers' files."""
    return html.escape("".join(c if c.isprintable() else "?" for c in text), quote=True)
