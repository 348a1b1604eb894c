"""The answer of `diff`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.cli.output import Answer
from xpuquant.conversion.cli.tables import TextTable
from xpuquant.conversion.sizes import counted, size

if TYPE_CHECKING:
    from xpuquant.conversion.decoded_diff import ModuleValues
    from xpuquant.conversion.diff import Difference

_MAX_DIFFERENCES = 30


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
    said = [f"{_are(d.same, 'tensor', size(d.same_bytes))} {what}"]
    if len(d.decoded) > len(other):
        said.append(f"{_are(len(d.decoded) - len(other), 'module')} stored otherwise, of equal values")
    if other:
        said.append(f"{_are(len(other), 'module')} of other values")
    said += [f"{_are(len(rows), 'tensor')} not equal"] if rows or not d.decoded else []
    brief = "; ".join(said)
    if d.not_decoded is not None:
        parts.append(f"note: values of modules that are stored otherwise were not compared: {d.not_decoded}")
    parts.append(brief)
    data: dict[str, Any] = {"equal": d.equal, "same_values": d.same_values, **asdict(d)}
    data["types"] = {name: list(types) for name, types in d.types.items()}
    return Answer(parts, data, brief)


def _are(number: int, noun: str, of: str = "") -> str:
    """`1 module is`, `7 tensors (3 kB) are`."""
    return counted(number, noun) + f" ({of})" * bool(of) + (" is" if number == 1 else " are")


def _differing(one: ModuleValues) -> tuple[str, str, str, str, str]:
    if one.problem is not None:
        return one.name, "not compared", "", "", one.problem
    differ = f"{one.differ} of {one.elements}"
    where = "; ".join(filter(None, (one.first, one.beside)))
    return one.name, differ, f"{one.max_abs:.3g}", f"{one.largest:.3g}", where
