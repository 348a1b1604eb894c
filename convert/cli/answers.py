"""Results as answers: what a person reads at the end of a command, and the same as data."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.cli.output import Answer, TextTable
from xpuquant.conversion.report.markdown import checks
from xpuquant.conversion.report.reports import as_data, by_claim
from xpuquant.conversion.report.sentences import by_kernel, decibels, exactness, headline, in_one_line, unquantized
from xpuquant.conversion.results import Converted, ModuleOutcome, PartConverted, Planned
from xpuquant.conversion.sizes import size
from xpuquant.conversion.verify.proof import Proof
from xpuquant.conversion.verify.verdict import Outcome
from xpuquant.formats.scheme import compact
from xpuquant.formats.weights.base import PIECE_BYTES

if TYPE_CHECKING:
    from xpuquant.conversion.diff import Difference
    from xpuquant.conversion.doctor import Diagnosis
    from xpuquant.conversion.hub.publish import Pushed
    from xpuquant.conversion.inspection import Inspection
    from xpuquant.conversion.verify.verdict import Verdict

_ON_THE_WAY_BYTES = 16 << 20
"""Per worker: pieces made ahead, blocks before the disk."""

_MAX_FINDINGS = 20
_MAX_DIFFERENCES = 30
_MAX_DECISIONS = 12


def converted(result: Converted | PartConverted) -> Answer:
    """The end of `convert` and of `finish`."""
    if isinstance(result, PartConverted):
        return _part(result)
    if result.pushed is None:
        return _converted(result)
    published = pushed(result.pushed)
    if not result.is_new:
        return published
    made = _converted(result)
    return Answer([*made.parts, *published.parts], {**made.data, "pushed": published.data})


def _converted(result: Converted) -> Answer:
    plan, verdict = result.plan, result.verdict
    # Without a folder it is served from the Hub.
    out = str(result.out) if result.out is not None or result.pushed is None else result.pushed.repo_id
    if verdict is not None:
        proof, checked = verdict.proof, in_one_line(verdict)
    elif result.is_new:
        proof = Proof.none(sum(module.matrices for module in plan.modules), len(plan.passed))
        checked = f"{exactness(proof)}; {unquantized(proof)} (--no-verify)"
    else:
        proof, checked = Proof.none(0, 0), "not again: xpuquant verify checks it"
    outcome = Outcome.NOT_VERIFIED if verdict is None else verdict.outcome
    before = [] if result.is_new else [f"{out} is finished already; nothing was left to do"]
    device = "xpu" if plan.options.layout == "xpu" else "auto"
    facts = TextTable(
        "",
        ("", ""),
        (
            ("left as is", left_alone(plan)),
            ("size", f"{size(plan.source.nbytes)} → {size(plan.write_bytes)} in {len(plan.shards)} shard(s)"),
            (str(outcome), checked),
            ("written to", out),
            ("serve", f"vllm serve {out}"),
            ("", f'AutoModelForCausalLM.from_pretrained("{out}", device_map="{device}")'),
        ),
    )
    data = plan_data(plan) | {
        "out": out,
        "shards": {name: {"sha256": f.sha256, "bytes": f.nbytes} for name, f in sorted(result.shards.items())},
        "proof": {"verdict": str(outcome), "matrices": by_claim(proof)},
        "verification": None if verdict is None else as_data(verdict),
    }
    return Answer([*before, *_notes(plan.notes), modules_table(plan.modules), facts], data)


def _part(result: PartConverted) -> Answer:
    made = f"{len(result.shards)} of {result.of} shards, {size(result.nbytes)}"
    text = f"part {result.part}: {made}, staged in {result.out}"
    hint = f"when every part is done: {shlex.join(['xpuquant', 'finish', result.source, str(result.out)])}"
    return Answer([text, hint], {"part": result.part, "shards": {n: f.sha256 for n, f in result.shards.items()}})


def planned(plan: Planned, jobs: int, part: str | None = None) -> Answer:
    """`convert --dry-run`, of all or of a part."""
    shards = TextTable(
        "output shards" if part is None else f"output shards of part {part}",
        ("file", "tensors", "size"),
        [(shard.name, str(len(shard.tensors)), size(shard.nbytes)) for shard in plan.shards],
    )
    memory = jobs * (PIECE_BYTES + _ON_THE_WAY_BYTES)
    facts = TextTable(
        "",
        ("", ""),
        (
            ("left as is", left_alone(plan)),
            ("reads", size(plan.read_bytes)),
            ("writes", size(plan.write_bytes)),
            ("buffers", f"about {size(memory)} with {jobs} jobs, whatever the size of the model"),
        ),
    )
    return Answer(
        [*_notes(plan.notes), modules_table(plan.modules), shards, facts],
        plan_data(plan) | ({} if part is None else {"part": part}),
    )


def pushed(result: Pushed) -> Answer:
    """What a push did."""
    there = f", {len(result.unchanged)} were there" if result.unchanged else ""
    rows = [
        ("pushed to", result.url if result.revision == "main" else f"{result.url} ({result.revision})"),
        ("uploaded", f"{len(result.uploaded)} files, {size(result.nbytes)}{there}"),
        ("compared", "every checksum on the Hub equals the local one"),
    ]
    if result.removed:
        rows.append(("removed", f"stale: {', '.join(result.removed)}"))
    return Answer([*_notes(result.notes), TextTable("", ("", ""), rows)], asdict(result))


def inspected(found: Inspection) -> Answer:
    """The end of `inspect`."""
    verdict = "no: some modules have no exact XPU layout" if found.refused else "yes, every module has an exact layout"
    if any(module.scheme is None for module in found.modules):
        verdict = "yes, with some modules dequantized to bf16"
    says = f"config.json says '{found.quant_method}'"
    facts = TextTable(
        "",
        ("", ""),
        (
            ("checkpoint", found.source.name),
            ("model", f"{found.model_type or 'unknown'}, {found.tensors} tensors"),
            ("format", f"{', '.join(found.formats) or 'unknown'} ({says})"),
            ("size", size(found.source.nbytes)),
            ("converts", verdict),
        ),
    )
    parts: list[str | TextTable] = [facts, *_notes(found.notes)]
    if found.modules:
        parts.append(modules_table(found.modules))
    if found.refused:
        by_reason: dict[str, list[str]] = {}
        for name, reason in found.refused.items():
            by_reason.setdefault(reason, []).append(name)
        rows = [(reason, str(len(names)), ", ".join(compact(names)[:6])) for reason, names in by_reason.items()]
        parts.append(TextTable("refused", ("reason", "modules", "which"), rows))
    if found.decisions:
        common = [(fact, str(count)) for fact, count in Counter(found.decisions).most_common(_MAX_DECISIONS)]
        parts.append(TextTable("decided from the tensors", ("what", "matrices"), common))
    splits = [(str(n), _split(problems)) for n, problems in found.tensor_parallel.items()]
    parts.append(TextTable("tensor parallel", ("GPUs", "splits"), splits))
    data = {
        "source": _source_data(found),
        "model_type": found.model_type,
        "quant_method": found.quant_method,
        "formats": list(found.formats),
        "converts": found.converts,
        "modules": {module.name: module.scheme or "bf16" for module in found.modules},
        "refused": found.refused,
        "decisions": found.decisions,
        "tensor_parallel": {str(n): problems for n, problems in found.tensor_parallel.items()},
        "notes": list(found.notes),
    }
    return Answer(parts, data)


def _split(problems: Mapping[str, str]) -> str:
    if not problems:
        return "yes"
    name, problem = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"no: {name}: {problem}{more}"


def verified(verdict: Verdict, report: Path | None) -> Answer:
    """The end of `verify`: tables for a person, verify.json for a program."""
    parts: list[str | TextTable] = []
    for title, found in (
        ("failures", verdict.failing),
        ("not checked", verdict.gaps),
        ("warnings", verdict.warnings),
    ):
        if found:
            rows = [(finding.check, finding.where, finding.what) for finding in found[:_MAX_FINDINGS]]
            parts.append(TextTable(title, ("check", "where", "what"), rows))
        if len(found) > _MAX_FINDINGS:
            parts.append(f"and {len(found) - _MAX_FINDINGS} more {title}; --json lists them all")
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
    return Answer(parts, as_data(verdict))


def compared(difference: Difference) -> Answer:
    """The end of `diff`."""
    d = difference
    rows: list[tuple[str, str]] = [(name, f"only in {d.a}") for name in d.only_a]
    rows += [(name, f"only in {d.b}") for name in d.only_b]
    rows += [(name, f"{ours} against {theirs}") for name, (ours, theirs) in d.types.items()]
    for v in d.values:
        gap = "" if v.max_abs is None else f", by {v.max_abs:.3g} at the most"
        rows.append((v.name, f"{v.differ} of {v.elements} values differ, the first at {v.first}{gap}"))
    what = "equal, bytes and all" if d.compared_values else "equal in name, dtype and shape (bytes not compared)"
    parts: list[str | TextTable] = []
    if rows:
        parts.append(TextTable("", ("tensor", "difference"), rows[:_MAX_DIFFERENCES]))
    if len(rows) > _MAX_DIFFERENCES:
        parts.append(f"and {len(rows) - _MAX_DIFFERENCES} more; --json lists them all")
    parts.append(f"{d.same} tensors ({size(d.same_bytes)}) are {what}; {len(rows)} are not")
    data: dict[str, Any] = {"equal": d.equal, **asdict(d)}
    data["types"] = {name: list(types) for name, types in d.types.items()}
    return Answer(parts, data)


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
        *_notes(diagnosis.remarks),
        f"{diagnosis.system}, {sys.executable}",
    ]
    return Answer(parts, asdict(diagnosis))


def modules_table(modules: Iterable[ModuleOutcome]) -> TextTable:
    """Modules per scheme: what they were, what they become, which kernel will run them."""
    rows: dict[tuple[str, str, str, str], list[ModuleOutcome]] = {}
    for module in modules:
        stored = module.scheme or "bf16 (dequantized)"
        key = (module.source, stored, module.kernel or "bf16 matmul", module.releases or "any")
        rows.setdefault(key, []).append(module)
    return TextTable(
        "modules",
        ("source", "stored as", "XPU kernel", "vllm-xpu-kernels", "modules", "size"),
        [(*key, str(len(members)), size(sum(member.nbytes for member in members))) for key, members in rows.items()],
    )


def left_alone(plan: Planned) -> str:
    """What stays unquantized, and why."""
    if not plan.passed:
        return "nothing"
    total = sum(tensor.nbytes for tensor in plan.passed)
    matrices = [tensor.name for tensor in plan.passed if len(tensor.shape) >= 2]
    shown = ", ".join(compact(name.removesuffix(".weight") for name in matrices)[:8])
    return f"{len(plan.passed)} tensors ({size(total)}), not quantized in the source: norms, {shown}"


def plan_data(plan: Planned) -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "source": _source_data(plan),
        "options": plan.options.as_dict(),
        "modules": {module.name: _module_data(module) for module in plan.modules},
        "passed_tensors": [tensor.name for tensor in plan.passed],
        "notes": list(plan.notes),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "output": [
            {
                "file": shard.name,
                "bytes": shard.nbytes,
                "tensors": [
                    {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape} for tensor in shard.tensors
                ],
            }
            for shard in plan.shards
        ],
    }


def _source_data(of: Planned | Inspection) -> dict[str, Any]:
    return {"name": of.source.name, "revision": of.source.revision, "bytes": of.source.nbytes}


def _module_data(module: ModuleOutcome) -> dict[str, Any]:
    return {
        "source": module.source,
        "scheme": module.scheme,
        "kernel": module.kernel,
        "releases": module.releases,
        "bytes": module.nbytes,
        "decisions": list(module.decisions),
    }


def _notes(notes: Sequence[str]) -> list[str]:
    return [f"note: {note}" for note in notes]
