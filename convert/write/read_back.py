"""Reading what has just been written: shards that are still being made, as far as they have come.

What flows: a slice is read out of the page cache, where its bytes still are. Pages of tensors that nobody will read
again are given back, some hundred megabytes later, for by then they are on the disk: what is written next finds pages
that are warm, and what other programs have in memory stays there.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np

from xpuquant.conversion.open_files import OpenFiles
from xpuquant.conversion.sources.shard_reader import read_box, unreadable
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write.arrivals import Arrivals
from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array, Slice, as_array
from xpuquant.formats.safetensors import Tensor

_SOON_BYTES, _KEPT_BYTES = 64 << 20, 512 << 20
"""Of what has been read and is not wanted any more: how far behind it pages are given back, and, those that were not
on the disk by then, once more."""


class _Behind:
    """Tensors in a queue, and how many bytes they are."""

    def __init__(self) -> None:
        self._tensors: deque[Tensor] = deque()
        self._nbytes = 0

    def add(self, tensor: Tensor) -> None:
        self._tensors.append(tensor)
        self._nbytes += tensor.nbytes

    def beyond(self, nbytes: int) -> Iterator[Tensor]:
        """The oldest, as long as more bytes than so many are there; they leave."""
        while self._nbytes > nbytes:
            oldest = self._tensors.popleft()
            self._nbytes -= oldest.nbytes
            yield oldest


class ReadBack:
    """The shards of a folder that are being written. Thread-safe; a read waits for what has not been written yet.

    Which file a shard is, its first read says; the staging folder says so when it is complete. Where another program
    exchanged it meanwhile, what was compared is not what lies there: see `check_unchanged`.
    """

    def __init__(self, tree: Tree, arrivals: Arrivals) -> None:
        self._tree = tree
        self._arrivals = arrivals
        self._inodes: dict[str, int] = {}
        self._files = OpenFiles(partial(_opened, tree, self._inodes))
        self._lock = threading.Lock()
        self._done, self._given = _Behind(), _Behind()

    def read(self, box: Slice) -> Array:
        """A slice as an array of its dtype and shape.

        Raises:
            DamagedError: the shard ends before, or is another file. EnvironmentFault: unreadable. Stopped: it will not
                be written.
        """
        shard = box.tensor.file
        offset, length, pitch, count = box.lines()
        self._arrivals.wait(shard, offset + (count - 1) * pitch + length if count else offset)
        out = np.empty(box.nbytes, np.uint8)
        read_box(self._files, self._tree, box, out)
        return as_array(box, out)

    def done_with(self, tensors: Iterable[Tensor]) -> None:
        """These have been read: their pages, and those of what was read before, need not be kept for long."""
        with self._lock:
            for tensor in tensors:
                self._done.add(tensor)
            for tensor in self._done.beyond(_SOON_BYTES):
                self._give_back(tensor)
                self._given.add(tensor)
            for tensor in self._given.beyond(_KEPT_BYTES):
                self._give_back(tensor)

    def check_unchanged(self) -> None:
        """Raises DamagedError where a shard is no longer the file that was read."""
        for shard, inode in self._inodes.items():
            try:
                now = self._tree.identity(shard)
            except OSError as error:
                raise unreadable(self._tree, shard, error) from error
            _check_same(self._tree, shard, inode, now.inode)

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def _give_back(self, tensor: Tensor) -> None:
        """A hint: what is not on the disk yet stays."""
        fd = self._files.acquire_if_open(tensor.file)
        if fd is not None:
            try:
                with suppress(OSError, AttributeError):  # a file system, or a system, that knows no such hint
                    os.posix_fadvise(fd, tensor.begin, tensor.nbytes, os.POSIX_FADV_DONTNEED)
            finally:
                self._files.release(tensor.file)


def _opened(tree: Tree, inodes: dict[str, int], shard: str) -> int:
    """A descriptor of a shard that is the file it was when it was first read."""
    fd = tree.update(shard, os.O_RDONLY)
    try:
        inode = os.fstat(fd).st_ino
        _check_same(tree, shard, inodes.setdefault(shard, inode), inode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_same(tree: Tree, shard: str, before: int, now: int) -> None:
    if before != now:
        raise DamagedError(
            f"{tree.path / shard} was exchanged while it was being made: another program writes into this folder; "
            "convert again"
        )
