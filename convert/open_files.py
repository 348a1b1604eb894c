"""Files of a folder that are read from any thread: those that were read last stay open.

A repo may have thousands of shards, and a process a thousand descriptors. Tensors are read nearly in the order of their
files, so a few open files are nearly always the right ones.
"""

from __future__ import annotations

import os
import resource
import threading
import weakref
from collections.abc import Callable

_MAX_KEPT = 256
_OTHER_DESCRIPTORS = 16
"""What a process has open besides: its streams, locks, outputs, the modules it imports."""


def most_kept() -> int:
    """Files that are kept open: a source and its output together may take half of what the process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MAX_KEPT
    return max(0, min(_MAX_KEPT, (limit - _OTHER_DESCRIPTORS) // 4))


class _File:
    """A descriptor, and how many are reading."""

    __slots__ = ("fd", "readers")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.readers = 0


class OpenFiles:
    """Descriptors by name. Thread-safe."""

    def __init__(self, opened: Callable[[str], int]) -> None:
        """
        Args:
            opened: opens a file, whenever it is read and not open; may refuse it.
        """
        self._opened = opened
        self._most = most_kept()
        self._files: dict[str, _File] = {}  # who was asked for last is last
        self._lock = threading.Lock()
        # Descriptors are numbers: nobody closes them for us.
        weakref.finalize(self, _close_all, self._files)

    def acquire(self, name: str) -> int:
        """A descriptor, good until it is released. Raises what `opened` does."""
        with self._lock:
            file = self._files.pop(name, None) or _File(self._opened(name))
            file.readers += 1
            self._files[name] = file
            self._close_beyond()
            return file.fd

    def acquire_if_open(self, name: str) -> int | None:
        """The same of a file that is open; None of another."""
        with self._lock:
            file = self._files.get(name)
            if file is None:
                return None
            file.readers += 1
            return file.fd

    def release(self, name: str) -> None:
        """One who acquired it reads it no more."""
        with self._lock:
            self._files[name].readers -= 1
            self._close_beyond()

    def close(self) -> None:
        """Close every file; those that are being read, when they are released."""
        with self._lock:
            self._most = 0
            self._close_beyond()

    def _close_beyond(self) -> None:
        """Close who was asked for longest ago, where there are too many."""
        beyond = len(self._files) - self._most
        if beyond > 0:
            for name in [name for name, file in self._files.items() if not file.readers][:beyond]:
                os.close(self._files.pop(name).fd)


def _close_all(files: dict[str, _File]) -> None:
    while files:
        os.close(files.popitem()[1].fd)
