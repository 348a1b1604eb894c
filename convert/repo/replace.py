"""Removing an earlier conversion from OUT: what it wrote, by name, and nothing else.

OUT may be more than a conversion by now: a git clone, notes, a LoRA adapter beside the model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath

from xpuquant.conversion.repo.journal import PROVENANCE

_WRITTEN = (
    "README.md",
    "verify.json",
    "verify.md",
    "verify.html",
    "verify.svg",
    "model.safetensors.index.json",
)
_SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


def clear_output(out: Path) -> None:
    """Remove an earlier conversion (recognised by its provenance file): config.json first, the provenance last."""
    record = out / PROVENANCE
    if not record.exists():
        return
    (out / "config.json").unlink(missing_ok=True)
    names = {*_WRITTEN, *_recorded(record), *(p.name for p in out.iterdir() if _SHARD.fullmatch(p.name))}
    folders: set[Path] = set()
    for name in sorted(names - {"config.json", PROVENANCE}):
        path = out / name
        # Through a link lies somebody else's folder.
        if not path.parent.resolve().is_relative_to(out.resolve()) or path.is_dir():
            continue
        path.unlink(missing_ok=True)
        folders |= {out / parent for parent in PurePosixPath(name).parents if parent.parts}
    for folder in sorted(folders, reverse=True):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    record.unlink()


def _recorded(path: Path) -> set[str]:
    """The files a provenance file lists, as far as they are paths below its folder."""
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return set()
    tables = [record.get(key) for key in ("shards", "files")] if isinstance(record, dict) else []
    names = {name for table in tables if isinstance(table, dict) for name in table}
    return {name for name in names if _is_below(name)}


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
