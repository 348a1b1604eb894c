"""The journal of a conversion: which shards are complete, and how far those under way have come. A JSON object a line.

    {"plan": "<digest>", "options": {...}}                     first: what is being converted
    {"source": "<name>", "host": "<name>", "size": 123, "mtime_ns": 1, "ctime_ns": 1, "inode": 1}
                                                               one per shard of a source here: which file it was
    {"shard": "<name>", "sha256": "<hex>", "reached": 123}     now and then: the first 123 bytes of an unfinished one
    {"shard": "<name>", "sha256": "<hex>", "nbytes": 123}      one per finished shard

Lines are appended, and flushed to the disk but for those on unfinished shards: what they claim is hashed before it is
believed, so that one which a power cut takes away costs no more than the bytes it told of.

A whole conversion keeps one journal, each part of one (`runs/parts.py`) its own. A journal ends where a line is not
sound: cut short by a crash, or written by somebody else. What follows is cut off, so that the next line is not glued to
a stump.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

from xpuquant import __version__
from xpuquant.conversion.options import Options
from xpuquant.conversion.sources.unfinished import STAGING as STAGING
from xpuquant.conversion.tree import Identity, Tree
from xpuquant.conversion.walk import wrong_name
from xpuquant.errors import Argument, UsageError
from xpuquant.values import frozen

PROVENANCE = "xpuquant.json"
PRODUCER = f"xpuquant {__version__}"
"""This program, as it names itself in what it writes."""

_LONGEST_LINE = 4096
_MAX_BYTES = 64 << 20
"""Of a journal: 10^5 shards."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@frozen(sealed=True)
class Finished:
    """A shard that is complete: sha256 in hex, and its size."""

    sha256: str
    nbytes: int


class Reached(NamedTuple):
    """How far a shard under way had come: its first `nbytes` bytes, and their sha256 in hex."""

    nbytes: int
    sha256: str


@frozen(sealed=True)
class Record:
    """What a journal says.

    plan      digest of the plan and the source, see `Plan.digest`
    finished  shard's name → what it is
    sources   (machine, source's shard) → which file it was, seen from there
    reached   shard's name → how far it had come, each time that was noted
    """

    plan: str
    options: Options
    finished: Mapping[str, Finished]
    sources: Mapping[tuple[str, str], Identity]
    reached: Mapping[str, Sequence[Reached]]


