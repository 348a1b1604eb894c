"""The four files made of a verdict.

verify.json has everything; verify.md pastes into an issue or a pull request; verify.html is one page to look through,
with nothing loaded from elsewhere; verify.svg is its heat map, for a model card. verify.json is sealed with its own
sha256 and holds those of the others, so that `verify` notices a changed report too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from xpuquant.conversion.repo.checksums import UNSEALED, seal
from xpuquant.conversion.repo.journal import PRODUCER
from xpuquant.conversion.report.markdown import render_markdown
from xpuquant.conversion.report.page import render_page
from xpuquant.conversion.report.sentences import exactness, headline
from xpuquant.conversion.report.svg import picture
from xpuquant.conversion.sources.repo_files import read_json
from xpuquant.conversion.tree import Tree, Written
from xpuquant.conversion.verify.agreement import BINS, ROWS
from xpuquant.conversion.verify.contents import differences
from xpuquant.conversion.verify.expected import SEED
from xpuquant.conversion.verify.integrity import VERDICT
from xpuquant.conversion.verify.proof import Claim, Proof
from xpuquant.conversion.verify.verdict import Agreement, Finding, Outcome, Verdict
from xpuquant.errors import one_line, shown
from xpuquant.formats.dtypes import numpy_dtype


def write_reports(tree: Tree, verdict: Verdict) -> dict[str, Written]:
    """Write the four files; returns them by name.

    Raises:
        OSError: the folder cannot be written.
    """
    texts = {
        "verify.md": render_markdown(verdict),
        "verify.html": render_page(verdict),
        "verify.svg": picture(verdict),
    }
    contents = {name: text.encode() for name, text in texts.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    data = {"sha256": UNSEALED, **as_data(verdict), "reports": hashes}
    contents[VERDICT] = seal((json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    return {name: tree.write(name, content) for name, content in contents.items()}


def as_data(verdict: Verdict) -> dict[str, Any]:
    """The content of verify.json."""
    modules = [checked for checked in verdict.exact if checked.matrices]
    return {
        "verdict": str(verdict.outcome),
        "passed": verdict.passed,
        "sentence": headline(verdict),
        "repo": verdict.repo,
        "producer": verdict.producer,
        "model": verdict.model,
        "source": verdict.source,
        "setting": None if verdict.setting is None else asdict(verdict.setting),
        "failures": verdict.failures,
        "not_checked": [gap.line() for gap in verdict.gaps],
        "warnings": [finding.line() for finding in verdict.warnings],
        "integrity": {"files": verdict.files, "shards_read_again": verdict.shards},
        "exact": {
            "against": verdict.basis or None,
            "modules": len(modules),
            "matrices": sum(checked.matrices for checked in modules),
            "unquantized_tensors": len(verdict.exact) - len(modules),
            "matrices_by_claim": by_claim(verdict.proof),
            "unquantized_by_claim": {str(claim): count for claim, count in verdict.proof.tensors.items()},
            "failures": {one.name: one.error for one in verdict.exact if one.error is not None},
        },
        "kernels": {
            "backends": sorted({run.backend for run in verdict.kernels if run.ran}),
            "not_available": dict(verdict.unavailable),
            "modules_no_real_kernel_computed": verdict.unchecked,
            "seed": SEED,
            "M": list(ROWS),
            "histogram_upper_edges": list(BINS),
            "runs": [_run(run) for run in verdict.kernels],
        },
        "sanity": {name: _plain(asdict(sanity)) for name, sanity in verdict.sanity.items()},
        "bytes": {"before": dict(verdict.before), "after": dict(verdict.after)},
    }


def check_report(tree: Tree, verdict: Verdict) -> list[Finding]:
    """Where a repo's own verify.json says something else of the weights than a comparison with the source has shown.

    Args:
        verdict: of that comparison; nothing is compared where it failed.

    Raises:
        EnvironmentFault: unreadable files.
    """
    if verdict.outcome is Outcome.FAILED or not tree.holds(VERDICT):
        return []
    said = read_json(tree, VERDICT)
    if said.get("producer") != verdict.producer:
        return [_untrue(f"its producer is {shown(said.get('producer'))}, that of xpuquant.json {verdict.producer}")]
    if verdict.producer != PRODUCER:
        if said.get("passed") is not True:
            return [_untrue("it does not say that the conversion was verified")]
        what = f"is of {verdict.producer}: what it says of the weights is not compared with what was found"
        return [Finding("integrity", VERDICT, one_line(what), fails=False)]
    now = as_data(verdict)
    exact = {key: now["exact"][key] for key in _OF_WEIGHTS}
    held = said.get("exact")
    wanted = {"verdict": str(Outcome.VERIFIED), "passed": True, "failures": [], "exact": exact}
    found = list(
        differences(
            json.loads(json.dumps(wanted)),
            {
                **{key: said[key] for key in wanted if key in said},
                "exact": {key: held[key] for key in exact if key in held} if isinstance(held, dict) else held,
            },
        )
    )
    if exactness(verdict.proof) not in str(said.get("sentence")):
        found.append("sentence says something else of the matrices than was found")
    return [_untrue(what) for what in found]


_OF_WEIGHTS = ("modules", "matrices", "unquantized_tensors", "matrices_by_claim", "unquantized_by_claim", "failures")
"""Fields of verify.json's `exact` that follow from the source."""


def _untrue(what: str) -> Finding:
    return Finding("integrity", VERDICT, one_line(what))


def by_claim(proof: Proof) -> dict[str, Any]:
    """Matrices without a difference, by what may be said of them, and what rounding changed in them."""
    found: dict[str, Any] = {str(claim): count for claim in Claim if (count := proof.matrices(claim))}
    for part in proof.parts:
        if part.rounding is None:
            continue
        is_scales = Claim.DEQUANTIZED not in (part.claim, part.recorded)
        table = found.setdefault("scales_rounded_to" if is_scales else "values_rounded_to", {})
        table[numpy_dtype(part.rounding.dtype).name] = _plain(
            {
                "matrices": part.matrices,
                "scales" if is_scales else "values": part.rounding.numbers,
                "scales_changed" if is_scales else "values_changed": part.rounding.changed,
                "largest_relative_change": part.rounding.largest,
            }
        )
    return found


def _run(run: Agreement) -> dict[str, Any]:
    what = {
        "backend": run.backend,
        "module": run.module,
        "matrix": run.role,
        "expert": run.expert,
        "scheme": run.scheme,
        "N": run.N,
        "K": run.K,
    }
    if not run.ran:
        return {**what, "not_run": run.reason}
    figures = {
        "rows": run.rows,
        "M": list(run.M),
        "activations": run.activation,
        "relative_error": run.error,
        "deviation": run.deviation,
        "tolerance": run.tolerance,
        "of_tolerance": run.used,
        "sqnr_db": run.sqnr_db,
        "max_abs": run.max_abs,
        "cosine": run.cosine,
        "wrong_layout_error": run.wrong_layout,
        "histogram": list(run.histogram),
        "passed": run.passed,
    }
    return {**what, **_plain(figures)}


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Floats to five digits; infinities and NaN, which JSON lacks, as text."""
    return {
        name: (float(f"{value:.5g}") if math.isfinite(value) else str(value)) if isinstance(value, float) else value
        for name, value in figures.items()
    }
