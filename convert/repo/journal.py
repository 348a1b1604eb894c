"""The journal of a conversion: which shards are complete. A JSON object a line, appended and flushed to the disk.

    {"plan": "<digest>", "options": {...}}                     first: what is being converted
    {"shard": "<name>", "sha256": "<hex>", "nbytes": 123}      one per finished shard

A whole conversion keeps one journal, each part of one (`runs/parts.py`) its own. A journal ends where a line is not
sound: cut short by a crash, or written by somebody else. What follows is cut off, so that the next line is not glued to
a stump.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpuquant.conversion.options import Options
from xpuquant.errors import UsageError

STAGING = ".xpuquant"
PROVENANCE = "xpuquant.json"
_LONGEST_LINE = 4096
_LONGEST_NAME = 255
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Finished:
    """A shard that is complete: sha256 in hex, and its size."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Record:
    """What a journal says.

    plan      digest of the plan and the source, see `Plan.digest`
    finished  shard's name → what it is
    """

    plan: str
    options: Options
    finished: Mapping[str, Finished]


class JournalFile:
    """One journal on the disk. Whoever reads or writes it holds its lock (`repo/staging.py`)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Record | None:
        """What it says, after its unsound end is cut off; None where it is absent or says nothing.

        Raises:
            OSError: it cannot be read, or is a link.
        """
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        opening: tuple[str, Options] | None = None
        finished: dict[str, Finished] = {}
        length = 0
        with os.fdopen(fd, "rb") as file:
            while text := file.readline(_LONGEST_LINE):
                line = _parse(text)
                if opening is None:
                    opening = _opening(line)
                    if opening is None:
                        break
                else:
                    entry = _entry(line)
                    if entry is None:
                        break
                    finished[entry[0]] = entry[1]
                length += len(text)
            if length != os.fstat(fd).st_size:
                os.truncate(fd, length)
        return None if opening is None else Record(*opening, finished)

    def opening(self) -> tuple[str, Options] | None:
        """Plan and options of its first line, which whoever holds its lock may be writing; None where it has none.

        Raises:
            OSError: it cannot be read, or is a link.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            return _opening(_parse(file.readline(_LONGEST_LINE)))

    def begin(self, plan: str, options: Options) -> None:
        """Write the first line."""
        self._append({"plan": plan, "options": options.as_dict()})

    def append(self, shard: str, finished: Finished) -> None:
        """Note a complete shard. Thread-safe."""
        self._append({"shard": shard, "sha256": finished.sha256, "nbytes": finished.nbytes})

    def _append(self, line: Mapping[str, Any]) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "ab") as file:
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
            os.fsync(fd)


def _parse(text: bytes) -> dict[str, Any]:
    """A line as an object; an empty one where it is none."""
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _opening(line: Mapping[str, Any]) -> tuple[str, Options] | None:
    plan = line.get("plan")
    try:
        options = Options.from_dict(line.get("options"))
    except UsageError:
        return None
    return (plan, options) if isinstance(plan, str) else None


def _entry(line: Mapping[str, Any]) -> tuple[str, Finished] | None:
    shard, sha256, nbytes = line.get("shard"), line.get("sha256"), line.get("nbytes")
    if not isinstance(shard, str) or not isinstance(sha256, str) or type(nbytes) is not int:
        return None
    if not _is_file_name(shard) or _SHA256.fullmatch(sha256) is None or nbytes < 0:
        return None
    return shard, Finished(sha256, nbytes)


def _is_file_name(name: str) -> bool:
    """Whether a file of that name can lie in a folder. Halves of surrogate pairs and NUL are not printable."""
    if not name.isprintable() or "/" in name or name in ("", ".", ".."):
        return False
    return len(name.encode()) <= _LONGEST_NAME


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
