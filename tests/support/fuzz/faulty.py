"""Operating system calls that fail when told to: every way in which a conversion changes a disk, counted.

`Faults(at, error)` fails the at-th operation with an OSError, and lets the others pass: a disk that is full for a
moment, a bad block. `Faults(at, dead=True)` fails the at-th and every later one with `Dead`: a power cut, a kill -9,
at exactly that point. `Faults()` only counts.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

CHANGES = (
    "mkdir",
    "replace",
    "rename",
    "unlink",
    "remove",
    "rmdir",
    "link",
    "symlink",
    "truncate",
    "ftruncate",
    "posix_fallocate",
    "write",
    "writev",
    "pwrite",
    "pwritev",
    "fsync",
    "fdatasync",
    "sendfile",
    "copy_file_range",
)
"""Functions of `os` that change a file system, whether conversions use them today or not."""

READS = ("pread", "preadv")


class Dead(BaseException):
    """The process is gone. Not an Exception: nothing may catch it and go on."""


class Faults:
    """See the module."""

    def __init__(self, at: int = 0, error: int = 0, dead: bool = False, calls: tuple[str, ...] = CHANGES) -> None:
        self.count = 0
        self.failed: list[str] = []
        self._at, self._error, self._dead = at, error, dead
        self._calls = calls
        self._lock = threading.Lock()

    def _step(self, name: str) -> None:
        with self._lock:
            self.count += 1
            count = self.count
        if self._dead and count >= self._at > 0:
            self.failed.append(name)
            raise Dead(name)
        if count == self._at:
            self.failed.append(name)
            raise OSError(self._error, os.strerror(self._error), name)

    @contextlib.contextmanager
    def injected(self) -> Iterator[Faults]:
        """Replace the calls while the block runs."""
        saved: list[tuple[Any, str, Any]] = []

        def patch(where: Any, name: str, function: Any) -> None:
            saved.append((where, name, getattr(where, name)))
            setattr(where, name, function)

        for name in self._calls:
            patch(os, name, self._counting(name, getattr(os, name)))
        if self._calls == CHANGES:
            patch(io, "open", self._opening(io.open))
            patch(builtins, "open", self._opening(builtins.open))
        try:
            yield self
        finally:
            for where, name, function in saved:
                setattr(where, name, function)

    def _counting(self, name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self._step(name)
            return function(*arguments, **options)

        return call

    def _opening(self, function: Any) -> Any:
        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return function(file, mode, *arguments, **options)
            self._step(f"open {file} {mode}")
            return _File(function(file, mode, *arguments, **options), self)

        return call


class _File:
    """A file open for writing."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, data: Any) -> Any:
        self._faults._step(f"write {getattr(self._file, 'name', '')}")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        return self._file.__exit__(kind, error, trace)
