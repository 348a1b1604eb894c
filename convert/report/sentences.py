"""What was checked, in words. Only what decodes to the source's very values is called exact here."""

from __future__ import annotations

import math
from collections.abc import Iterable

from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Checked, Claim, Rounding, Verdict
from xpuquant.formats.dtypes import numpy_dtype


def in_one_line(verdict: Verdict) -> str:
    """The end of `convert`: what was checked."""
    parts = [exactness(verdict)]
    for (backend, activation), runs in by_kernel(verdict).items():
        kind = backend if backend == REFERENCE else f"{backend} {activation}"
        parts.append(f"{kind} within {max(run.error or 0.0 for run in runs):.0e} of float64")
    if verdict.unchecked:
        missing = "; ".join(verdict.unavailable.values())
        parts.append(
            f"{len(verdict.unchecked)} of {len(verdict.schemes)} modules computed by no real kernel here"
            + (f" ({missing})" if missing else "")
        )
    if verdict.warnings:
        parts.append(f"{len(verdict.warnings)} warnings in verify.md")
    return "; ".join(parts)


def exactness(verdict: Verdict) -> str:
    """What may be said of the matrices, by what it is: `7 matrices decode exactly to the source, 12 with scales rounded
    to float16 (238 of 256 scales changed, largest relative change 3.9e-03)`."""
    sound = [checked for checked in verdict.exact if checked.matrices and checked.error is None]
    wrong = [checked for checked in verdict.exact if checked.error is not None]
    decode, others = [], []
    if count := _matrices(sound, Claim.EXACT):
        decode.append(f"{count} matrices decode exactly to the source")
    rounded = {_rounded(dtype, members): members for dtype, members in by_rounding(sound, Claim.ROUNDED).items()}
    unknown = [checked for checked in sound if checked.claim is Claim.ROUNDED and checked.rounding is None]
    for what, members in (rounded | ({"another dtype": unknown} if unknown else {})).items():
        verb = "" if decode else " matrices decode to the source"
        decode.append(f"{_counted(members)}{verb} with scales rounded to {what}")
    if count := _matrices(sound, Claim.RECORDED):
        decode.append(f"{count} matrices decode to what was recorded at conversion")
    for dtype, members in by_rounding(sound, Claim.RECORDED).items():
        decode.append(f"{_counted(members)} of them with scales rounded to {_rounded(dtype, members)}")
    if count := _matrices(sound, Claim.DEQUANTIZED):
        others.append(f"{count} matrices dequantized to bf16: each value is the exact one rounded once")
    if wrong:
        others.append(f"{len(wrong)} modules or tensors differ")
    return "; ".join([", ".join(decode)] * bool(decode) + others) or "no matrices"


def unquantized(verdict: Verdict) -> str:
    """How many unquantized tensors were compared byte by byte."""
    tensors = [checked for checked in verdict.exact if not checked.matrices]
    same = sum(checked.error is None for checked in tensors)
    return f"{same:,} of {len(tensors):,} unquantized tensors are the same bytes"


def by_rounding(exact: Iterable[Checked], claim: Claim) -> dict[str, list[Checked]]:
    """dtype → the modules of one claim whose scales were rounded to it."""
    found: dict[str, list[Checked]] = {}
    for checked in exact:
        if checked.claim is claim and checked.rounding is not None:
            found.setdefault(checked.rounding.dtype, []).append(checked)
    return found


def total_rounding(dtype: str, members: Iterable[Checked]) -> Rounding:
    """What rounding changed in all of them together."""
    return sum((checked.rounding for checked in members if checked.rounding is not None), Rounding(dtype))


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


def _matrices(exact: Iterable[Checked], claim: Claim) -> str:
    """How many matrices are in modules of the claim; empty where there are none."""
    members = [checked for checked in exact if checked.claim is claim]
    return _counted(members) if members else ""


def _counted(members: Iterable[Checked]) -> str:
    return f"{sum(checked.matrices for checked in members):,}"


def _rounded(dtype: str, members: Iterable[Checked]) -> str:
    total = total_rounding(dtype, members)
    changed = f"{total.changed:,} of {total.scales:,} scales changed, largest relative change {total.largest:.1e}"
    if not total.changed:
        changed = f"none of {total.scales:,} scales changed"
    return f"{numpy_dtype(dtype).name} ({changed})"
