"""verify.md: a verdict as tables that paste well into an issue, a pull request or a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xpuquant.conversion.report.markup import Markdown, joined, listed, markdown, table
from xpuquant.conversion.report.sentences import exactness, headline, unquantized
from xpuquant.conversion.sizes import counted
from xpuquant.conversion.verify.proof import Claim
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Outcome, Verdict

_WORST = 10
_SHOWN = 20


def render_markdown(verdict: Verdict) -> Markdown:
    """The whole report."""
    title = markdown("# {repo}: {outcome}", repo=verdict.repo, outcome=_TITLES[verdict.outcome])
    sections = [
        title,
        markdown("{sentence}.", sentence=headline(verdict)),
        markdown("Written by {producer}.", producer=verdict.producer or "unknown"),
        table(("Check", "Result", "What"), checks(verdict), limit=1000),
    ]
    for heading, found in (
        (markdown("## Failures"), verdict.failing),
        (markdown("## Not checked"), verdict.gaps),
        (markdown("## Warnings"), verdict.warnings),
    ):
        if found:
            sections += [heading, _list(finding.line() for finding in found)]
    ran = [run for run in verdict.kernels if run.ran]
    if ran:
        worst = sorted(ran, key=lambda run: run.deviation / (run.tolerance or 1.0), reverse=True)
        real = [run for run in worst if run.backend != REFERENCE] or worst
        sections += [
            markdown("## Kernels: the {n} largest deviations, by their tolerance", n=min(_WORST, len(real))),
            _runs(real[:_WORST]),
        ]
        sections += [markdown("## Kernels: each scheme and shape at every M"), _runs(_representatives(ran))]
    refused = {(run.backend, run.reason) for run in verdict.kernels if not run.ran and run.reason}
    not_run = [*verdict.unavailable.items(), *sorted(refused)]
    if not_run:
        sections += [markdown("## Not run"), table(("Backend", "Reason"), [(name, str(why)) for name, why in not_run])]
    if verdict.unchecked:
        title = markdown(
            "## Modules that no real kernel computed where this was checked: {left} of {all}",
            left=len(verdict.unchecked),
            all=len(verdict.schemes),
        )
        sections += [title, _list(verdict.unchecked)]
    return joined("\n\n", [*sections, markdown("")])


def checks(verdict: Verdict) -> list[tuple[str, str, str]]:
    """(check, result, what was looked at), one line for each kind of check. Only what ran can pass."""
    rows: list[tuple[str, str, str]] = []
    for kind, what in (
        ("integrity", _integrity(verdict)),
        ("exactness", _exactness(verdict)),
        ("kernels", _kernels(verdict)),
        ("sanity", _sanity(verdict)),
    ):
        failing = sum(finding.check == kind for finding in verdict.failing)
        gaps = [gap for gap in verdict.gaps if gap.check == kind]
        warned = sum(finding.check == kind for finding in verdict.warnings)
        result = f"FAIL ({failing})" if failing else "not run" if what is None else "not all" if gaps else "pass"
        if warned:
            result += f", {counted(warned, 'warning')}"
        is_said = not verdict.failing or (kind == "kernels" and any(run.ran for run in verdict.kernels))
        looked = what or (_NOT_RUN.get(kind, "") if is_said else "see below")
        rows.append((kind, result, looked))
    return rows


def _integrity(verdict: Verdict) -> str | None:
    if verdict.files:
        return f"sha256 of {counted(verdict.files, 'file')}; headers, index and config.json against each other"
    if verdict.shards:
        return (
            f"headers and sizes of {counted(verdict.shards, 'shard')}, read again; the sha256 of each was taken from "
            "its bytes as they were written"
        )
    return None


def _exactness(verdict: Verdict) -> str | None:
    proof = verdict.proof
    unchecked = {part.claim for part in proof.parts} | set(proof.tensors) <= {Claim.NOT_CHECKED}
    if unchecked and not proof.wrong:
        return None
    modules = sum(1 for checked in verdict.exact if checked.matrices)
    return (
        f"{counted(modules, 'module')}: {exactness(proof)}; {unquantized(proof)}; against {verdict.basis or 'nothing'}"
    )


def _kernels(verdict: Verdict) -> str | None:
    """None where no real kernel ran: the float64 reference shows that the layout is read as it was written, no more."""
    ran = [run for run in verdict.kernels if run.ran]
    real = dict.fromkeys(run.backend for run in ran if run.backend != REFERENCE)
    if not real and all(run.passed for run in ran):
        return None
    computed = len(verdict.schemes) - len(verdict.unchecked)
    noticed = ", each noticed" if all(run.passed for run in ran) else ""
    tried = sum(run.wrong_layout is not None for run in ran)
    by = ", ".join(real) or "the float64 reference alone"
    modules = counted(len(verdict.schemes), "module")
    return f"{computed} of {modules} by {by}; {counted(tried, 'wrong layout')} tried{noticed}"


def _sanity(verdict: Verdict) -> str | None:
    if not verdict.sanity:
        return None
    scales = sum(h.groups for h in verdict.sanity.values())
    return f"{counted(scales, 'scale')} of {counted(len(verdict.sanity), 'module')}"


_TITLES = {
    Outcome.VERIFIED: markdown("verified"),
    Outcome.FAILED: markdown("**FAILED**"),
    Outcome.NOT_VERIFIED: markdown("**not verified**"),
}
_NOT_RUN = {
    "exactness": "there is no recorded digest, as after a conversion without verification; verify against the source",
    "kernels": "no kernel library computed a module in this run; the float64 reference alone read the layout",
}


def _representatives(ran: Sequence[Agreement]) -> list[Agreement]:
    return [run for run in ran if len(run.M) > 1]


def _runs(runs: Sequence[Agreement]) -> Markdown:
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
    return table(columns, [_row(run) for run in runs], "llrrllrrrrrl")


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


def _list(lines: Iterable[str]) -> Markdown:
    every = list(lines)
    more = [markdown("and {n} more, in verify.json", n=len(every) - _SHOWN)] * (len(every) > _SHOWN)
    return listed([*every[:_SHOWN], *more])
