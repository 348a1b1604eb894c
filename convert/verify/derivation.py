"""What of a record, xpuquant.json, follows from the source and the options: made at conversion, and made again by
`verify --source`, so that no field of it can be dropped, emptied or reworded by who can seal a file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.plan.survey import PlannedModule, kind_of
from xpuquant.conversion.repo.journal import PROVENANCE
from xpuquant.conversion.sources.base import Source, bytes_by_dtype
from xpuquant.conversion.verify.contents import MOST_DIFFERENCES, differences
from xpuquant.conversion.verify.context import Check, Origin
from xpuquant.conversion.verify.digests import KIND, digest_in
from xpuquant.conversion.verify.integrity import VERDICT
from xpuquant.conversion.verify.proof import Checked
from xpuquant.conversion.verify.recorded import check_recorded
from xpuquant.conversion.verify.verdict import Finding
from xpuquant.conversion.walk import is_hidden
from xpuquant.errors import one_line
from xpuquant.formats.scheme import compact


def derived(plan: Plan, source: Source, exact: Sequence[Checked]) -> dict[str, Any]:
    """What of a record follows from the source and the options alone: `verify --source` makes it again.

    Args:
        exact: as `provenance_record`.
    """
    checks = {checked.name: checked for checked in exact if checked.digest}
    modules = {planned.conversion.name: planned for planned in plan.modules}
    return {
        "format_version": plan.format_version,
        "source": {
            "name": source.name.rstrip("/").rpartition("/")[2] if source.revision is None else source.name,
            "revision": source.revision,
            "bytes": source.nbytes,
            "bytes_by_dtype": bytes_by_dtype(source.checkpoint.tensors.values()),
            "quantization_config": dict(source.checkpoint.quantization),
            "notes": list(plan.notes),
        },
        "options": plan.options.as_dict(),
        "modules": {name: _module(planned, checks.get(name)) for name, planned in modules.items()},
        "unquantized": compact([*(tensor.name for tensor in plan.passed), *plan.split_biases]),
        "tensors_sha256": {name: one.digest for name, one in sorted(checks.items()) if name not in modules},
        "left_files": dict(source.left_files),
    }


def _module(planned: PlannedModule, checked: Checked | None) -> dict[str, Any]:
    """What is recorded of a module. `checked` is None where it was not verified."""
    scheme = planned.conversion.scheme
    names = [tensor.name for _, _, weight in planned.weights for tensor in weight.tensors]
    entry: dict[str, Any] = {
        "scheme": "bf16 (dequantized)" if scheme is None else scheme.label(),
        "from": kind_of(planned.source),
        "source_tensors": compact(dict.fromkeys(names)),
        "decisions": list(planned.conversion.facts),
    }
    if scheme is None:
        entry["dequantized"] = [tensor.name for tensor in planned.conversion.tensors]
    elif checked is not None:
        entry["roles"] = list(dict.fromkeys(role for role, _, _ in planned.weights))
        entry[KIND] = checked.digest
        if checked.rounding is not None:
            rounding = checked.rounding
            entry["rounding"] = {
                "dtype": rounding.dtype,
                "scales": rounding.numbers,
                "changed": rounding.changed,
                "largest": rounding.largest,
            }
    return entry


_OF_COMPARISON = (KIND, "roles", "rounding")
"""Fields of a module that the comparison with the source gives."""

_WORDS = ("from", "decisions")
"""Fields of a module that are sentences: another version may have other ones."""


def check_derived(
    origin: Origin, record: Mapping[str, Any], exact: Sequence[Checked], check: Check, producer: str
) -> list[Finding]:
    """Compare a record with what the conversion would record of this source. What differs, or is missing, fails by its
    name; the sentences of another version are only a warning.

    Args:
        record: xpuquant.json, of the right form: `record_form.check_form`.
        exact: what the comparison of the weights with the source has just found; what is wrong is not said again.
        producer: this program, as records name it.
    """
    is_verified = not has_no_digest(record)
    wanted = derived(origin.plan, origin.source, exact if is_verified else ())
    held = {key: copy.deepcopy(record[key]) for key in wanted}
    found = [] if is_verified else [_odd("holds no digest of any weight: without the source nothing can be verified")]
    if not is_verified and check.repo.tree.holds(VERDICT):
        found.append(
            Finding(
                "integrity",
                VERDICT,
                "reports a verification, and xpuquant.json has no digest: tensors_sha256 is empty, modules have none",
            )
        )
    found += _origin(wanted["source"], held["source"])
    for one in exact:
        if one.error is not None:
            held["tensors_sha256"].pop(one.name, None)
            for entries in (wanted["modules"], held["modules"]):
                _take(entries.get(one.name, {}), _OF_COMPARISON)
    earlier = [name for name, entry in held["modules"].items() if digest_in(entry)[0] != KIND]
    if earlier:
        found += [_wrong(f"modules.{one.name}: {one.error}") for one in check_recorded(record, check)[0] if one.error]
        for name in earlier:
            for entries in (wanted["modules"], held["modules"]):
                _take(entries.get(name, {}), (*_OF_COMPARISON, "decoded_xxh3", "decoded_sha256"))
    ours, theirs = _take_words(wanted), _take_words(held)
    for name in [name for name in theirs["left_files"] if name not in ours["left_files"]]:
        found.append(_odd(f"left_files.{name} was left out of the conversion; the source has no such file now"))
        del theirs["left_files"][name]
    for name in [name for name in ours["left_files"] if name not in theirs["left_files"] and is_hidden(name)]:
        found.append(_odd(f"left_files.{name} is in the source now, and was not; no conversion takes it"))
        del ours["left_files"][name]
    of_us = record["producer"] == producer
    found += [(_wrong if of_us else _odd)(what) for what in _some(differences(_plain(ours), theirs))]
    return [*found, *map(_wrong, _some(differences(_plain(wanted), held)))]


def has_no_digest(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of a conversion without verification: no digest in it at all."""
    return not record["tensors_sha256"] and all(digest_in(entry)[1] is None for entry in record["modules"].values())


def _origin(wanted: dict[str, Any], held: dict[str, Any]) -> Iterator[Finding]:
    """Where it says that it is from is no property of the weights: the same may lie in a folder and in two repos."""
    ours, theirs = _take(wanted, ("name", "revision")), _take(held, ("name", "revision"))
    if theirs["revision"] is not None and ours["revision"] is not None and ours != theirs:
        said, here = (f"{one['name']} at {one['revision']}" for one in (theirs, ours))
        yield _odd(f"source.name: it was converted from {said} and is compared with {here}")


def _take(table: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Take keys out of a table, those that are there."""
    return {key: table.pop(key) for key in keys if key in table}


def _take_words(record: dict[str, Any]) -> dict[str, Any]:
    """Take the sentences out of a record."""
    return {
        "source": _take(record["source"], ("notes",)),
        "modules": {name: _take(entry, _WORDS) for name, entry in record["modules"].items()},
        "left_files": record.pop("left_files"),
    }


def _plain(table: Mapping[str, Any]) -> Any:
    """As it is read again from a file."""
    return json.loads(json.dumps(table))


def _some(found: Iterable[str]) -> Iterator[str]:
    for number, what in enumerate(found):
        if number == MOST_DIFFERENCES:
            yield "differs in more places"
            return
        yield what


def _wrong(what: str) -> Finding:
    return Finding("integrity", PROVENANCE, one_line(what))


def _odd(what: str) -> Finding:
    return Finding("integrity", PROVENANCE, one_line(what), fails=False)