class JournalFile:
    """One journal on the disk. Whoever reads or writes it holds its lock (`repo/staging.py`)."""

    def __init__(self, tree: Tree, name: str) -> None:
        self._tree = tree
        self._name = name

    def read(self) -> Record | None:
        """What it says, after its unsound end is cut off; None where it is absent or says nothing.

        Raises:
            OSError: it cannot be read. UsageError, DamagedError: it is a link, or no regular file.
        """
        try:
            fd = self._tree.update(self._name, os.O_RDWR)
        except FileNotFoundError:
            return None
        opening: tuple[str, Options] | None = None
        finished: dict[str, Finished] = {}
        sources: dict[tuple[str, str], Identity] = {}
        reached: dict[str, list[Reached]] = {}
        length = 0
        with os.fdopen(fd, "rb") as file:
            while length < _MAX_BYTES and (text := file.readline(_LONGEST_LINE)):
                line = _parse(text)
                if opening is None:
                    opening = _opening(line)
                    if opening is None:
                        break
                elif (entry := _entry(line)) is not None:
                    finished[entry[0]] = entry[1]
                elif (step := _reached(line)) is not None:
                    reached.setdefault(step[0], []).append(step[1])
                elif (source := _source(line)) is not None:
                    sources[source[0]] = source[1]
                else:
                    break
                length += len(text)
            if length != os.fstat(fd).st_size:
                os.ftruncate(fd, length)
        return None if opening is None else Record(*opening, finished, sources, reached)

    def opening(self) -> tuple[str, Options] | None:
        """Plan and options of its first line, which whoever holds its lock may be writing; None where it has none.

        Raises:
            OSError: it cannot be read. UsageError, DamagedError: it is a link, or no regular file.
        """
        try:
            fd = self._tree.update(self._name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            return _opening(_parse(file.readline(_LONGEST_LINE)))

    def drop(self) -> None:
        """Remove it."""
        self._tree.remove(self._name)

    def forget_shards(self, names: Container[str] | None = None) -> None:
        """Take back what it says of shards, finished and under way: they are made again.

        Args:
            names: of which; None: of all.
        """

        def is_kept(line: Mapping[str, Any]) -> bool:
            return "shard" not in line or (names is not None and line["shard"] not in names)

        text = self._tree.read(self._name, _MAX_BYTES) if self._tree.holds(self._name) else b""
        kept = [line for line in text.splitlines(keepends=True) if is_kept(_parse(line))]
        self._tree.write(self._name, b"".join(kept))

    def begin(self, plan: str, options: Options, sources: Mapping[str, Identity]) -> None:
        """Write the first line, and those on the source's shards."""
        self._append({"plan": plan, "options": options.as_dict()})
        self.note_sources(sources)

    def note_sources(self, sources: Mapping[str, Identity]) -> None:
        """Note which files the source's shards are, seen from here."""
        host = os.uname().nodename
        lines = [{"source": name, "host": host, **identity._asdict()} for name, identity in sources.items()]
        if lines:
            self._append(*lines)

    def append(self, shard: str, finished: Finished) -> None:
        """Note a complete shard. Thread-safe."""
        self._append({"shard": shard, "sha256": finished.sha256, "nbytes": finished.nbytes})

    def append_reached(self, shard: str, reached: Reached) -> None:
        """Note how far a shard has come. Thread-safe; waits for no disk."""
        self._append({"shard": shard, "sha256": reached.sha256, "reached": reached.nbytes}, flushed=False)

    def _append(self, *lines: Mapping[str, Any], flushed: bool = True) -> None:
        fd = self._tree.update(self._name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with os.fdopen(fd, "ab") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            if flushed:
                os.fsync(fd)


def is_seen_from_here(record: Record) -> bool:
    """Whether a journal says which files the source's shards are, seen from this machine."""
    return any(host == os.uname().nodename for host, _ in record.sources)


def check_sources(record: Record, sources: Mapping[str, Identity]) -> None:
    """Whether the source is still the files that a journal was begun with. A plan knows their sizes and times; what
    tells a replaced file whose time was set back, its inode, means something on the same machine only: elsewhere the
    same storage may number them otherwise.

    Raises:
        UsageError: a shard is another file.
    """
    host = os.uname().nodename
    for name, identity in sources.items():
        before = record.sources.get((host, name))
        if before is not None and before != identity:
            raise UsageError(
                f"{name} of the source changed since the conversion was begun ({before.difference(identity)}); "
                "choose another folder, or start over with ",
                Argument("force", True),
            )


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
    found = _digest(line, "nbytes")
    return None if found is None else (found[0], Finished(found[1], found[2]))


def _reached(line: Mapping[str, Any]) -> tuple[str, Reached] | None:
    found = _digest(line, "reached")
    return None if found is None else (found[0], Reached(found[2], found[1]))


def _digest(line: Mapping[str, Any], of: str) -> tuple[str, str, int] | None:
    """A shard's name, a sha256 and the number of bytes that it is of, which stands under that key."""
    shard, sha256, nbytes = line.get("shard"), line.get("sha256"), line.get(of)
    if not isinstance(shard, str) or not isinstance(sha256, str) or type(nbytes) is not int:
        return None
    if wrong_name(shard) is not None or "/" in shard or _SHA256.fullmatch(sha256) is None or nbytes < 0:
        return None
    return shard, sha256, nbytes


def _source(line: Mapping[str, Any]) -> tuple[tuple[str, str], Identity] | None:
    name, host = line.get("source"), line.get("host")
    numbers = [number for field in Identity._fields if type(number := line.get(field)) is int]
    if not isinstance(name, str) or not isinstance(host, str) or len(numbers) != len(Identity._fields):
        return None
    return (host, name), Identity(*numbers)
