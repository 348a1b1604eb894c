"""The answers of `convert`, `finish`, `push`, `verify` and `doctor`: what a person reads, and the same as data."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from xpuquant.conversion.cli.output import Answer, Typed
from xpuquant.conversion.cli.plan_answers import engines_table, left_alone, modules_table, notes, plan_data
from xpuquant.conversion.cli.tables import TextTable
from xpuquant.conversion.report.markdown import checks
from xpuquant.conversion.report.reports import as_data, by_claim
from xpuquant.conversion.report.sentences import by_kernel, decibels, exactness, headline, in_one_line, unquantized
from xpuquant.conversion.results import Converted, PartConverted, Planned
from xpuquant.conversion.sizes import counted, size
from xpuquant.conversion.verify.proof import Proof
from xpuquant.conversion.verify.verdict import Outcome

if TYPE_CHECKING:
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.doctor import Diagnosis
    from xpuquant.conversion.hub.publish import Pushed
    from xpuquant.conversion.verify.verdict import Verdict

_MAX_FINDINGS = 20


def converted(result: Converted | PartConverted, output: Output) -> Answer:
    """The end of `convert` and of `finish`."""
    if isinstance(result, PartConverted):
        return _part(result)
    if result.pushed is None:
        return _converted(result, output)
    published = pushed(result.pushed, output)
    if not result.is_new:
        return published
    made = _converted(result, output)
    return Answer(
        [*made.parts, *published.parts], {**made.data, "pushed": published.data}, published.brief, made.warned
    )


def _converted(result: Converted, output: Output) -> Answer:
    plan, verdict = result.plan, result.verdict
    # Without a folder it is served from the Hub.
    out = str(result.out) if result.out is not None or result.pushed is None else result.pushed.repo_id
    if verdict is not None:
        proof, checked = verdict.proof, in_one_line(verdict)
    elif result.is_new:
        proof = Proof.none(sum(module.matrices for module in plan.modules), len(plan.passed))
        checked = f"{exactness(proof)}; {unquantized(proof)} (--no-verify)"
    else:
        proof, checked = Proof.none(0, 0), f"{_looked_at(plan)}; all of it: {shlex.join(['xpuquant', 'verify', out])}"
    outcome = Outcome.NOT_VERIFIED if verdict is None else verdict.outcome
    before = [] if result.is_new else [f"{out} is finished already: nothing was left to do"]
    device = "xpu" if plan.options.layout == "xpu" else "auto"
    facts = TextTable(
        "",
        ("", ""),
        (
            ("left as is", left_alone(plan)),
            ("size", f"{size(plan.source.nbytes)} → {size(plan.write_bytes)} in {counted(len(plan.shards), 'shard')}"),
            (str(outcome) if result.is_new else "checked", checked),
            ("written to", out),
            *([("took", output.took(plan.read_bytes))] if result.is_new else []),
        ),
    )
    serve = [
        Typed(f"serve it:  vllm serve {shlex.quote(out)}"),
        Typed(f'       or  {plan.source.auto_class}.from_pretrained({json.dumps(out)}, device_map="{device}")'),
    ]
    data = plan_data(plan) | {
        "out": out,
        "kept": dict(sorted(result.kept.items())),
        "shards": {name: {"sha256": f.sha256, "bytes": f.nbytes} for name, f in sorted(result.shards.items())},
        "proof": {"verdict": str(outcome), "matrices": by_claim(proof)} if result.is_new else None,
        "verification": None if verdict is None else as_data(verdict),
    }
    engines = engines_table([one for one in plan.engines if one.outcome in ("refuses", "fails")])
    return Answer(
        [*before, *notes(plan.notes), modules_table(plan.modules), *engines, facts, *serve], data, out, _warned(verdict)
    )


def _looked_at(plan: Planned) -> str:
    """What was compared of a conversion that was finished before: see `runs/request.py`."""
    if plan.source.revision is not None:
        return "the commit of the source, the options, the sizes of the shards and the sha256 of the other files"
    weights = "some rows of each module and the start of each other tensor"
    return f"the options, the sizes of the shards, {weights}; the sha256 of the other files"


def _part(result: PartConverted) -> Answer:
    made = f"{len(result.shards)} of {counted(result.of, 'shard')}, {size(result.nbytes)}"
    text = f"part {result.part}: {made}, staged in {result.out}"
    hint = Typed(f"when every part is done: {shlex.join(['xpuquant', 'finish', result.source, str(result.out)])}")
    return Answer([text, hint], {"part": result.part, "shards": {n: f.sha256 for n, f in result.shards.items()}}, text)


def pushed(result: Pushed, output: Output) -> Answer:
    """What a push did."""
    there = f", {len(result.unchanged)} were there" if result.unchanged else ""
    rows = [
        ("pushed to", result.url if result.revision == "main" else f"{result.url} ({result.revision})"),
        ("uploaded", f"{counted(len(result.uploaded), 'file')}, {size(result.nbytes)}{there}"),
        ("compared", "every checksum on the Hub equals the local one"),
        ("took", output.took(result.nbytes)),
    ]
    if result.removed:
        rows.append(("removed", f"stale: {', '.join(result.removed)}"))
    return Answer([*notes(result.notes), TextTable("", ("", ""), rows)], asdict(result), result.url)


def verified(verdict: Verdict, report: Path | None) -> Answer:
    """The end of `verify`: tables for a person, verify.json for a program."""
    parts: list[str | TextTable] = []
    for title, found in (
        ("failures", verdict.failing),
        ("not checked", verdict.gaps),
        ("warnings", verdict.warnings),
    ):
        if found:
            rows = [(finding.check, finding.where, finding.what) for finding in found]
            parts.append(TextTable(title, ("check", "where", "what"), rows, most=_MAX_FINDINGS))
    figures: list[tuple[str, str, str, str]] = []
    for (backend, activation), runs in by_kernel(verdict).items():
        worst = max(runs, key=lambda run: run.error or 0.0)
        modules = f"{len({run.module for run in runs})} of {len(verdict.schemes)}"
        figures.append((f"{backend} {activation}", modules, decibels(worst), f"{worst.error:.1e}"))
    refusals = dict.fromkeys((run.backend, run.reason or "") for run in verdict.kernels if not run.ran)
    not_run = [*verdict.unavailable.items(), *refusals]
    if figures:
        parts.append(TextTable("", ("kernels", "modules", "least exact", "rel. error"), figures))
    if not_run:
        parts.append(TextTable("", ("not run", "because"), not_run))
    parts.append(TextTable("", ("check", "result", "what was looked at"), checks(verdict)))
    if verdict.unchecked:
        parts.append(f"{len(verdict.unchecked)} of {len(verdict.schemes)} modules were computed by no real kernel here")
    if report is not None:
        parts.append(f"reports in {report}: verify.json, verify.md, verify.html, verify.svg")
    parts.append(headline(verdict))
    return Answer(parts, as_data(verdict), headline(verdict), _warned(verdict))


def _warned(verdict: Verdict | None) -> list[str]:
    """What is odd about the numbers, a line each, and how many more there are."""
    lines = [] if verdict is None else [finding.line() for finding in verdict.warnings]
    more = len(lines) - _MAX_FINDINGS
    return lines[:_MAX_FINDINGS] + [f"{more} more in verify.md"] * (more > 0)


def diagnosed(diagnosis: Diagnosis) -> Answer:
    """The end of `doctor`."""
    rows = [
        (
            one.name,
            "yes" + f", on {one.device}" * bool(one.device) if one.problem is None else "no",
            one.problem or "",
        )
        for one in diagnosis.backends
    ]
    packages = [(name, version or "not installed") for name, version in diagnosis.versions.items()]
    devices = ", ".join(diagnosis.devices) or "none"
    parts: list[str | TextTable] = [
        TextTable("kernel backends", ("backend", "runs here", "why not, and the fix"), rows),
        TextTable("versions", ("package", "version"), packages),
        f"Intel GPUs: {devices}",
        *notes(diagnosis.remarks),
        f"{diagnosis.system}, {sys.executable}",
    ]
    running = [one.name for one in diagnosis.backends if one.problem is None]
    return Answer(parts, asdict(diagnosis), f"runs here: {', '.join(running)}; Intel GPUs: {devices}")
