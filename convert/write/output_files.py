"""The file of one shard, written from front to back: through the page cache, or past it.

Through it (`CachedFile`) where the shard is read again at once. The kernel is told to begin writing pages out as they
come, so that the flush before publishing finds little left.

Past it (`DirectFile`, O_DIRECT) where it is not: no page has to be found, filled and thrown away again, and what other
programs have in memory stays there. Blocks are filled by the caller while a thread writes the ones before; three
blocks are all the memory. File systems that do not know O_DIRECT get plain writes of the same blocks.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import queue
import threading
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Protocol

import numpy as np

from xpuquant.conversion.tree import Tree
from xpuquant.formats.checkpoint import Array

_WRITE_BYTES = 512 << 10
"""Handed to the page cache at once. It makes folios as large as the write; where memory is full of cached files, it
moves pages about to make larger ones, but not where those of before are given back."""

_FLUSH_BYTES = 16 << 20
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h

_BLOCK_BYTES = 4 << 20
_BLOCKS = 3
_ALIGNMENT = 4096
"""What O_DIRECT asks of offsets, lengths and memory, at most, of every disk in use."""


class OutputFile(Protocol):
    """A file of a size known beforehand, closed by `with`. Any call may raise OSError for what was appended before."""

    def __enter__(self) -> OutputFile: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def handed(self) -> int:
        """Bytes from the front that the system has: they survive the end of this process."""
        ...

    def append(self, data: Array) -> None:
        """Write `data` (flat uint8) at the end. The caller may change it after the call."""
        ...


def create(tree: Tree, name: str, nbytes: int, read_again: bool, begin: int = 0) -> OutputFile:
    """Make a file, in place of what is there.

    Args:
        nbytes: its size.
        read_again: whether it is read soon, by this machine.
        begin: bytes of what is there that are kept: what is appended comes after them.

    Raises:
        OSError. UsageError, DamagedError: nothing can be kept of it, it is a link or no file.
    """
    direct = getattr(os, "O_DIRECT", None)
    if read_again or direct is None:
        return CachedFile(tree, name, nbytes, begin)
    return DirectFile(tree, name, nbytes, direct, begin)


class CachedFile:
    """Writes through the page cache."""

    def __init__(self, tree: Tree, name: str, nbytes: int, begin: int = 0) -> None:
        self._fd = _open(tree, name, nbytes, begin)
        self._end = self._flushed = begin

    @property
    def handed(self) -> int:
        return self._end

    def __enter__(self) -> CachedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def append(self, data: Array) -> None:
        for start in range(0, data.size, _WRITE_BYTES):
            _write(self._fd, data[start : start + _WRITE_BYTES].data, self._end + start)
        self._end += data.size
        if self._end - self._flushed >= _FLUSH_BYTES:
            _begin_flush(self._fd, self._flushed, self._end - self._flushed)
            self._flushed = self._end


class DirectFile:
    """Writes past the page cache, in a thread of its own."""

    def __init__(self, tree: Tree, name: str, nbytes: int, flag: int, begin: int = 0) -> None:
        before = _last_unit(tree, name, begin)
        try:
            self._fd = _open(tree, name, nbytes, begin, flag)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = _open(tree, name, nbytes, begin)
        self._flag = flag
        self._nbytes = nbytes
        self._begin = begin - len(before)  # of the block that is being filled, in the file
        self._filled = 0  # bytes of it
        self._handed = begin
        self._fault: BaseException | None = None
        self._free: queue.SimpleQueue[Array] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[Array, int, int] | None] = queue.SimpleQueue()
        for _ in range(_BLOCKS):
            # A mapping begins on a page.
            self._free.put(np.frombuffer(mmap.mmap(-1, _BLOCK_BYTES), np.uint8))
        self._block = self._free.get()
        self._writer = threading.Thread(target=self._write_blocks, name="direct", daemon=True)
        self._writer.start()
        self.append(np.frombuffer(before, np.uint8))

    @property
    def handed(self) -> int:
        return self._handed

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                # The last block goes as whole units, and the file is cut to size again.
                self._full.put((self._block, -(-self._filled // _ALIGNMENT) * _ALIGNMENT, self._begin))
            self._full.put(None)
            self._writer.join()
            if kind is None:
                self._check()
                os.ftruncate(self._fd, self._nbytes)
        finally:
            os.close(self._fd)

    def append(self, data: Array) -> None:
        while data.size:
            part = data[: _BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + part.size] = part
            self._filled += part.size
            data = data[part.size :]
            if self._filled == _BLOCK_BYTES:
                self._full.put((self._block, _BLOCK_BYTES, self._begin))
                self._begin += _BLOCK_BYTES
                self._filled = 0
                self._block = self._free.get()
                self._check()

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _write_blocks(self) -> None:
        while (block := self._full.get()) is not None:
            data, nbytes, offset = block
            try:
                if self._fault is None:
                    self._write_block(data[:nbytes], offset)
                    self._handed = offset + nbytes
            except BaseException as error:  # raised by the caller, who would otherwise wait for the block
                self._fault = error
            self._free.put(data)

    def _write_block(self, data: Array, offset: int) -> None:
        try:
            _write(self._fd, data.data, offset)
        except OSError as error:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & self._flag:
                raise
            # Opened with O_DIRECT, but not written so: another unit, or a file system that does not check at once.
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~self._flag)
            _write(self._fd, data.data, offset)


def _open(tree: Tree, name: str, nbytes: int, begin: int, flag: int = 0) -> int:
    fd = tree.update(name, os.O_RDWR | flag) if begin else tree.create(name, flag)
    try:
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _last_unit(tree: Tree, name: str, begin: int) -> bytes:
    """The bytes before `begin` that are written again with those that follow, in one unit of the disk."""
    nbytes = begin % _ALIGNMENT
    if not nbytes:
        return b""
    with os.fdopen(tree.open(name), "rb") as file:
        file.seek(begin - nbytes)
        return file.read(nbytes)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """Linux's call, or None where there is none."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def _begin_flush(fd: int, offset: int, nbytes: int) -> None:
    """Let the system begin to write these bytes out. A hint: errors show at the flush that waits."""
    if (function := _sync_file_range()) is not None:
        function(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)
