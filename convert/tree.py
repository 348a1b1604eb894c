"""The one door to files of strangers: every path below a source or an output folder is opened here, and the way to it
is that of `walk.py`.

- What is written, moved or deleted is reached through no link at all, and a file is made anew in place of what was
  there;
- what is read may be a link to a file of the same folder that could be copied under its own name, and, in the Hub's
  cache, to the blob that the cache means; no other, and no link to a folder;
- only regular files are opened: never a pipe, which would wait for ever, nor a device;
- what is read from front to back is read up to a limit, whatever size the file system claims;
- what is changed in place, and what goes into something new without being known by its sha256, has no second name
  elsewhere (a hard link): it may be anybody's file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from xpuquant.conversion.walk import (
    Walk,
    check_no_link,
    check_regular,
    check_sole,
    is_hidden,
    lstat,
    not_a_file,
    parts_of,
)
from xpuquant.errors import DamagedError, UsageError, XpuquantError

_MAX_FILES = 100_000
_NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 20


class Identity(NamedTuple):
    """What tells one file from another without reading it. A copy that keeps its times has another inode, and nobody
    can set the time of an inode's change."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def difference(self, other: Identity) -> str:
        """Which of them differ, in words."""
        words = ("size", "time", "time of the inode", "inode")
        return ", ".join(word for word, mine, its in zip(words, self, other, strict=True) if mine != its)


class Written(NamedTuple):
    """A file as it was written or read: the sha256, in hex, of its bytes as they passed, and which file it was then."""

    sha256: str
    identity: Identity


class Listed(NamedTuple):
    """A regular file of a folder.

    name   path below the folder, POSIX
    means  path of the file that is read, where `name` is a link to it; a blob of the Hub's cache counts as `name`
    """

    name: str
    means: str


