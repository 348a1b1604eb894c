"""verify.md: a verdict as tables that paste well into an issue, a pull request or a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xpuquant.conversion.report.sentences import exactness, headline, unquantized
from xpuquant.conversion.verify.proof import Claim
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Outcome, Verdict
from xpuquant.errors import one_line

_WORST = 10
_SHOWN = 20


def render_markdown(verdict: Verdict) -> str:
    """The whole report."""
    sections = [
        f"# {_cell(verdict.repo)}: {_TITLES[verdict.outcome]}",
        f"{_cell(headline(verdict), 4000)}.",
        f"Written by {_cell(verdict.producer or 'unknown')}.",
        _table(("Check", "Result", "What"), checks(verdict)),
    ]
    if verdict.failures:
        sections += ["## Failures", _list(verdict.failures)]
    if verdict.gaps:
        sections += ["## Not checked", _list(gap.line() for gap in verdict.gaps)]
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
            result += f", {warned} warning{'s' * (warned > 1)}"
        looked = what or (_NOT_RUN.get(kind, "") if not verdict.failing else "see below")
        rows.append((kind, result, looked))
    return rows


def _integrity(verdict: Verdict) -> str | None:
    if verdict.files:
        return f"sha256 of {verdict.files} files; headers, index and config.json against each other"
    if verdict.shards:
        return (
            f"headers and sizes of {verdict.shards} shards, read again; the sha256 of each was taken from its bytes as "
            "they were written"
        )
    return None


def _exactness(verdict: Verdict) -> str | None:
    proof = verdict.proof
    unchecked = {part.claim for part in proof.parts} | set(proof.tensors) <= {Claim.NOT_CHECKED}
    if unchecked and not proof.wrong:
        return None
    modules = sum(1 for checked in verdict.exact if checked.matrices)
    return f"{modules:,} modules: {exactness(proof)}; {unquantized(proof)}; against {verdict.basis or 'nothing'}"


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
    return f"{computed} of {len(verdict.schemes)} modules by {by}; {tried} wrong layouts tried{noticed}"


def _sanity(verdict: Verdict) -> str | None:
    if not verdict.health:
        return None
    return f"{sum(h.groups for h in verdict.health.values()):,} scales of {len(verdict.health)} modules"


_TITLES = {Outcome.VERIFIED: "verified", Outcome.FAILED: "**FAILED**", Outcome.NOT_VERIFIED: "**not verified**"}
_NOT_RUN = {
    "exactness": "there is no recorded digest, as after a conversion without verification; verify against the source",
    "kernels": "no kernel library computes these modules here; the float64 reference alone reads the layout",
}


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


def _cell(text: str, limit: int = 400) -> str:
    # Names come from strangers' files: `|`, `<` and backticks would break out of their cell.
    return one_line(text, limit).replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
