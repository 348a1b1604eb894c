"""Knowing a conversion that was finished before, here or on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xpuquant.conversion.options import Options
from xpuquant.conversion.repo.checksums import hash_file, limit_of, wrong_size
from xpuquant.conversion.repo.journal import PROVENANCE, STAGING, Finished
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.repo_files import read_json
from xpuquant.conversion.tree import Tree

_BESIDE = ("README.md", "verify.json", "verify.md", "verify.html", "verify.svg")
"""What a conversion writes and its record has no sha256 of."""


def is_finished(out: Path) -> bool:
    """Whether a folder holds a finished conversion, or what is left of one: nothing is staged there any more."""
    tree = Tree(out)
    return out.is_dir() and not tree.holds_anything(STAGING) and tree.holds(PROVENANCE)


def converted_shards(out: Path, source: Source, options: Options) -> dict[str, Finished] | None:
    """The shards of a folder that is the finished conversion of a source with these options; None of any other."""
    if not is_finished(out):
        return None
    tree = Tree(out)
    record = read_json(tree, PROVENANCE)
    if not is_conversion(record, source, options):
        return None
    shards = recorded_shards(record)
    whole = all(tree.holds(name) and tree.size(name) == finished.nbytes for name, finished in shards.items())
    return shards if whole else None


def changed_file(out: Path, weights: bool = True) -> str | None:
    """The first file of a finished conversion that is not what its record says was written, in words; None where all
    are. Of the card and the reports, which may be edited and removed, whether they are files.

    Args:
        weights: read the shards too, and not only their sizes.

    Raises:
        DamagedError: the record is none that a conversion writes. EnvironmentFault: a file cannot be read.
    """
    from xpuquant.conversion.verify.record_form import read_record

    tree, record = Tree(out), read_record(Tree(out))
    sizes = {name: entry["bytes"] for name, entry in record["shards"].items()}
    written = {**record["files"], **{name: entry["sha256"] for name, entry in record["shards"].items()}}
    for name in _BESIDE:
        if (odd := tree.why_no_file(name)) is not None:
            return f"{out / name} {odd}"
    for name, sha256 in written.items():
        if not tree.holds_anything(name):
            return f"{out / name} is missing, and the conversion wrote it"
        if (odd := tree.why_no_file(name)) is not None:
            return f"{out / name} {odd}"
        nbytes = sizes.get(name)
        is_read = weights or name in record["files"]
        is_changed = wrong_size(tree, name, nbytes) is not None
        if is_changed or (is_read and hash_file(tree, name, limit_of(nbytes)) != sha256):
            return f"{out / name} is not what the conversion wrote"
    return None


def is_conversion(record: Mapping[str, Any], source: Source, options: Options) -> bool:
    """Whether a provenance file is of a conversion of this source with these options."""
    said = record.get("source")
    if not isinstance(said, dict):
        return False
    name = source.name if source.revision else source.name.rstrip("/").rpartition("/")[2]
    is_source = (said.get("name"), said.get("revision"), said.get("bytes")) == (name, source.revision, source.nbytes)
    return is_source and record.get("options") == options.as_dict()


def recorded_shards(record: Mapping[str, Any]) -> dict[str, Finished]:
    """The shards that a provenance file names."""
    shards = record.get("shards")
    entries = shards.items() if isinstance(shards, dict) else ()
    return {
        name: Finished(str(entry.get("sha256")), entry["bytes"])
        for name, entry in entries
        if isinstance(entry, dict) and type(entry.get("bytes")) is int
    }


def recorded_options(out: Path) -> Options:
    """The options that a finished conversion was made with.

    Raises:
        UsageError, DamagedError: its provenance cannot be read.
    """
    return Options.from_dict(read_json(Tree(out), PROVENANCE).get("options"))
