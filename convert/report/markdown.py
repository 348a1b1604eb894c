"""verify.md: a verdict as tables that paste well into an issue, a pull request or a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xpuquant.conversion.report.sentences import exactness, unquantized
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Verdict
from xpuquant.errors import one_line

_WORST = 10
_SHOWN = 20


def render_markdown(verdict: Verdict) -> str:
    """The whole report."""
    sections = [
        f"# {_cell(verdict.repo)}: {'verified' if verdict.passed else '**FAILED**'}",
        f"Written by {_cell(verdict.producer or 'unknown')}.",
        _table(("Check", "Result", "What"), checks(verdict)),
    ]
    if verdict.failures:
        sections += ["## Failures", _list(verdict.failures)]
    if verdict.warnings:
        sections += ["## Warnings", _list(finding.line() for finding in verdict.warnings)]
    ran = [run for run in verdict.kernels if run.ran]
    if ran:
        worst = sorted(ran, key=lambda run: run.deviation / (run.tolerance or 1.0), reverse=True)
        real = [run for run in worst if run.backend != REFERENCE] or worst
        sections += [
            f"## Kernels: the {min(_WORST, len(real))} largest deviations, by their tolerance",
            _runs(real[:_WORST]),
        ]
        sections += ["## Kernels: each scheme and shape at every M", _runs(_representatives(ran))]
    refused = {(run.backend, run.reason) for run in verdict.kernels if not run.ran and run.reason}
    not_run = [*verdict.unavailable.items(), *sorted(refused)]
    if not_run:
        sections += ["## Not run", _table(("Backend", "Reason"), [(name, str(why)) for name, why in not_run])]
    if verdict.unchecked:
        sections += [
            f"## Modules that no real kernel computed here: {len(verdict.unchecked)} of {len(verdict.schemes)}",
            _list(verdict.unchecked),
        ]
    return "\n\n".join(sections) + "\n"


def checks(verdict: Verdict) -> list[tuple[str, str, str]]:
    """(check, result, what was looked at), one line for each kind of check."""
    failing = {name: [f for f in verdict.failing if f.check == name] for name in _KINDS}
    modules = [checked for checked in verdict.exact if checked.matrices]
    ran = [run for run in verdict.kernels if run.ran]
    what = {
        "integrity": f"sha256 of {verdict.files} files; headers, index and config.json against each other",
        "exactness": f"{len(modules):,} modules: {exactness(verdict)}; {unquantized(verdict)}; against {verdict.basis}",
        "kernels": f"{len(verdict.schemes) - len(verdict.unchecked)} of {len(verdict.schemes)} modules by "
        + (", ".join(dict.fromkeys(run.backend for run in ran if run.backend != REFERENCE)) or "no real kernel")
        + f"; {sum(run.wrong_layout is not None for run in ran)} wrong layouts tried, each noticed",
        "sanity": f"{sum(h.groups for h in verdict.health.values()):,} scales of {len(verdict.health)} modules",
    }
    done = {
        "integrity": verdict.files > 0,
        "exactness": bool(verdict.exact),
        "kernels": bool(ran),
        "sanity": bool(verdict.health),
    }
    rows: list[tuple[str, str, str]] = []
    for kind in _KINDS:
        warned = sum(1 for finding in verdict.warnings if finding.check == kind)
        result = "pass" if not failing[kind] else f"FAIL ({len(failing[kind])})"
        if not failing[kind] and not done[kind]:
            rows.append((kind, "not run", _NOT_RUN.get(kind, "") if verdict.passed else "see below"))
            continue
        if kind == "kernels" and failing[kind]:
            what[kind] = what[kind].replace(", each noticed", "")
        if warned:
            result += f", {warned} warning{'s' * (warned > 1)}"
        rows.append((kind, result, what[kind] if done[kind] else ""))
    return rows


_NOT_RUN = {
    "integrity": "the sha256 of each file was recorded while it was written; xpuquant verify compares them",
    "exactness": "converted with --no-verify; pass --source",
}
_KINDS = ("integrity", "exactness", "kernels", "sanity")


def _representatives(ran: Sequence[Agreement]) -> list[Agreement]:
    return [run for run in ran if len(run.M) > 1]


def _runs(runs: Sequence[Agreement]) -> str:
    columns = (
        "Backend",
        "Scheme",
        "N",
        "K",
        "M",
        "Acts",
        "Rel. error",
        "Deviation",
        "Tolerance",
        "SQNR dB",
        "Cosine",
        "Module",
    )
    return _table(columns, [_row(run) for run in runs], "llrrllrrrrrl")


def _row(run: Agreement) -> tuple[str, ...]:
    sqnr = "" if run.sqnr_db is None else f"{run.sqnr_db:.1f}"
    return (
        run.backend,
        run.scheme,
        str(run.N),
        str(run.K),
        " ".join(map(str, run.M)),
        run.activation,
        f"{run.error:.2e}",
        f"{run.deviation:.1e}",
        f"{run.tolerance:.1e}",
        sqnr,
        f"{run.cosine:.7f}",
        matrix_name(run),
    )


def matrix_name(run: Agreement) -> str:
    """`model.layers.0.mlp.experts[3].gate`, or the module's name for a linear."""
    if run.expert is None:
        return run.module
    return f"{run.module}[{run.expert}].{run.role}"


def _list(lines: Iterable[str]) -> str:
    every = list(lines)
    shown = [f"- {_cell(line)}" for line in every[:_SHOWN]]
    return "\n".join(shown + [f"- and {len(every) - _SHOWN} more, in verify.json"] * (len(every) > _SHOWN))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    rule = ["---:" if side == "r" else "---" for side in align.ljust(len(columns), "l")]
    lines = [columns, rule, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    # Names come from strangers' files: `|`, `<` and backticks would break out of their cell.
    return one_line(text, 400).replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
