"""The way to a file of strangers: from a handle on a folder, one component after the other. `tree.py` opens nothing
but what is found here.

The folder itself is the user's word and may be a link. What lies below it came with a download, a clone or an archive,
and anybody may have made it: so no folder on the way may be a link, and a file may be one only where it is read, and
leads to a file of the same folder that could be copied under its own name, or, in the Hub's cache, to the blob that the
cache means.

Handles (`dir_fd`) are of POSIX, as are the locks of the staging folder: this package runs nowhere else.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from xpuquant.errors import DamagedError, UsageError, shown

LONGEST_NAME = 255
"""Bytes of a file's name on the file systems in use (`NAME_MAX`)."""

_LONGEST_PATH = 2048
_MAX_HOPS = 8
"""Links that lead to links. The Hub's cache needs two."""

_SEARCH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_BLOB = re.compile(r"([0-9a-f]{2}/)?([0-9a-f]{40}|[0-9a-f]{64})")
"""Blobs in the Hub's cache, by git's sha1, sha256 or xet's own; the shared ones in folders by their first digits."""

_TOOLS = ("__pycache__",)
"""Folders of tools that begin with no dot."""


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


class Walk:
    """A folder, and the ways below it. Names are POSIX paths below it. Thread-safe; holds nothing open.

    path  the folder, for messages

    Raises, in every method: as `Tree`.
    """

    def __init__(self, path: Path, below: tuple[str, ...] = ()) -> None:
        self.path = path.joinpath(*below)
        self._root = path
        self._below = below

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

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
                    check_no_link(os.stat(part, dir_fd=fd, follow_symlinks=False), path)
                    raise UsageError(f"{path}: is no folder; remove it") from None
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _folder_of(self, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """A handle on the folder that holds a name, and the name there."""
        *folders, last = parts_of(self.path, name)
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
                return lstat(last, folder)
        except FileNotFoundError:
            return None

    @contextmanager
    def _found(self, name: str) -> Iterator[_Place]:
        """Where a file that is read is, after links that may be followed."""
        link = self.path / name
        root: Walk = self
        parts, is_ours = (*self._below, *parts_of(self.path, name)), True
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
            if is_ours and parts[: len(self._below)] != self._below:
                raise UsageError(f"{link}: is a link out of the folder; copy the file in instead")
            if is_ours and is_hidden("/".join(parts[len(self._below) :])):
                raise UsageError(
                    f"{link}: is a link to {'/'.join(parts)}, which is not copied; copy the file in instead"
                )
        raise _leads_nowhere(link)

    def _means(self, name: str) -> str:
        """The path of the file that a link leads to; its own where that is a blob of the Hub's cache."""
        with self._named(name), self._found(name) as place:
            check_regular(place.status, self.path / name)
            if not os.access(place.name, os.R_OK, dir_fd=place.folder, effective_ids=True):
                raise PermissionError(13, "Permission denied", str(self.path / name))
            return name if place.parts is None else "/".join(place.parts[len(self._below) :])


def _led(walk: Walk, parts: tuple[str, ...], target: str, link: Path) -> tuple[Walk, tuple[str, ...], bool]:
    """Where a link leads: (folder, path below its root, whether that is the root it lies in).

    Raises:
        UsageError: out of the folder, and not to a blob of the Hub's cache.
    """
    root = Path(os.path.realpath(walk._root))
    # No folder on the way is a link, or the walk will say so: so the path may be shortened as text.
    path = Path(os.path.normpath(root.joinpath(*parts[:-1], target)))
    if target.startswith("/"):
        path = Path(os.path.realpath(path.parent)) / path.name
    if path.is_relative_to(root) and path != root:
        return walk, path.relative_to(root).parts, True
    if path.is_relative_to(root) or root.is_relative_to(path):
        raise UsageError(f"{link}: is a link to a folder; copy the folder in instead")
    blobs = next((folder for folder in _blobs(root) if path.is_relative_to(folder)), None)
    if blobs is not None and _BLOB.fullmatch(path.relative_to(blobs).as_posix()):
        return Walk(blobs), path.relative_to(blobs).parts, False
    raise UsageError(f"{link}: is a link out of the folder; copy the file in instead")


def _blobs(root: Path) -> list[Path]:
    """Where links of the Hub's cache lead: from `snapshots/COMMIT` to the repository's `blobs`, and since
    huggingface_hub 2 from there to the `blobs` that all repositories share."""
    if root.parent.name == "snapshots":
        return [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    return [root.parents[1] / "blobs"] if root.name == "blobs" else []


def _leads_nowhere(link: Path) -> UsageError:
    return UsageError(f"{link}: is a link that leads nowhere; copy the file in instead")


def parts_of(folder: Path, name: str) -> tuple[str, ...]:
    """A path below a folder, cut. Raises DamagedError for a name that can be no file's."""
    wrong = wrong_name(name)
    if wrong is not None:
        raise DamagedError(f"{folder}: {shown(name)} {wrong}")
    return tuple(name.split("/"))


def lstat(name: str, folder: int) -> os.stat_result | None:
    """What lies in a folder, given by its handle, under a name; of a link, the link. None where nothing does."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def check_no_link(status: os.stat_result, path: Path) -> None:
    """Raises UsageError for a link."""
    if stat.S_ISLNK(status.st_mode):
        raise UsageError(f"{path}: is a link; remove it")


def check_sole(status: os.stat_result, path: Path) -> None:
    """Raises UsageError for a file that has a second name: a hard link, which may be of anybody's file."""
    if status.st_nlink > 1:
        raise UsageError(f"{path}: has a second name elsewhere (a hard link); put a copy in its place, or remove it")


def check_regular(status: os.stat_result, path: Path) -> None:
    """Raises DamagedError for all that is no regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"{path}: {not_a_file(status)}")


def not_a_file(status: os.stat_result) -> str:
    """What lies where a regular file should, in words."""
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISLNK, "link"))
    kind = next((word for is_kind, word in kinds if is_kind(status.st_mode)), "device")
    return f"is a {kind}, not a file"
