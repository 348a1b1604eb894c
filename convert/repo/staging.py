"""The staging folder of an output, and its locks.

Everything is written into `OUT/.xpuquant/files` first. Beside that folder lie the journal of the conversion and those
of its parts (`repo/journal.py`). A run that finds journals of the same plan skips the shards they list, after hashing
them again: a line proves that the bytes were handed to the system, not that a power cut left them on disk. With an
unfinished shard it goes on where the journal says that it had come, after hashing it up to there
(`write/resumption.py`). `Staging.publish` moves the staged files into OUT, config.json last of all, so that
nothing before that moment can be opened as a model.

Who excludes whom: a conversion holds the lock of OUT's staging folder alone; the parts of one hold it together, and
each the lock of its own journal alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from unicodedata import normalize

from xpuquant.conversion.options import Options, contrast
from xpuquant.conversion.repo.checksums import hashed
from xpuquant.conversion.repo.journal import (
    PROVENANCE,
    STAGING,
    Finished,
    JournalFile,
    Record,
    check_sources,
    is_seen_from_here,
)
from xpuquant.conversion.repo.replace import SHARD
from xpuquant.conversion.repo.shard_notes import ShardNotes
from xpuquant.conversion.tree import Identity, Tree, Written
from xpuquant.errors import Argument, DamagedError, EnvironmentFault, UnsupportedError, UsageError, VerificationError

LOCK = "lock"
EARLIER_CARD = "README.earlier.md"
"""The card of an earlier conversion, with what people wrote into it: kept until the new one has it."""

VERIFIED_PART = ".verified.json"
"""How the name of a file ends that has the verdict on a part of the conversion."""

_CONFIG = "config.json.new"
_FILES = "files"
_JOURNAL = "journal.jsonl"
_JOURNALS = ".jsonl"


class Staging(ShardNotes):
    """The staging folder of one output, held alone. Use as a context manager: it holds the lock.

    files  where the output's files are made. Nothing else lies in it: a source may have a file of any name.
    tree   the staging folder: what is only known until the end lies beside them
    plan   digest of the plan and the source, once `begin` was told it
    """

    def __init__(self, out: Path, note: Callable[[str], None] = lambda text: None) -> None:
        """
        Args:
            note: told what of an earlier run is kept.
        """
        self.out = out
        self._out = Tree(out)
        self.tree = self._out.below(STAGING)
        super().__init__(staged_files(out), JournalFile(self.tree, _JOURNAL), note)
        self.plan = ""
        self._lock_fd: int | None = None

    @property
    def folder(self) -> Path:
        """The folder of `files`, for messages."""
        return self.files.path

    def __enter__(self) -> Staging:
        busy = f"{self.out}: another conversion is writing there; wait for it or choose another"
        with taking_place(self.out, self._release):
            self._lock_fd = take_lock(self.tree, LOCK, busy)
            self.files.make()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(OSError):
                if isinstance(error, UnsupportedError):
                    # The same options would be refused again: nothing here is of use to the options that would not.
                    self._drop_journals()
                    self.tree.drop(_FILES)
                if isinstance(error, VerificationError):
                    # Shards that were found wrong are not what a run that is started again goes on with.
                    for name in journals(self.tree):
                        JournalFile(self.tree, name).forget_shards(error.files)
                if not journals(self.tree) and not self.tree.holds(EARLIER_CARD):
                    # Finished, or refused.
                    self.drop()
        finally:
            self._release()
            # Network file systems and FUSE keep a file that is open, as the lock was, under another name meanwhile.
            with suppress(OSError):
                self._out.remove_empty(STAGING)

    def _release(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def records(self) -> dict[str, Record]:
        """Journal's file name → what it says, of the conversion's journal and its parts'."""
        found = {name: JournalFile(self.tree, name).read() for name in journals(self.tree)}
        return {name: record for name, record in found.items() if record is not None}

    def begin(
        self,
        digest: str,
        options: Options,
        sizes: Mapping[str, int],
        force: bool,
        sources: Mapping[str, Identity] = {},
    ) -> dict[str, Finished]:
        """Start or resume; returns the shards that need not be made again.

        Args:
            digest: of the plan and the source.
            sizes: bytes of each shard of the plan.
            sources: which files the source's shards are.

        Raises:
            UsageError: the folder holds an unfinished conversion of something else, or by now a finished one; a shard
                of the source was replaced since.
        """
        _check(self.out, force)
        self.plan = digest
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
        if force:
            records = {name: record for name, record in records.items() if _is_same_source(record, sources)}
        else:
            for record in records.values():
                check_sources(record, sources)
        if not records:
            self._clear()
        elif self._out.holds_anything(PROVENANCE):
            # Stopped while publishing: unload the half-published repo before its shards are taken back.
            self._out.remove("config.json")
        if _JOURNAL not in records:
            self._journal.begin(digest, options, sources)
        elif not is_seen_from_here(records[_JOURNAL]):
            self._journal.note_sources(sources)
        for name in [name for record in records.values() for name in record.finished]:
            # A journal may be a stranger's: what is no shard of ours is not taken out of OUT.
            if SHARD.fullmatch(name) and not self.files.holds_anything(name) and self._out.holds(name):
                self._out.move(name, self.files)
        return self.go_on(records.values(), sizes)

    def check_unchanged(self, files: Mapping[str, Written]) -> None:
        """Raises DamagedError where a staged file is no longer the one whose sha256 was taken: another program's hand
        in the staging folder. One that only its times tell from it is hashed again."""
        for name, written in files.items():
            check_held(self.files, name, written)

    def publish(self, shards: Iterable[str], files: Mapping[str, Written], config: bytes) -> None:
        """Move shards and other staged files into OUT, then write config.json, then drop the staging folder.

        A run stopped in between finds the moved files gone from the staging folder and makes them again. The provenance
        goes first: by it a half-published repo is known for ours. Files and folders reach the disk before config.json
        does, so that a power cut cannot leave a repo that looks whole.

        Args:
            files: beside the shards.

        Raises:
            DamagedError: a file is not the one that was made and checked, on this side of its move or the other.
        """
        held = {PROVENANCE: files[PROVENANCE], **files, **{name: self._shards[name] for name in shards}}
        for name in held:
            self.files.sync(name)
        self.check_unchanged(held)
        for name, written in held.items():
            check_held(self.files, name, written)
            self.files.move(name, self._out)
        for name, written in held.items():
            # A move changes the time of an inode: of a shard the rest has to do, or all would be read again.
            check_held(self._out, name, written, moved=name not in files)
        for folder in sorted({name.rpartition("/")[0] for name in held}):
            (self._out.below(folder) if folder else self._out).sync()
        written = self.tree.write(_CONFIG, config)
        self.tree.move(_CONFIG, self._out, "config.json")
        try:
            check_held(self._out, "config.json", written)
        except DamagedError:
            self._out.remove("config.json")
            raise
        self._out.sync()
        # The journals go first: without them, what is left of the staging folder claims nothing.
        self._drop_journals()
        self.drop()

    def drop(self) -> None:
        """Remove the staging folder, with all that is in it; where the file system keeps an open file, which the lock
        is, the folder goes when the lock is given back."""
        try:
            self._out.drop(STAGING)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                raise

    def _clear(self) -> None:
        self._drop_journals()
        self.tree.drop(_FILES)
        self.files.make()

    def _drop_journals(self) -> None:
        for name in self.tree.names():
            if name.endswith((_JOURNALS, VERIFIED_PART)):
                self.tree.remove(name)


