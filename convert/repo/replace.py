"""Removing an earlier conversion from OUT: what it wrote, and nothing else.

OUT may be more than a conversion by now: a git clone, notes, a LoRA adapter beside the model. And its record may be a
stranger's: so besides the names that every conversion writes, it can only have files removed that it knows by their
sha256, and none of a tool's folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from xpuquant.conversion.repo.checksums import hash_file
from xpuquant.conversion.repo.journal import PROVENANCE
from xpuquant.conversion.sources.repo_files import MAX_COPIED_BYTES
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.walk import is_hidden, wrong_name
from xpuquant.errors import DamagedError, UsageError

_WRITTEN = (
    "README.md",
    "verify.json",
    "verify.md",
    "verify.html",
    "verify.svg",
    "model.safetensors.index.json",
)
SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
"""Names of the shards that conversions write."""

_MAX_RECORD_BYTES = 128 << 20


def clear_output(out: Path) -> None:
    """Remove an earlier conversion (recognised by its provenance file): config.json first, the provenance last. A file
    that was changed since stays."""
    tree = Tree(out)
    if not tree.holds(PROVENANCE):
        return
    tree.remove("config.json")
    for name in (*_WRITTEN, *(name for name in tree.names() if SHARD.fullmatch(name))):
        if not tree.is_folder(name):
            tree.remove(name)
    folders: set[str] = set()
    for name, sha256 in sorted(_recorded(tree).items()):
        if not _is_recorded(tree, name, sha256):
            continue
        tree.remove(name)
        folders |= {str(parent) for parent in PurePosixPath(name).parents if parent.parts}
    for folder in sorted(folders, reverse=True):
        tree.remove_empty(folder)
    tree.remove(PROVENANCE)


def _is_recorded(tree: Tree, name: str, sha256: str) -> bool:
    """Whether a file is there, no link leads to it, and it is as it was recorded."""
    try:
        return tree.holds(name) and hash_file(tree, name, MAX_COPIED_BYTES) == sha256
    except (UsageError, DamagedError):  # too large; or a link on the way: through it lies somebody else's folder
        return False


def _recorded(tree: Tree) -> Mapping[str, str]:
    """Path → sha256 of the copied files that a provenance file lists, as far as they may be ours."""
    try:
        record = json.loads(tree.read(PROVENANCE, _MAX_RECORD_BYTES))
    except (ValueError, RecursionError, DamagedError):
        return {}
    files = record.get("files") if isinstance(record, dict) else None
    return {
        name: str(sha256)
        for name, sha256 in (files.items() if isinstance(files, dict) else ())
        if wrong_name(name) is None and not is_hidden(name) and name != PROVENANCE
    }
