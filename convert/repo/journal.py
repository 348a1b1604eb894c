"""What survives a crash: the staging folder, its journal, and the lock.

Everything is written into `OUT/.xpuquant/files` first. `journal.jsonl` beside that folder begins with the plan's digest
and gets one line per finished shard (name, sha256, bytes). A run that finds a journal of the same plan skips the shards
it lists, after hashing them again: a line proves that the bytes were handed to the system, not that a power cut left
them on disk. An unfinished shard is started over. `publish` moves the staged files into OUT, config.json last of all,
so that nothing before that moment can be opened as a model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from xpuquant.errors import EnvironmentFault, UsageError

STAGING = ".xpuquant"
PROVENANCE = "xpuquant.json"
_FILES = "files"
_JOURNAL = "journal.jsonl"
_LOCK = "lock"
_HASH_CHUNK = 4 << 20


@dataclass(frozen=True)
class Finished:
    """A shard that is complete: sha256 in hex, and its size."""

    sha256: str
    nbytes: int


class Journal:
    """The staging folder of one output. Use as a context manager: it holds the lock.

    folder  where the output's files are made. Nothing else lies in it: a source may have a file of any name.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._staging = out / STAGING
        self.folder = self._staging / _FILES
        self._lock_fd: int | None = None

    def __enter__(self) -> Journal:
        if self._staging.is_symlink():
            raise UsageError(f"{self._staging}: is a link; remove it")
        try:
            while self._lock_fd is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock_fd = self._lock()
        except OSError as error:
            raise EnvironmentFault(f"{self.out}: cannot be written ({error.strerror})") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock_fd is not None:
            try:
                if not (self._staging / _JOURNAL).exists():
                    # Finished, or refused before anything was noted.
                    shutil.rmtree(self._staging, ignore_errors=True)
            finally:
                os.close(self._lock_fd)
                self._lock_fd = None

    def _lock(self) -> int | None:
        """The locked descriptor; None where the run that held it has just finished and taken the file away."""
        path = self._staging / _LOCK
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise UsageError(
                f"{self.out}: another conversion is writing there; wait for it or choose another"
            ) from None
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)
        return None

    def begin(self, digest: str, force: bool) -> dict[str, Finished]:
        """Start or resume; returns the shards that need not be made again.

        Raises:
            UsageError: the folder holds an unfinished conversion of something else, or by now a finished one.
        """
        _check(self.out, force)
        lines = self._lines()
        if lines and lines[0].get("plan") != digest:
            if not force:
                raise UsageError(
                    f"{self.out}: holds an unfinished conversion of another source or with other options; "
                    "pass --force to drop it"
                )
            lines = []
        if not lines:
            self._clear()
            self._append({"plan": digest})
            return {}
        if (self.out / PROVENANCE).exists():
            # Stopped while publishing: unload the half-published repo before its shards are taken back.
            (self.out / "config.json").unlink(missing_ok=True)
        done: dict[str, Finished] = {}
        for line in lines[1:]:
            name = line["shard"]
            finished = Finished(line["sha256"], line["nbytes"])
            if not (self.folder / name).exists() and (self.out / name).exists():
                (self.out / name).replace(self.folder / name)
            if file_sha256(self.folder / name) == finished.sha256:
                done[name] = finished
        return done

    def finish(self, shard: str, finished: Finished) -> None:
        """Note a complete shard."""
        self._append({"shard": shard, "sha256": finished.sha256, "nbytes": finished.nbytes})

    def publish(self, files: list[str], config: bytes) -> None:
        """Move staged files into OUT, then write config.json, then drop the staging folder.

        A run stopped in between finds the moved files gone from the staging folder and makes them again. The provenance
        goes first: by it a half-published repo is known for ours. Files and folders reach the disk before config.json
        does, so that a power cut cannot leave a repo that looks whole.
        """
        ordered = sorted(files, key=lambda name: name != PROVENANCE)
        for name in ordered:
            sync(self.folder / name)
        for name in ordered:
            target = self.out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).replace(target)
        for folder in {(self.out / name).parent for name in ordered}:
            sync(folder)
        staged = self._staging / "config.json.new"
        staged.write_bytes(config)
        sync(staged)
        staged.replace(self.out / "config.json")
        sync(self.out)
        # The journal goes first: without it, what is left of the staging folder claims nothing.
        (self._staging / _JOURNAL).unlink()
        shutil.rmtree(self._staging)

    def _lines(self) -> list[dict[str, Any]]:
        """The valid lines; the rest, which a crash cut short, is cut off."""
        path = self._staging / _JOURNAL
        if not path.exists():
            return []
        lines: list[dict[str, Any]] = []
        length = 0
        for text in path.read_bytes().splitlines(keepends=True):
            line = _parse(text, first=not lines)
            if line is None:
                break
            lines.append(line)
            length += len(text)
        if length != path.stat().st_size:
            os.truncate(path, length)
        return lines

    def _append(self, line: dict[str, object]) -> None:
        with (self._staging / _JOURNAL).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _clear(self) -> None:
        (self._staging / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        self.folder.mkdir()


def _parse(text: bytes, first: bool) -> dict[str, Any] | None:
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    types = {"plan": str} if first else {"shard": str, "sha256": str, "nbytes": int}
    if not isinstance(line, dict) or any(type(line.get(key)) is not kind for key, kind in types.items()):
        return None
    # A shard's name is a file's, never a path.
    return None if "/" in line.get("shard", "") else line


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_sha256(path: Path) -> str | None:
    """sha256 of a file in hex; None where it does not exist."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
            return digest.hexdigest()
    except FileNotFoundError:
        return None


def check_output(out: Path, force: bool) -> None:
    """Whether a conversion may write into `out`.

    Raises:
        UsageError: it holds something that is not ours, or a finished conversion.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: exists and is not a folder")
    if (out / STAGING).exists() and (out / PROVENANCE).exists() and not (out / STAGING / _JOURNAL).exists():
        # Left by a run that was stopped while it cleaned up after itself.
        with Journal(out):
            pass
    _check(out, force)


def _check(out: Path, force: bool) -> None:
    names = {entry.name for entry in out.iterdir()}
    if not names - {STAGING} or (out / STAGING / _JOURNAL).exists():
        return
    if PROVENANCE not in names:
        raise UsageError(f"{out}: exists and was not written by xpuquant; choose another folder")
    if not force:
        raise UsageError(f"{out}: already holds a converted model; pass --force to convert again")
