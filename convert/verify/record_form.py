"""xpuquant.json as anybody may have left it. A seal keeps accidents out, not people: a field that was dropped or
emptied is said by its name, and never taken for nothing to check.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xpuquant.conversion.options import ROUNDED_TO
from xpuquant.conversion.repo.checksums import is_sealed
from xpuquant.conversion.repo.journal import PROVENANCE
from xpuquant.conversion.sizes import LARGEST_SIZE
from xpuquant.conversion.sources.repo_files import json_limit, read_json
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify.digests import digest_in
from xpuquant.errors import DamagedError
from xpuquant.formats.guard import guarded
from xpuquant.formats.scheme import FORMAT_VERSIONS, expand

Kinds = tuple[type, ...]

_PRODUCER = re.compile(r"xpuquant [0-9][\w.+!-]{0,60}")
_TEXT, _COUNT, _LIST, _TABLE = (str,), (int,), (list,), (dict,)

_RECORD: Mapping[str, Kinds] = {
    "producer": _TEXT,
    "source": _TABLE,
    "options": _TABLE,
    "modules": _TABLE,
    "unquantized": _LIST,
    "tensors_sha256": _TABLE,
    "left_files": _TABLE,
    "shards": _TABLE,
    "files": _TABLE,
}
"""Field of a record → the types that it may have. Every conversion writes every one."""

_SOURCE: Mapping[str, Kinds] = {
    "name": _TEXT,
    "revision": (str, type(None)),
    "bytes": _COUNT,
    "bytes_by_dtype": _TABLE,
    "quantization_config": _TABLE,
    "notes": _LIST,
}
_MODULE: Mapping[str, Kinds] = {"scheme": _TEXT, "from": _TEXT, "source_tensors": _LIST, "decisions": _LIST}
_SHARD: Mapping[str, Kinds] = {"sha256": _TEXT, "bytes": _COUNT}
_ROUNDING: Mapping[str, Kinds] = {"dtype": _TEXT, "scales": _COUNT, "changed": _COUNT, "largest": (float,)}

_OPTIONAL: Mapping[str, Kinds] = {"roles": _LIST, "dequantized": _LIST, "rounding": _TABLE}
"""Of a module: what one has that was verified, dequantized, rounded."""


def read_record(tree: Tree) -> dict[str, Any]:
    """The record of a converted repo.

    Raises:
        DamagedError: it is none that a conversion writes, or was changed since. EnvironmentFault: it cannot be read.
    """
    record = read_json(tree, PROVENANCE)
    try:
        check_form(record)
        if not is_sealed(tree.read(PROVENANCE, json_limit(PROVENANCE))):
            raise DamagedError("is not as it was written: its own sha256 differs")
    except DamagedError as error:
        raise DamagedError(f"{tree.path / PROVENANCE}: {error}; convert again") from None
    return record


def check_form(record: Mapping[str, Any]) -> None:
    """Raises DamagedError for a record of another version, for a field that is missing and for one of another type."""
    version = record.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        known = f"{FORMAT_VERSIONS[0]} to {FORMAT_VERSIONS[-1]}"
        raise DamagedError(f"has format_version {version!r}, this xpuquant reads {known}")
    if not _PRODUCER.fullmatch(str(record.get("producer"))):
        raise DamagedError("names no version of xpuquant as its producer")
    wrong = next(_wrong_fields(record), None)
    if wrong is not None:
        raise DamagedError(wrong)


def _wrong_fields(record: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the fields, outer ones first: the inner ones of a table are looked at once it is one."""
    yield from _fields(record, _RECORD, "")
    yield from _fields(record["source"], _SOURCE, "source.")
    if not record["source"]["name"]:
        yield "has nothing in the field 'source.name'"
    if not record["shards"]:
        yield "lists no shards: a field 'shards' that is empty is written by no conversion"
    if "config.json" not in record["files"]:
        yield "lacks the field 'files.config.json', which every conversion writes"
    for name, entry in record["modules"].items():
        yield from _entry(entry, _MODULE, f"modules.{name}")
        held = {key: kinds for key, kinds in _OPTIONAL.items() if key in entry}
        yield from _fields(entry, held, f"modules.{name}.")
        if "rounding" in held:
            yield from _entry(entry["rounding"], _ROUNDING, f"modules.{name}.rounding")
            yield from _rounding(entry["rounding"], record["options"], f"modules.{name}.rounding")
        if "dequantized" in held and not entry["dequantized"]:
            yield f"names no tensor of a dequantized module: '{name}'"
        if "roles" in held and digest_in(entry)[1] is None:
            yield f"lacks the digest of a module that was verified: '{name}'"
        for key in ("source_tensors", "decisions", "roles", "dequantized"):
            yield from _members(entry.get(key, []), str, f"modules.{name}.{key}")
    for name, entry in record["shards"].items():
        yield from _entry(entry, _SHARD, f"shards.{name}")
    yield from _members(record["unquantized"], str, "unquantized")
    yield from _members(record["source"]["notes"], str, "source.notes")
    for key, kind in (("tensors_sha256", str), ("left_files", str), ("files", str)):
        yield from _members(list(record[key].values()), kind, key)
    counted = record["source"]["bytes_by_dtype"]
    yield from _fields(counted, dict.fromkeys(counted, _COUNT), "source.bytes_by_dtype.")


def _rounding(rounding: Mapping[str, Any], options: Mapping[str, Any], place: str) -> Iterator[str]:
    if rounding["dtype"] not in ROUNDED_TO or rounding["dtype"] != options.get("scale_dtype"):
        yield f"says in the field '{place}.dtype' that scales were rounded otherwise than its options say"
    elif rounding["changed"] > rounding["scales"]:
        yield f"has a number that no conversion writes in the field '{place}.changed'"


def _entry(entry: object, fields: Mapping[str, Kinds], place: str) -> Iterator[str]:
    if isinstance(entry, dict):
        yield from _fields(entry, fields, f"{place}.")
    else:
        yield _other_type(place)


def _fields(table: Mapping[str, Any], fields: Mapping[str, Kinds], place: str) -> Iterator[str]:
    for key, kinds in fields.items():
        if key not in table:
            yield f"lacks the field '{place}{key}', which every conversion writes"
        elif type(table[key]) not in kinds:
            yield _other_type(f"{place}{key}")
        elif type(table[key]) in (int, float) and not 0 <= table[key] <= LARGEST_SIZE:
            yield f"has a number that no conversion writes in the field '{place}{key}'"


def _members(values: Sequence[Any], kind: type, place: str) -> Iterator[str]:
    if not all(type(value) is kind for value in values):
        yield _other_type(place)


def _other_type(place: str) -> str:
    return f"has a field of a type that no conversion writes: '{place}'"


def lacks_digests(record: Mapping[str, Any]) -> bool:
    """Whether a record has no digest of some module or tensor that it names, or names none: the comparison with the
    source takes them.

    Raises:
        DamagedError: it is none that a conversion writes.
    """
    check_form(record)
    with guarded(PROVENANCE):
        plain = {name for pattern in record["unquantized"] for name in expand(pattern)}
        for entry in record["modules"].values():
            plain |= set(entry.get("dequantized", ()))
            if not entry.get("dequantized") and digest_in(entry)[1] is None:
                return True
        return not (record["modules"] or plain) or not plain <= record["tensors_sha256"].keys()
