"""The one door to files of strangers: every path below a source or an output folder is opened here.

The folder itself is the user's word and may be a link. What lies below it came with a download, a clone or an archive,
and anybody may have made it: so it is reached from a handle on the folder, one component after the other, and

- what is written, moved or deleted is reached through no link at all, and a file is made anew in place of what was
  there;
- what is read may be a link to a file of the same folder that could be copied under its own name, and, in the Hub's
  cache, to the blob that the cache means; no other, and no link to a folder;
- only regular files are opened: never a pipe, which would wait for ever, nor a device;
- what is parsed is read up to a limit, whatever size the file system claims.

Handles (`dir_fd`) are of POSIX, as are the locks of the staging folder: this package runs nowhere else.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from xpuquant.errors import DamagedError, UsageError, shown

LONGEST_NAME = 255
"""Bytes of a file's name on the file systems in use (`NAME_MAX`)."""

_LONGEST_PATH = 2048
_MAX_FILES = 100_000
_MAX_HOPS = 8
"""Links that lead to links. The Hub's cache needs two."""

_SEARCH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_COPY_BYTES = 8 << 20
_BLOB = re.compile(r"([0-9a-f]{2}/)?([0-9a-f]{40}|[0-9a-f]{64})")
"""Blobs in the Hub's cache, by git's sha1, sha256 or xet's own; the shared ones in folders by their first digits."""

_TOOLS = ("__pycache__",)
"""Folders of tools that begin with no dot."""


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


class Listed(NamedTuple):
    """A regular file of a folder.

    name   path below the folder, POSIX
    means  path of the file that is read, where `name` is a link to it; a blob of the Hub's cache counts as `name`
    """

    name: str
    means: str


class _Place(NamedTuple):
    """Where a file is, links resolved: the handle of its folder, its name there, and its path below the tree; None
    where it is a blob of the Hub's cache."""

    folder: int
    name: str
    parts: tuple[str, ...] | None
    status: os.stat_result


def is_hidden(name: str) -> bool:
    """Whether a path leads through a file or folder of a tool: `.git`, `.cache`, `.env`. Secrets lie in such, and no
    loader reads one."""
    return any(part.startswith(".") or part in _TOOLS for part in name.split("/"))


def wrong_name(name: object) -> str | None:
    """What is wrong with a path that a stranger gives for a file of a folder; None where nothing is."""
    if not isinstance(name, str) or not name:
        return "is no name of a file"
    if not name.isprintable():  # NUL and halves of surrogate pairs are not
        return "has control characters in its name"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "is no path below the folder"
    if any(len(part.encode()) > LONGEST_NAME for part in parts) or len(name.encode()) > _LONGEST_PATH:
        return "has too long a name"
    return None