def staged_files(out: Path) -> Tree:
    """The folder in which an output's files are made."""
    return Tree(out).below(STAGING).below(_FILES)


def check_told_apart(out: Path, names: Iterable[str]) -> None:
    """Whether the file system of an output, whose lock is held, tells apart what is to be written there: some do not
    know `Notes.txt` from `notes.txt`, and one would replace the other.

    Args:
        names: paths below `out`, of all files.

    Raises:
        UsageError: it does not.
    """
    staging = Tree(out).below(STAGING)
    if not staging.holds(LOCK.upper()) or staging.identity(LOCK.upper()).inode != staging.identity(LOCK).inode:
        return
    seen: dict[str, str] = {}
    for name in map(PurePosixPath, names):
        for path in (name, *name.parents[:-1]):
            other = seen.setdefault(normalize("NFC", str(path)).casefold(), str(path))
            if other != str(path):
                raise UsageError(
                    f"{out}: the file system there does not tell {other} from {path}; rename one of them in the "
                    "source, or choose a folder on another disk"
                )


def journals(staging: Tree) -> list[str]:
    """The journals that lie in a staging folder."""
    return [name for name in staging.names() if name.endswith(_JOURNALS)]


def check_held(tree: Tree, name: str, written: Written, moved: bool = False) -> None:
    """Raises DamagedError where a file is not the one that was written.

    Args:
        moved: it has been moved since: the time of its inode says nothing.
    """
    try:
        now = tree.identity(name)
        if moved:
            now = now._replace(ctime_ns=written.identity.ctime_ns)
        is_held = now == written.identity or hashed(tree, name, written.identity.size).sha256 == written.sha256
    except (FileNotFoundError, DamagedError):
        is_held = False
    if not is_held:
        raise DamagedError(
            f"{tree.path / name} changed between being made and being published: another program writes into this "
            "folder; convert again"
        )


def _is_same_source(record: Record, sources: Mapping[str, Identity]) -> bool:
    try:
        check_sources(record, sources)
    except UsageError:
        return False
    return True


@contextmanager
def taking_place(out: Path, release: Callable[[], object]) -> Iterator[None]:
    """While locks are taken and the staging folder is made: what fails gives back what was taken.

    Raises:
        EnvironmentFault: in place of OSError.
    """
    try:
        yield
    except BaseException as error:
        release()
        if isinstance(error, OSError):
            raise EnvironmentFault(f"{out}: cannot be written ({error.strerror})") from error
        raise


def take_lock(staging: Tree, name: str, busy: str, *, shared: bool = False) -> int:
    """Lock a file of a staging folder, which is made where it is not there.

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
        staging.make()
        try:
            fd = staging.update(name, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue  # a run that has just finished took the folder away
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == staging.identity(name).inode:
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
    tree = Tree(out)
    if tree.holds_anything(STAGING) and tree.holds_anything(PROVENANCE) and not journals(tree.below(STAGING)):
        # Left by a run that was stopped while it cleaned up after itself.
        with Staging(out):
            pass
    _check(out, force)


def _check(out: Path, force: bool) -> None:
    tree = Tree(out)
    names = set(tree.names())
    if not names - {STAGING} or journals(tree.below(STAGING)):
        return
    if not tree.holds(PROVENANCE):
        raise UsageError(f"{out}: exists and was not written by xpuquant; choose another folder")
    if not force:
        raise UsageError(f"{out}: already holds a converted model; to convert again, pass ", Argument("force", True))