class Tree(Walk):
    """A folder, and every file below it. Names are POSIX paths below it. Thread-safe; holds nothing open.

    path  the folder, for messages

    Raises, in every method: UsageError for a link where there may be none; DamagedError for a name that can be no
    file's, and for what is no regular file. OSError with the whole path, as the system says.
    """

    def below(self, name: str) -> Tree:
        """A folder of this one, which may not exist yet."""
        return Tree(self._root, (*self._below, *parts_of(self.path, name)))

    # Reading

    def open(self, name: str, known: Identity | None = None, sole: bool = False) -> int:
        """A descriptor to read a file.

        Args:
            known: which file it has to be. A name that leads elsewhere for a moment, also through a folder above that
                was exchanged, is noticed here, and nowhere else once it leads back.
            sole: it may have no second name.

        Raises:
            DamagedError: it is another file. UsageError: it has a second name.
        """
        with self._named(name), self._found(name) as place:
            check_regular(place.status, self.path / name)
            fd = os.open(place.name, os.O_RDONLY | _NO_LINK, dir_fd=place.folder)
            try:
                status = os.fstat(fd)
                check_regular(status, self.path / name)
                if sole:
                    check_sole(status, self.path / name)
                if known is not None:
                    check_same(self.path / name, known, _identity(status))
            except BaseException:
                os.close(fd)
                raise
            return fd

    def read(self, name: str, limit: int, sole: bool = False) -> bytes:
        """A file's content.

        Args:
            sole: as `open`.

        Raises:
            DamagedError: it has more than `limit` bytes.
        """
        fd = self.open(name, sole=sole)
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_size > limit or len(data := file.read(limit + 1)) > limit:
                raise DamagedError(f"{self.path / name}: is too large for what it is (more than {limit >> 20} MiB)")
        return data

    def chunks(self, name: str, limit: int, known: Identity | None = None) -> Generator[memoryview, None, Identity]:
        """A file's content, from front to back; each part is good until the next is asked for. Returns which file it
        was: one that grows for ever is not read for ever, and of one that is too large nothing is read.

        Args:
            limit: bytes that it may have.
            known: as `open`.

        Raises:
            DamagedError: it has more than `limit` bytes, or changed meanwhile.
        """
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        with os.fdopen(self.open(name, known), "rb", buffering=0) as file, self._named(name):
            identity = _identity(os.fstat(file.fileno()))
            left = identity.size
            if left > limit:
                raise DamagedError(f"{self.path / name}: has {left} bytes, more than the {limit} that it may have")
            while left and (count := file.readinto(buffer[:left])):
                yield buffer[:count]
                left -= count
            check_same(self.path / name, identity, _identity(os.fstat(file.fileno())))
        return identity

    def identity(self, name: str) -> Identity:
        """Of the file that `open` would open."""
        with self._named(name), self._found(name) as place:
            check_regular(place.status, self.path / name)
            return _identity(place.status)

    def blob(self, name: str) -> str:
        """Name of the file that this one is a link to, or its own: in the Hub's cache, the Hub's digest of it."""
        with self._named(name), self._folder_of(name) as (folder, last):
            status = os.stat(last, dir_fd=folder, follow_symlinks=False)
            return os.readlink(last, dir_fd=folder).rpartition("/")[2] if stat.S_ISLNK(status.st_mode) else last

    def size(self, name: str) -> int:
        """Bytes of the file that `open` would open."""
        return self.identity(name).size

    def holds(self, name: str) -> bool:
        """Whether a regular file has this very name: no link, no pipe, no folder."""
        status = self._status(name)
        return status is not None and stat.S_ISREG(status.st_mode)

    def why_no_file(self, name: str) -> str | None:
        """What lies under a name in place of a regular file, in words; None where one does, or nothing."""
        status = self._status(name)
        return None if status is None or stat.S_ISREG(status.st_mode) else not_a_file(status)

    def is_folder(self, name: str) -> bool:
        """Whether a folder has this very name: no link to one."""
        status = self._status(name)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def check_place(self, name: str) -> None:
        """Raises UsageError where a file of that name could not be put in place: of what lies there only a file, or a
        link itself, gives way."""
        status = self._status(name)
        if status is not None and not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
            raise UsageError(f"{self.path / name}: is {what}, and a file of that name is to be written; move it away")

    def check_sole(self, name: str) -> None:
        """Raises UsageError where the file that `open` would open has a second name elsewhere."""
        with self._named(name), self._found(name) as place:
            check_sole(place.status, self.path / name)

    def holds_anything(self, name: str) -> bool:
        """Whether anything has this name, links that lead nowhere too."""
        return self._status(name) is not None

    def names(self) -> list[str]:
        """What lies in this folder itself, sorted; empty where there is no such folder."""
        try:
            with self._opened() as fd:
                return sorted(os.listdir(fd))  # noqa: PTH208  # of a descriptor
        except FileNotFoundError:
            return []

    def files(self, hidden: bool = False) -> list[Listed]:
        """Every regular file below, sorted. Pipes, sockets and devices are passed over.

        Args:
            hidden: those in folders of tools too, see `is_hidden`.

        Raises:
            UsageError: a name that cannot be shown; a link that may not be read; too many files.
            PermissionError: a file or folder that cannot be read: said now, not after hours.
        """
        found: list[Listed] = []
        for entry, name, fd in self._entries(hidden):
            if not (entry.is_symlink() or entry.is_file(follow_symlinks=False)):
                continue
            _check_shown(self.path / name)
            found.append(Listed(name, self._means(name) if entry.is_symlink() else name))
            if not entry.is_symlink() and not os.access(entry.name, os.R_OK, dir_fd=fd, effective_ids=True):
                raise PermissionError(13, "Permission denied", str(self.path / name))
            self._check_number(len(found))
        return sorted(found)

    def strays(self, expected: Iterable[str] = ()) -> dict[str, str]:
        """What lies here and can be no file of a model: name → what it is, in words. Pipes, sockets and devices
        anywhere below, but in folders of tools; and folders that have the name of a file.

        Args:
            expected: names of files.

        Raises: as `files`.
        """
        found: dict[str, str] = {}
        for entry, name, _ in self._entries(hidden=False):
            if not (is_hidden(name) or entry.is_symlink() or entry.is_file(follow_symlinks=False)):
                _check_shown(self.path / name)
                found[name] = not_a_file(entry.stat(follow_symlinks=False))
                self._check_number(len(found))
        for name in expected:
            with suppress(OSError, XpuquantError):  # a name that leads nowhere is no folder's
                status = self._status(name)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    found[name] = not_a_file(status)
        return dict(sorted(found.items()))

    def _entries(self, hidden: bool) -> Iterator[tuple[os.DirEntry[str], str, int]]:
        """What lies below and is no folder: (entry, path below this folder, handle of the folder it lies in)."""
        pending, folders = deque([""]), 0
        while pending:
            folder = pending.popleft()
            folders += 1
            place = self.below(folder) if folder else self
            with place._opened() as fd, os.scandir(fd) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if not entry.is_dir(follow_symlinks=False):
                        yield entry, name, fd
                    elif hidden or not is_hidden(entry.name):
                        _check_shown(self.path / name)
                        pending.append(name)
            self._check_number(folders)

    def _check_number(self, number: int) -> None:
        if number > _MAX_FILES:
            raise UsageError(f"{self.path}: holds more than {_MAX_FILES} files or folders; is it a model folder?")

    def has_links(self) -> bool:
        """Whether a link lies anywhere below, in folders of tools too."""
        pending = deque([self])
        while pending:
            place = pending.popleft()
            with place._opened() as fd, os.scandir(fd) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(place.below(entry.name))
        return False

    # Changing

    def create(self, name: str, flags: int = 0) -> int:
        """A descriptor to write and read a new file, in place of what is there; its folders are made.

        Args:
            flags: of `os.open`, besides.
        """
        with self._named(name), self._folder_of(name, make=True) as (folder, last):
            # Not truncated in place: what is there may be a link, or have a second name elsewhere.
            with suppress(FileNotFoundError):
                os.unlink(last, dir_fd=folder)
            return os.open(
                last, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666, dir_fd=folder
            )

    def write(self, name: str, content: bytes) -> Written:
        """Make a file of this content, flushed to the disk."""
        fd = self.create(name)
        with self._named(name):
            try:
                _write_all(fd, content)
                os.fsync(fd)
                return Written(hashlib.sha256(content).hexdigest(), _identity(os.fstat(fd)))
            finally:
                os.close(fd)

    def copy_from(self, other: Tree, name: str, limit: int, known: Identity | None = None) -> Written:
        """Copy a file of another tree, content only: the mode follows the umask, and a link becomes a file.

        Args:
            limit: bytes that it may have.
            known: as `open`.

        Raises:
            DamagedError: it is too large or another file, or changed while it was copied.
        """
        digest, parts = hashlib.sha256(), other.chunks(name, limit, known)
        part = next(parts, None)  # what cannot be read makes no file
        fd = self.create(name)
        with self._named(name):
            try:
                while part is not None:
                    digest.update(part)
                    _write_all(fd, part)
                    part = next(parts, None)
                return Written(digest.hexdigest(), _identity(os.fstat(fd)))
            finally:
                os.close(fd)

    def update(self, name: str, flags: int) -> int:
        """A descriptor to change a file in place, a lock or a journal.

        Args:
            flags: of `os.open`, with the access; `O_CREAT` makes it where it is not there.
        """
        with self._named(name), self._folder_of(name) as (folder, last):
            status = lstat(last, folder)
            if status is not None:
                check_no_link(status, self.path / name)
                check_regular(status, self.path / name)
                check_sole(status, self.path / name)
            fd = os.open(last, flags | _NO_LINK, 0o666, dir_fd=folder)
            try:
                check_regular(os.fstat(fd), self.path / name)
            except BaseException:
                os.close(fd)
                raise
            return fd

    def make(self) -> None:
        """Make this folder, and those above it up to the one that the user named."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self._named(""), self._walked(self._below, make=True):
            pass

    def move(self, name: str, to: Tree, new: str | None = None) -> None:
        """Move a regular file into another tree of the same disk, in place of a file or link there."""
        new = new or name
        with self._named(name), self._folder_of(name) as (folder, last):
            status = os.stat(last, dir_fd=folder, follow_symlinks=False)
            check_no_link(status, self.path / name)
            check_regular(status, self.path / name)
            with to._named(new), to._folder_of(new, make=True) as (target, target_last):
                os.replace(last, target_last, src_dir_fd=folder, dst_dir_fd=target)

    def remove(self, name: str) -> None:
        """Remove a file, or a link itself; nothing where nothing is, or through a link to a folder."""
        with suppress(FileNotFoundError), self._named(name), self._folder_of(name) as (folder, last):
            os.unlink(last, dir_fd=folder)

    def discard(self, name: str) -> None:
        """Remove a file that `open` would open, and the name that leads to it: of the Hub's cache, link and blob."""
        with self._named(name), self._found(name) as place:
            os.unlink(place.name, dir_fd=place.folder)
        self.remove(name)

    def remove_empty(self, name: str) -> None:
        """Remove a folder, if it is one and empty."""
        with suppress(OSError, UsageError), self._folder_of(name) as (folder, last):
            os.rmdir(last, dir_fd=folder)

    def drop(self, name: str) -> None:
        """Remove a folder with all that lies in it; of a link, the link. Nothing where nothing is.

        Raises:
            UsageError: folders lie in it a thousand deep.
        """
        with suppress(FileNotFoundError), self._named(name), self._folder_of(name) as (folder, last):
            status = os.stat(last, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                try:
                    shutil.rmtree(last, dir_fd=folder)
                except RecursionError:
                    raise UsageError(f"{self.path / name}: has folders in folders, too many; remove it") from None
            else:
                os.unlink(last, dir_fd=folder)

    def sync(self, name: str = "") -> None:
        """Wait until a file's bytes, or the entries of this folder, are on the disk."""
        with self._named(name):
            if not name:
                with self._opened() as fd:
                    os.fsync(fd)
                return
            fd = self.open(name)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def check_same(path: Path, before: Identity, now: Identity) -> None:
    """Raises DamagedError if a file is no longer the one that it was."""
    if before != now:
        raise DamagedError(f"{path} changed while it was being read ({before.difference(now)}); start again")


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _check_shown(path: Path) -> None:
    if not path.name.isprintable():
        raise UsageError(f"{path}: has control characters in its name; rename it")


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
