"""Results as answers: what a person reads at the end of a command, and the same as data."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.cli.output import Answer, Typed
from xpuquant.conversion.cli.tables import TextTable
from xpuquant.conversion.report.markdown import checks
from xpuquant.conversion.report.reports import as_data, by_claim
from xpuquant.conversion.report.sentences import by_kernel, decibels, exactness, headline, in_one_line, unquantized
from xpuquant.conversion.results import Converted, ModuleOutcome, PartConverted, Planned
from xpuquant.conversion.sizes import counted, size
from xpuquant.conversion.verify.proof import Proof
from xpuquant.conversion.verify.verdict import Outcome
from xpuquant.formats.scheme import compact
from xpuquant.formats.weights.base import PIECE_BYTES

if TYPE_CHECKING:
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.decoded_diff import ModuleValues
    from xpuquant.conversion.diff import Difference
    from xpuquant.conversion.doctor import Diagnosis
    from xpuquant.conversion.hub.publish import Pushed
    from xpuquant.conversion.inspection import Inspection
    from xpuquant.conversion.verify.verdict import Verdict
    from xpuquant.served_families import Tried

_ON_THE_WAY_BYTES = 16 << 20
"""Per worker: pieces made ahead, blocks before the disk."""

_MAX_FINDINGS = 20
_MAX_SHARDS = 30
_MAX_DIFFERENCES = 30


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
    return Answer([*made.parts, *published.parts], {**made.data, "pushed": published.data}, published.brief)


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
        proof, checked = Proof.none(0, 0), "not again: xpuquant verify checks it"
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
    return Answer([*before, *notes(plan.notes), modules_table(plan.modules), *engines, facts, *serve], data, out)


def _part(result: PartConverted) -> Answer:
    made = f"{len(result.shards)} of {counted(result.of, 'shard')}, {size(result.nbytes)}"
    text = f"part {result.part}: {made}, staged in {result.out}"
    hint = Typed(f"when every part is done: {shlex.join(['xpuquant', 'finish', result.source, str(result.out)])}")
    return Answer([text, hint], {"part": result.part, "shards": {n: f.sha256 for n, f in result.shards.items()}}, text)


def planned(plan: Planned, out: Path, jobs: int, part: str | None = None) -> Answer:
    """`convert --dry-run`, of all or of a part."""
    shards = TextTable(
        "output shards" if part is None else f"output shards of part {part}",
        ("file", "tensors", "size"),
        [(shard.name, str(len(shard.tensors)), size(shard.nbytes)) for shard in plan.shards],
        most=_MAX_SHARDS,
    )
    memory = jobs * (PIECE_BYTES + _ON_THE_WAY_BYTES)
    facts = TextTable(
        "",
        ("", ""),
        (
            ("left as is", left_alone(plan)),
            ("reads", size(plan.read_bytes)),
            ("writes", f"{size(plan.write_bytes)} to {out}"),
            ("buffers", f"about {size(memory)} with {jobs} jobs, whatever the size of the model"),
        ),
    )
    return Answer(
        [*notes(plan.notes), modules_table(plan.modules), *engines_table(plan.engines), shards, facts],
        plan_data(plan) | {"out": str(out)} | ({} if part is None else {"part": part}),
        str(out),
    )


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
    return Answer(parts, as_data(verdict), headline(verdict))


def compared(difference: Difference) -> Answer:
    """The end of `diff`."""
    d = difference
    rows: list[tuple[str, str]] = [(name, f"only in {d.a}") for name in d.only_a]
    rows += [(name, f"only in {d.b}") for name in d.only_b]
    rows += [(name, f"{ours} against {theirs}") for name, (ours, theirs) in d.types.items()]
    for v in d.values:
        gap = "" if v.max_abs is None else f", by {v.max_abs:.3g} at the most"
        rows.append((v.name, f"{v.differ} of {v.elements} values differ, the first at {v.first}{gap}"))
    left = {*d.left} if d.decoded else {name for name, _ in rows}
    rows = [row for row in rows if row[0] in left]
    what = "equal, bytes and all" if d.compared_values else "equal in name, dtype and shape (bytes not compared)"
    parts: list[str | TextTable] = []
    if rows:
        parts.append(TextTable("", ("tensor", "difference"), rows, most=_MAX_DIFFERENCES))
    other = [one for one in d.decoded if not one.same]
    if other:
        columns = ("module", "differ", "by", "largest", "first")
        parts.append(TextTable("", columns, [_differing(one) for one in other], most=_MAX_DIFFERENCES))
        parts.append("by: the largest difference of two values; largest: the largest value in A, to measure it by")
    said = [f"{d.same} tensors ({size(d.same_bytes)}) are {what}"]
    if len(d.decoded) > len(other):
        said.append(f"{len(d.decoded) - len(other)} modules are stored otherwise, of equal values")
    if other:
        said.append(f"{len(other)} differ in value")
    said += [f"{len(rows)} are not"] if rows or not d.decoded else []
    brief = "; ".join(said)
    if d.not_decoded is not None:
        parts.append(f"note: values of modules that are stored otherwise were not compared: {d.not_decoded}")
    parts.append(brief)
    data: dict[str, Any] = {"equal": d.equal, "same_values": d.same_values, **asdict(d)}
    data["types"] = {name: list(types) for name, types in d.types.items()}
    return Answer(parts, data, brief)


def _differing(one: ModuleValues) -> tuple[str, str, str, str, str]:
    if one.problem is not None:
        return one.name, "not compared", "", "", one.problem
    counted = f"{one.differ} of {one.elements}"
    where = "; ".join(filter(None, (one.first, one.beside)))
    return one.name, counted, f"{one.max_abs:.3g}", f"{one.largest:.3g}", where


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


def engines_table(engines: Iterable[Tried]) -> list[TextTable]:
    """What is known of the engines that load the result; nothing where there is nothing to say."""
    rows = [(f"{one.engine} {one.version}", str(one)) for one in engines]
    return [TextTable("tried with a tiny model of this architecture", ("engine", "outcome"), rows)] if rows else []


def engines_data(engines: Iterable[Tried]) -> list[dict[str, str]]:
    """The same as JSON."""
    return [asdict(one) for one in engines]


def left_alone(plan: Planned) -> str:
    """What stays unquantized, and why."""
    if not plan.passed:
        return "nothing"
    total = sum(tensor.nbytes for tensor in plan.passed)
    matrices = [tensor.name for tensor in plan.passed if len(tensor.shape) >= 2]
    shown = ", ".join(compact(name.removesuffix(".weight") for name in matrices)[:8])
    return f"{counted(len(plan.passed), 'tensor')} ({size(total)}), not quantized in the source: norms, {shown}"


def plan_data(plan: Planned) -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "source": source_data(plan),
        "options": plan.options.as_dict(),
        "modules": {module.name: module_data(module) for module in plan.modules},
        "passed_tensors": [tensor.name for tensor in plan.passed],
        "notes": list(plan.notes),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "engines": engines_data(plan.engines),
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


def source_data(of: Planned | Inspection) -> dict[str, Any]:
    """A source as JSON."""
    return {"name": of.source.name, "revision": of.source.revision, "bytes": of.source.nbytes}


def module_data(module: ModuleOutcome) -> dict[str, Any]:
    """What becomes of a module, as JSON."""
    return {
        "source": module.source,
        "scheme": module.scheme,
        "kernel": module.kernel,
        "releases": module.releases,
        "bytes": module.nbytes,
        "decisions": list(module.decisions),
    }


def notes(said: Sequence[str]) -> list[str]:
    """Remarks as lines."""
    return [f"note: {note}" for note in said]
