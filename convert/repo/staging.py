"""The staging folder of an output, and its locks.

Everything is written into `OUT/.xpuquant/files` first. Beside that folder lie the journal of the conversion and those
of its parts (`repo/journal.py`). A run that finds journals of the same plan skips the shards they list, after hashing
them again: a line proves that the bytes were handed to the system, not that a power cut left them on disk. An
unfinished shard is started over. `Staging.publish` moves the staged files into OUT, config.json last of all, so that
nothing before that moment can be opened as a model.

Who excludes whom: a conversion holds the lock of OUT's staging folder alone; the parts of one hold it together, and
each the lock of its own journal alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from xpuquant.conversion.options import Options, contrast
from xpuquant.conversion.repo.checksums import hash_file
from xpuquant.conversion.repo.journal import (
    PROVENANCE,
    STAGING,
    Finished,
    JournalFile,
    Record,
    sync,
)
from xpuquant.errors import Argument, EnvironmentFault, UsageError

LOCK = "lock"
_FILES = "files"
_JOURNAL = "journal.jsonl"
_JOURNALS = "*.jsonl"


class Staging:
    """The staging folder of one output, held alone. Use as a context manager: it holds the lock.

    folder  where the output's files are made. Nothing else lies in it: a source may have a file of any name.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._staging = out / STAGING
        self.folder = staged_files(out)
        self._journal = JournalFile(self._staging / _JOURNAL)
        self._lock_fd: int | None = None

    def __enter__(self) -> Staging:
        busy = f"{self.out}: another conversion is writing there; wait for it or choose another"
        try:
            self._lock_fd = take_lock(self._staging / LOCK, busy)
            make_folder(self.folder)
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise EnvironmentFault(f"{self.out}: cannot be written ({error.strerror})") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not any(self._staging.glob(_JOURNALS)):
                # Finished, or refused before anything was noted.
                shutil.rmtree(self._staging, ignore_errors=True)
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def records(self) -> dict[str, Record]:
        """Journal's file name → what it says, of the conversion's journal and its parts'."""
        found = {path.name: JournalFile(path).read() for path in sorted(self._staging.glob(_JOURNALS))}
        return {name: record for name, record in found.items() if record is not None}

    def begin(self, digest: str, options: Options, force: bool) -> dict[str, Finished]:
        """Start or resume; returns the shards that need not be made again.

        Args:
            digest: of the plan and the source.

        Raises:
            UsageError: the folder holds an unfinished conversion of something else, or by now a finished one.
        """
        _check(self.out, force)
        records = self.records()
        other = next((record for record in records.values() if record.plan != digest), None)
        if other is not None:
            if not force:
                differing = contrast(other.options, options) or [
                    "of another source, or of files or an xpuquant that have changed since"
                ]
                raise UsageError(
                    f"{self.out}: holds an unfinished conversion ",
                    *differing,
                    "; choose another folder, or drop it with ",
                    Argument("force", True),
                )
            records = {}
        if not records:
            self._clear()
        elif (self.out / PROVENANCE).exists():
            # Stopped while publishing: unload the half-published repo before its shards are taken back.
            (self.out / "config.json").unlink(missing_ok=True)
        if _JOURNAL not in records:
            self._journal.begin(digest, options)
        done: dict[str, Finished] = {}
        for name, finished in [entry for record in records.values() for entry in record.finished.items()]:
            if not (self.folder / name).exists() and (self.out / name).exists():
                (self.out / name).replace(self.folder / name)
            if hash_file(self.folder / name) == finished.sha256:
                done[name] = finished
        return done

    def finish(self, shard: str, finished: Finished) -> None:
        """Note a complete shard."""
        self._journal.append(shard, finished)

    def publish(self, files: Sequence[str], config: bytes) -> None:
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
        # The journals go first: without them, what is left of the staging folder claims nothing.
        self._drop_journals()
        shutil.rmtree(self._staging)

    def _clear(self) -> None:
        self._drop_journals()
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def _drop_journals(self) -> None:
        for path in self._staging.glob(_JOURNALS):
            path.unlink()


def staged_files(out: Path) -> Path:
    """The folder in which an output's files are made."""
    return out / STAGING / _FILES


def make_folder(path: Path) -> None:
    """Make a folder below OUT, unless it is there.

    Raises:
        UsageError: it is a link: what is written there would land elsewhere. OSError: it cannot be made.
    """
    if path.is_symlink():
        raise UsageError(f"{path}: is a link; remove it")
    path.mkdir(parents=True, exist_ok=True)


def take_lock(path: Path, busy: str, *, shared: bool = False) -> int:
    """Lock a file below a staging folder, which is made where it is not there.

    Args:
        busy: what to say where somebody else holds it.
        shared: hold it together with others who want no more.

    Returns:
        The descriptor: closing it, also by dying, gives the lock back.

    Raises:
        UsageError: somebody else holds it; or the staging folder is a link.
        OSError: the folder cannot be written.
    """
    while True:
        make_folder(path.parent)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # a run that has just finished took the folder away
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise UsageError(busy) from None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(fd)
            raise
        os.close(fd)


def check_output(out: Path, force: bool) -> None:
    """Whether a conversion may write into `out`.

    Raises:
        UsageError: it holds something that is not ours, or a finished conversion.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: exists and is not a folder")
    if (out / STAGING).exists() and (out / PROVENANCE).exists() and not any((out / STAGING).glob(_JOURNALS)):
        # Left by a run that was stopped while it cleaned up after itself.
        with Staging(out):
            pass
    _check(out, force)


def _check(out: Path, force: bool) -> None:
    names = {entry.name for entry in out.iterdir()}
    if not names - {STAGING} or any((out / STAGING).glob(_JOURNALS)):
        return
    if PROVENANCE not in names:
        raise UsageError(f"{out}: exists and was not written by xpuquant; choose another folder")
    if not force:
        raise UsageError(f"{out}: already holds a converted model; to convert again, pass ", Argument("force", True))
