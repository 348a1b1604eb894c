"""The end of `verify` in a terminal."""

from __future__ import annotations

from pathlib import Path

from xpuquant.conversion.cli.output import Answer, Grid
from xpuquant.conversion.report.markdown import checks
from xpuquant.conversion.report.reports import as_data
from xpuquant.conversion.report.sentences import by_kernel, decibels
from xpuquant.conversion.verify.verdict import Verdict

_SHOWN = 20


def answer(verdict: Verdict, report: Path | None) -> Answer:
    """What a person reads, and verify.json for a program."""
    parts: list[str | Grid] = []
    for title, found in (("failures", verdict.failing), ("warnings", verdict.warnings)):
        if found:
            rows = [(finding.check, finding.where, finding.what) for finding in found[:_SHOWN]]
            parts.append(Grid(title, ("check", "where", "what"), rows))
        if len(found) > _SHOWN:
            parts.append(f"and {len(found) - _SHOWN} more {title}; --json lists them all")
    figures: list[tuple[str, str, str, str]] = []
    for (backend, activation), runs in by_kernel(verdict).items():
        worst = max(runs, key=lambda run: run.error or 0.0)
        modules = f"{len({run.module for run in runs})} of {len(verdict.schemes)}"
        figures.append((f"{backend} {activation}", modules, decibels(worst), f"{worst.error:.1e}"))
    refusals = dict.fromkeys((run.backend, run.reason or "") for run in verdict.kernels if not run.ran)
    not_run = [*verdict.unavailable.items(), *refusals]
    if figures:
        columns = ("kernels", "modules", "least exact", "rel. error")
        parts.append(Grid("", columns, figures))
    if not_run:
        parts.append(Grid("", ("not run", "because"), not_run))
    parts.append(Grid("", ("check", "result", "what was looked at"), checks(verdict)))
    if verdict.unchecked:
        parts.append(f"{len(verdict.unchecked)} of {len(verdict.schemes)} modules were computed by no real kernel here")
    if report is not None:
        parts.append(f"reports in {report}: verify.json, verify.md, verify.html, verify.svg")
    return Answer(parts, as_data(verdict))
