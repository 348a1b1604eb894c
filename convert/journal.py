"""What survives a crash: the staging folder, its journal, and the lock.

Everything is written into `OUT/.xpuquant/` first. `journal.jsonl` there begins with the plan's digest and gets one line
per finished shard (name, sha256, bytes). A run that finds a journal of the same plan skips the shards it lists, after
hashing them again: a line proves that the bytes were handed to the system, not that a power cut left them on disk. An
unfinished shard is started over. `publish` moves the staged files into OUT, config.json last of all, so that nothing
before that moment can be opened as a model.
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

from xpuquant.errors import EnvironmentFault, UsageError

STAGING = ".xpuquant"
PROVENANCE = "xpuquant.json"
_JOURNAL = "journal.jsonl"
_LOCK = "lock"
_HASH_CHUNK = 4 << 20


@dataclass(frozen=True)
class Finished:
    """A shard that is complete: sha256 in hex, and its size."""

    sha256: str
    nbytes: int


class Journal:
    """The staging folder of one output. Use as a context manager: it holds the lock."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / STAGING
        self._lock_fd: int | None = None

    def __enter__(self) -> Journal:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise EnvironmentFault(f"{self.out}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock_fd)
            self._lock_fd = None
            raise UsageError(
                f"{self.out}: another conversion is writing there; wait for it or choose another"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def begin(self, digest: str, force: bool) -> dict[str, Finished]:
        """Start or resume; returns the shards that need not be made again.

        Raises:
            UsageError: the folder holds an unfinished conversion of something else.
        """
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
            name = str(line["shard"])
            finished = Finished(str(line["sha256"]), int(str(line["nbytes"])))
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

        A run stopped in between finds the moved files gone from the staging folder and makes them again.
        """
        for name in files:
            target = self.out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).replace(target)
        staged = self.folder / "config.json.new"
        with staged.open("wb") as file:
            file.write(config)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(self.out / "config.json")
        shutil.rmtree(self.folder)

    def _lines(self) -> list[dict[str, object]]:
        path = self.folder / _JOURNAL
        if not path.exists():
            return []
        lines: list[dict[str, object]] = []
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # the line that a crash cut short
        return lines

    def _append(self, line: dict[str, object]) -> None:
        with (self.folder / _JOURNAL).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name == _LOCK:
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


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
    names = {entry.name for entry in out.iterdir()}
    if not names or STAGING in names:
        return
    if PROVENANCE not in names:
        raise UsageError(f"{out}: exists and was not written by xpuquant; choose another folder")
    if not force:
        raise UsageError(f"{out}: already holds a converted model; pass --force to convert again")


def clear_output(out: Path) -> None:
    """Remove an earlier conversion (recognised by its provenance file), config.json first."""
    if not (out / PROVENANCE).exists():
        return
    (out / "config.json").unlink(missing_ok=True)
    for entry in out.iterdir():
        if entry.name == STAGING:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
