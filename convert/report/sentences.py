"""What was checked, in words, made of a `Proof` and nothing else. Only what decodes to the source's very values is
called exact here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from xpuquant.conversion.sizes import counted
from xpuquant.conversion.verify.proof import Claim, Proof, Proven, Rounding
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Outcome, Verdict
from xpuquant.formats.dtypes import numpy_dtype


def headline(verdict: Verdict) -> str:
    """The whole verdict in one sentence that begins with it: `verified against the source: ...`."""
    if verdict.outcome is Outcome.FAILED:
        first, *more = verdict.failing
        return f"failed: {first.line()}" + (f" (and {len(more)} more)" if more else "")
    if verdict.outcome is Outcome.NOT_VERIFIED:
        gaps = "; ".join(gap.line() for gap in verdict.gaps)
        return f"not verified: nothing wrong was found, but {gaps}"
    said = f"{verdict.outcome} against {verdict.basis or 'nothing'}: {in_one_line(verdict)}"
    return said + _OF_RECORDS * bool(verdict.proof.matrices(Claim.RECORDED) or Claim.RECORDED in verdict.proof.tensors)


_OF_RECORDS = (
    "; who can write its files can write those digests too: only a comparison with the source shows where it is from"
)


def in_one_line(verdict: Verdict) -> str:
    """The end of `convert`: what was checked."""
    parts = [exactness(verdict.proof)]
    for (backend, activation), runs in by_kernel(verdict).items():
        kind = backend if backend == REFERENCE else f"{backend} {activation}"
        modules = len({run.module for run in runs})
        of = f" in {modules} of {counted(len(verdict.schemes), 'module')}" * (modules < len(verdict.schemes))
        parts.append(f"{kind} within {max(run.error or 0.0 for run in runs):.0e} of float64{of}")
    if verdict.unchecked:
        missing = "; ".join(verdict.unavailable.values())
        left = f"{len(verdict.unchecked)} of {counted(len(verdict.schemes), 'module')}"
        said = f"{left} computed by no real kernel where this was checked"
        parts.append(said + (f" ({missing})" if missing else ""))
    if verdict.warnings:
        parts.append(f"{counted(len(verdict.warnings), 'warning')} in verify.md")
    return "; ".join(parts)


def exactness(proof: Proof) -> str:
    """What may be said of the matrices, by what it is: `7 matrices decode exactly to the source, 12 with scales rounded
    to float16 (238 of 256 scales changed, largest relative change 3.9e-03)`."""
    said = [*_decoded(proof), *_recorded(proof)]
    for part in _of(proof, Claim.DEQUANTIZED):
        changed = "" if part.rounding is None else f" ({_changes(part.rounding, 'value')})"
        said.append(f"{_matrices(part)} dequantized to bf16: each value is the exact one rounded once{changed}")
    said += [f"{_matrices(part)} compared with nothing" for part in _of(proof, Claim.NOT_CHECKED)]
    if proof.wrong:
        said.append(counted(proof.wrong, "module or tensor differs", "modules or tensors differ"))
    return "; ".join(said) or "no matrices"


def _decoded(proof: Proof) -> Iterator[str]:
    """What was compared with the source and decodes to it."""
    said = [f"{_decode(part.matrices)} exactly to the source" for part in _of(proof, Claim.EXACT)]
    for part in _of(proof, Claim.ROUNDED):
        what = f"{part.matrices:,}" if said else f"{_decode(part.matrices)} to the source"
        said.append(f"{what} with scales rounded to {_rounded(part)}")
    if said:
        yield ", ".join(said)


def _recorded(proof: Proof) -> Iterator[str]:
    """What was compared with a record, and what that says of the conversion."""
    if not (count := proof.matrices(Claim.RECORDED)):
        return
    said = [f"{_decode(count)} to what was recorded at conversion"]
    for part in _of(proof, Claim.RECORDED):
        if part.recorded is Claim.ROUNDED:
            said.append(f"{part.matrices:,} of them with scales rounded to {_rounded(part)}")
        elif part.recorded is Claim.DEQUANTIZED:
            said.append(f"{part.matrices:,} of them dequantized to bf16")
    yield ", ".join(said)


def unquantized(proof: Proof) -> str:
    """How many unquantized tensors were compared byte by byte, and with what."""
    words = {
        Claim.EXACT: "the same bytes",
        Claim.RECORDED: "the bytes recorded at conversion",
        Claim.NOT_CHECKED: "compared with nothing",
    }
    total = sum(proof.tensors.values())
    said = [f"{proof.tensors[claim]:,} of {total:,} {what}" for claim, what in words.items() if claim in proof.tensors]
    return f"unquantized tensors: {', '.join(said) or 'none'}"


def by_kernel(verdict: Verdict) -> dict[tuple[str, str], list[Agreement]]:
    """(backend, dtype of the activations) → its runs."""
    found: dict[tuple[str, str], list[Agreement]] = {}
    for run in verdict.kernels:
        if run.ran:
            found.setdefault((run.backend, run.activation), []).append(run)
    return found


def decibels(run: Agreement) -> str:
    """`131 dB`, or `exact`."""
    if run.sqnr_db is None:
        return "not a number"
    return "exact" if math.isinf(run.sqnr_db) and run.error == 0 else f"{run.sqnr_db:.0f} dB"


def _decode(matrices: int) -> str:
    return counted(matrices, "matrix decodes", "matrices decode")


def _matrices(part: Proven) -> str:
    return counted(part.matrices, "matrix", "matrices")


def _of(proof: Proof, claim: Claim) -> Sequence[Proven]:
    return [part for part in proof.parts if part.claim is claim]


def _rounded(part: Proven) -> str:
    if part.rounding is None:
        return "another dtype"
    return f"{numpy_dtype(part.rounding.dtype).name} ({_changes(part.rounding, 'scale')})"


def _changes(total: Rounding, what: str) -> str:
    numbers = counted(total.numbers, what)
    if not total.changed:
        return f"none of {numbers} changed"
    return f"{total.changed:,} of {numbers} changed, largest relative change {total.largest:.1e}"