class Tree:
    """A folder, and every file below it. Names are POSIX paths below it. Thread-safe; holds nothing open.

    path  the folder, for messages

    Raises, in every method: UsageError for a link where there may be none; DamagedError for a name that can be no
    file's, and for what is no regular file. OSError with the whole path, as the system says.
    """

    def __init__(self, path: Path, below: tuple[str, ...] = ()) -> None:
        self.path = path.joinpath(*below)
        self._root = path
        self._below = below

    def __repr__(self) -> str:
        return f"Tree({str(self.path)!r})"

    def below(self, name: str) -> Tree:
        """A folder of this one, which may not exist yet."""
        return Tree(self._root, (*self._below, *_parts(self.path, name)))

    # Reading

    def open(self, name: str, known: Identity | None = None) -> int:
        """A descriptor to read a file.

        Args:
            known: which file it has to be. A name that leads elsewhere for a moment, also through a folder above that
                was exchanged, is noticed here, and nowhere else once it leads back.

        Raises:
            DamagedError: it is another file.
        """
        with self._named(name), self._found(name) as place:
            _check_regular(place.status, self.path / name)
            fd = os.open(place.name, os.O_RDONLY | _NO_LINK, dir_fd=place.folder)
            try:
                status = os.fstat(fd)
                _check_regular(status, self.path / name)
                if known is not None:
                    check_same(self.path / name, known, _identity(status))
            except BaseException:
                os.close(fd)
                raise
            return fd

    def read(self, name: str, limit: int) -> bytes:
        """A file's content.

        Raises:
            DamagedError: it has more than `limit` bytes.
        """
        fd = self.open(name)
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_size > limit or len(data := file.read(limit + 1)) > limit:
                raise DamagedError(f"{self.path / name}: is too large for what it is (more than {limit >> 20} MiB)")
        return data

    def identity(self, name: str) -> Identity:
        """Of the file that `open` would open."""
        with self._named(name), self._found(name) as place:
            _check_regular(place.status, self.path / name)
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
        pending = deque([""])
        while pending:
            folder = pending.popleft()
            place = self.below(folder) if folder else self
            with place._opened() as fd, os.scandir(fd) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if hidden or not is_hidden(entry.name):
                            _check_shown(self.path / name)
                            pending.append(name)
                        continue
                    if not (entry.is_symlink() or entry.is_file(follow_symlinks=False)):
                        continue
                    _check_shown(self.path / name)
                    found.append(Listed(name, self._means(name) if entry.is_symlink() else name))
                    if not entry.is_symlink() and not os.access(entry.name, os.R_OK, dir_fd=fd, effective_ids=True):
                        raise PermissionError(13, "Permission denied", str(self.path / name))
                    if len(found) > _MAX_FILES:
                        raise UsageError(f"{self.path}: holds more than {_MAX_FILES} files; is it a model folder?")
        return sorted(found)

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

    def write(self, name: str, content: bytes) -> None:
        """Make a file of this content, flushed to the disk."""
        fd = self.create(name)
        with self._named(name):
            try:
                _write_all(fd, content)
                os.fsync(fd)
            finally:
                os.close(fd)

    def copy_from(self, other: Tree, name: str, new: str | None = None, known: Identity | None = None) -> None:
        """Copy a file of another tree, content only: the mode follows the umask, and a link becomes a file.

        Args:
            known: as `open`.
        """
        source = other.open(name, known)
        try:
            fd = self.create(new or name)
            with self._named(new or name):
                try:
                    while data := os.read(source, _COPY_BYTES):
                        _write_all(fd, data)
                finally:
                    os.close(fd)
        finally:
            os.close(source)

    def update(self, name: str, flags: int) -> int:
        """A descriptor to change a file in place, a lock or a journal.

        Args:
            flags: of `os.open`, with the access; `O_CREAT` makes it where it is not there.
        """
        with self._named(name), self._folder_of(name) as (folder, last):
            status = _lstat(last, folder)
            if status is not None:
                _check_no_link(status, self.path / name)
                _check_regular(status, self.path / name)
                if status.st_nlink > 1:
                    raise UsageError(f"{self.path / name}: has a second name elsewhere; remove it")
            fd = os.open(last, flags | _NO_LINK, 0o666, dir_fd=folder)
            try:
                _check_regular(os.fstat(fd), self.path / name)
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
            _check_no_link(status, self.path / name)
            _check_regular(status, self.path / name)
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
        """Remove a folder with all that lies in it; of a link, the link. Nothing where nothing is."""
        with suppress(FileNotFoundError), self._named(name), self._folder_of(name) as (folder, last):
            status = os.stat(last, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(last, dir_fd=folder)
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

    # The way

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Errors of the system name the whole path."""
        try:
            yield
        except OSError as error:
            error.filename, error.filename2 = str(self.path / name), None
            raise

    @contextmanager
    def _walked(self, parts: Sequence[str], make: bool = False) -> Iterator[int]:
        """A handle on a folder below the root, reached through no link."""
        fd = os.open(self._root, _SEARCH)
        try:
            for i, part in enumerate(parts):
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=fd)
                try:
                    inner = os.open(part, _SEARCH | os.O_NOFOLLOW, dir_fd=fd)
                except NotADirectoryError:
                    path = self._root.joinpath(*parts[: i + 1])
                    _check_no_link(os.stat(part, dir_fd=fd, follow_symlinks=False), path)
                    raise UsageError(f"{path}: is no folder; remove it") from None
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _folder_of(self, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """A handle on the folder that holds a name, and the name there."""
        *folders, last = _parts(self.path, name)
        with self._walked((*self._below, *folders), make) as fd:
            yield fd, last

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """A handle on this folder that can be listed."""
        with self._named(""), self._walked(self._below) as search:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=search)
        try:
            yield fd
        finally:
            os.close(fd)

    def _status(self, name: str) -> os.stat_result | None:
        try:
            with self._named(name), self._folder_of(name) as (folder, last):
                return _lstat(last, folder)
        except FileNotFoundError:
            return None

    @contextmanager
    def _found(self, name: str) -> Iterator[_Place]:
        """Where a file that is read is, after links that may be followed."""
        link = self.path / name
        root, parts, is_ours = self, (*self._below, *_parts(self.path, name)), True
        for hop in range(_MAX_HOPS):
            try:
                with root._walked(parts[:-1]) as folder:
                    status = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
                    if not stat.S_ISLNK(status.st_mode):
                        if hop and stat.S_ISDIR(status.st_mode):
                            raise UsageError(f"{link}: is a link to a folder; copy the folder in instead")
                        yield _Place(folder, parts[-1], parts if is_ours else None, status)
                        return
                    target = os.readlink(parts[-1], dir_fd=folder)
            except FileNotFoundError:
                if hop:
                    raise _leads_nowhere(link) from None
                raise
            root, parts, ours = _led(root, parts, target, link)
            is_ours = is_ours and ours
            if is_ours and is_hidden("/".join(parts[len(self._below) :])):
                raise UsageError(
                    f"{link}: is a link to {'/'.join(parts)}, which is not copied; copy the file in instead"
                )
        raise _leads_nowhere(link)

    def _means(self, name: str) -> str:
        """The path of the file that a link leads to; its own where that is a blob of the Hub's cache."""
        with self._named(name), self._found(name) as place:
            _check_regular(place.status, self.path / name)
            if not os.access(place.name, os.R_OK, dir_fd=place.folder, effective_ids=True):
                raise PermissionError(13, "Permission denied", str(self.path / name))
            return name if place.parts is None else "/".join(place.parts[len(self._below) :])


def check_same(path: Path, before: Identity, now: Identity) -> None:
    """Raises DamagedError if a file is no longer the one that it was."""
    if before != now:
        raise DamagedError(f"{path} changed while it was being read ({before.difference(now)}); start again")


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _led(tree: Tree, parts: tuple[str, ...], target: str, link: Path) -> tuple[Tree, tuple[str, ...], bool]:
    """Where a link leads: (tree, path below its root, whether that is the root it lies in).

    Raises:
        UsageError: out of the folder, and not to a blob of the Hub's cache.
    """
    root = Path(os.path.realpath(tree._root))
    # No folder on the way is a link, or the walk will say so: so the path may be shortened as text.
    path = Path(os.path.normpath(root.joinpath(*parts[:-1], target)))
    if target.startswith("/"):
        path = Path(os.path.realpath(path.parent)) / path.name
    if path.is_relative_to(root) and path != root:
        return tree, path.relative_to(root).parts, True
    if path.is_relative_to(root) or root.is_relative_to(path):
        raise UsageError(f"{link}: is a link to a folder; copy the folder in instead")
    blobs = next((folder for folder in _blobs(root) if path.is_relative_to(folder)), None)
    if blobs is not None and _BLOB.fullmatch(path.relative_to(blobs).as_posix()):
        return Tree(blobs), path.relative_to(blobs).parts, False
    raise UsageError(f"{link}: is a link out of the folder; copy the file in instead")


def _blobs(root: Path) -> list[Path]:
    """Where links of the Hub's cache lead: from `snapshots/COMMIT` to the repository's `blobs`, and since
    huggingface_hub 2 from there to the `blobs` that all repositories share."""
    if root.parent.name == "snapshots":
        return [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    return [root.parents[1] / "blobs"] if root.name == "blobs" else []


def _leads_nowhere(link: Path) -> UsageError:
    return UsageError(f"{link}: is a link that leads nowhere; copy the file in instead")


def _parts(folder: Path, name: str) -> tuple[str, ...]:
    wrong = wrong_name(name)
    if wrong is not None:
        raise DamagedError(f"{folder}: {shown(name)} {wrong}")
    return tuple(name.split("/"))


def _lstat(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _check_shown(path: Path) -> None:
    if not path.name.isprintable():
        raise UsageError(f"{path}: has control characters in its name; rename it")


def _check_no_link(status: os.stat_result, path: Path) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise UsageError(f"{path}: is a link; remove it")


def _check_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISLNK, "link"))
    kind = next((word for is_kind, word in kinds if is_kind(status.st_mode)), "device")
    raise DamagedError(f"{path}: is a {kind}, not a file")


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
