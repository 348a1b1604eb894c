"""A verdict as data and as sentences, and the four files made of it.

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
from pathlib import Path
from typing import Any

from xpuquant.conversion.repo.checksums import UNSEALED, seal
from xpuquant.conversion.report.heatmap import heat_map
from xpuquant.conversion.report.markdown import markdown
from xpuquant.conversion.report.page import page
from xpuquant.conversion.verify.agreement import BINS, ROWS
from xpuquant.conversion.verify.expected import SEED
from xpuquant.conversion.verify.integrity import VERDICT
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Verdict


def write_reports(folder: Path, verdict: Verdict) -> list[str]:
    """Write the four files; returns their names.

    Raises:
        OSError: the folder cannot be written.
    """
    texts = {"verify.md": markdown(verdict), "verify.html": page(verdict), "verify.svg": heat_map(verdict)}
    contents = {name: text.encode() for name, text in texts.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    data = {"sha256": UNSEALED, **as_data(verdict), "reports": hashes}
    contents[VERDICT] = seal((json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return list(contents)


def as_data(verdict: Verdict) -> dict[str, Any]:
    """The content of verify.json."""
    modules = [checked for checked in verdict.exact if checked.matrices]
    return {
        "passed": verdict.passed,
        "repo": verdict.repo,
        "producer": verdict.producer,
        "failures": verdict.failures,
        "warnings": [finding.line() for finding in verdict.warnings],
        "integrity": {"files": verdict.files},
        "exact": {
            "against": verdict.basis or None,
            "modules": len(modules),
            "matrices": sum(checked.matrices for checked in modules),
            "unquantized_tensors": len(verdict.exact) - len(modules),
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
        "sanity": {name: _plain(asdict(health)) for name, health in verdict.health.items()},
        "bytes": {"before": dict(verdict.before), "after": dict(verdict.after)},
    }


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


def sentences(verdict: Verdict) -> list[str]:
    """What was checked, for a card: a sentence each."""
    modules = [checked for checked in verdict.exact if checked.matrices]
    tensors = len(verdict.exact) - len(modules)
    said: list[str] = []
    if verdict.exact:
        matrices = sum(checked.matrices for checked in modules)
        wrong = sum(1 for checked in verdict.exact if checked.error is not None)
        equal = "decode to exactly the source's integers and scales" if not wrong else f"{wrong} differ"
        said.append(
            f"Exactness: {matrices} matrices in {len(modules)} modules {equal}; {tensors} unquantized tensors "
            f"are the same bytes. Checked against {verdict.basis}."
        )
    said += [_kernel_sentence(runs) for runs in by_kernel(verdict).values()]
    if verdict.schemes and verdict.unchecked:
        said.append(f"{len(verdict.unchecked)} of {len(verdict.schemes)} modules were computed by no real kernel here.")
    said += [f"Warning: {finding.where}: {finding.what}." for finding in verdict.warnings[:5]]
    return said


def by_kernel(verdict: Verdict) -> dict[tuple[str, str], list[Agreement]]:
    """(backend, dtype of the activations) → its runs."""
    found: dict[tuple[str, str], list[Agreement]] = {}
    for run in verdict.kernels:
        if run.ran:
            found.setdefault((run.backend, run.activation), []).append(run)
    return found


def _kernel_sentence(runs: list[Agreement]) -> str:
    first, worst = runs[0], max(runs, key=lambda run: run.error or 0.0)
    shapes = len({(run.scheme, run.N, run.K) for run in runs})
    is_reference = first.backend == REFERENCE
    kind = "float64 reference over the stored bytes" if is_reference else f"kernel {first.backend}"
    return (
        f"Kernels: {kind}, {first.activation} activations, on {len({run.module for run in runs})} modules ({shapes} "
        f"distinct shapes): relative error at most {worst.error:.1e} ({decibels(worst)}) against float64 on the source."
    )


def decibels(run: Agreement) -> str:
    """`131 dB`, or `exact`."""
    if run.sqnr_db is None:
        return "not a number"
    return "exact" if math.isinf(run.sqnr_db) and run.error == 0 else f"{run.sqnr_db:.0f} dB"


def in_one_line(verdict: Verdict) -> str:
    """The end of `convert`: what was checked."""
    matrices = sum(checked.matrices for checked in verdict.exact)
    parts = [f"{matrices} matrices decode exactly to the source"]
    for (backend, activation), runs in by_kernel(verdict).items():
        kind = backend if backend == REFERENCE else f"{backend} {activation}"
        parts.append(f"{kind} within {max(run.error or 0.0 for run in runs):.0e} of float64")
    if verdict.unchecked:
        parts.append(f"{len(verdict.unchecked)} of {len(verdict.schemes)} modules computed by no real kernel here")
    if verdict.warnings:
        parts.append(f"{len(verdict.warnings)} warnings in verify.md")
    return "; ".join(parts)
