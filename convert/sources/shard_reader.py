"""Reading the safetensors shards of a folder: headers first, then slices, from any thread."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from xpuquant.errors import DamagedError, EnvironmentFault
from xpuquant.formats.checkpoint import Array, Slice, as_array, whole
from xpuquant.formats.safetensors import PREFIX_BYTES, Tensor, header_length, parse_header

_MAX_OPEN_SHARDS = 256
_MAX_PEEK_BYTES = 1 << 28


class ShardReader:
    """The shards of one folder. They are read by position, never mapped: a file that is cut short while it is read
    is an error here, not a SIGBUS."""

    def __init__(self, folder: Path, shards: Iterable[str]) -> None:
        self._paths = {shard: folder / shard for shard in shards}
        self._stats = {shard: self._stat(shard) for shard in self._paths}
        self._open: dict[str, int] = {}
        # Descriptors are numbers: nobody closes them for us.
        weakref.finalize(self, _close_all, self._open)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(stat[0] for stat in self._stats.values())

    def header(self, shard: str) -> dict[str, Tensor]:
        """Name → tensor of one shard.

        Raises:
            DamagedError: not a sound safetensors file. EnvironmentFault: unreadable.
        """
        size = self._stats[shard][0]
        try:
            with self._paths[shard].open("rb") as file:
                length = header_length(file.read(PREFIX_BYTES), shard, size)
                header = file.read(length)
        except OSError as error:
            raise EnvironmentFault(f"{self._paths[shard]}: cannot be read ({error.strerror})") from error
        return parse_header(header, shard, size)

    def read(self, box: Slice) -> Array:
        """A slice as an array of its dtype and shape."""
        out = np.empty(box.nbytes, np.uint8)
        self.read_into(box, out)
        return as_array(box, out)

    def read_into(self, box: Slice, out: Array) -> None:
        """Fill `out` (flat uint8, `box.nbytes` long) with the bytes of a slice.

        Raises:
            DamagedError: the shard ends before. EnvironmentFault: unreadable.
        """
        shard = box.tensor.file
        fd, keep = self._descriptor(shard)
        try:
            position = 0
            view = out.data
            for offset, length in box.runs():
                end = position + length
                while position < end:
                    got = _read_at(fd, view[position:end], offset)
                    if got == 0:
                        raise DamagedError(f"{shard}: is truncated inside '{box.tensor.name}'; download it again")
                    position += got
                    offset += got
        except OSError as error:
            raise EnvironmentFault(f"{self._paths[shard]}: cannot be read ({error.strerror})") from error
        finally:
            if not keep:
                os.close(fd)

    def peek(self, tensor: Tensor) -> Array | None:
        """A small tensor; None for one that is not."""
        return self.read(whole(tensor)) if tensor.nbytes <= _MAX_PEEK_BYTES else None

    def fingerprint(self) -> str:
        """Identifies the files by name, size and time of change."""
        digest = hashlib.sha256()
        for shard, (size, changed, *_) in self._stats.items():
            digest.update(f"{shard} {size} {changed}\n".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises DamagedError if a shard is no longer the file that was opened."""
        for shard, stat in self._stats.items():
            if self._stat(shard) != stat:
                raise DamagedError(f"{self._paths[shard]} changed while it was being read; start again")

    def close(self) -> None:
        """Close every descriptor."""
        with self._lock:
            _close_all(self._open)

    def _stat(self, shard: str) -> tuple[int, int, int, int]:
        """Size, time of the last change, and what tells a change whose time was set back: that of the inode, and the
        inode itself."""
        try:
            stat = self._paths[shard].stat()
        except OSError as error:
            raise EnvironmentFault(f"{self._paths[shard]}: cannot be read ({error.strerror})") from error
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino

    def _descriptor(self, shard: str) -> tuple[int, bool]:
        """An open descriptor, and whether it stays open (repos of thousands of shards reopen)."""
        with self._lock:
            if shard in self._open:
                return self._open[shard], True
            try:
                fd = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise EnvironmentFault(f"{self._paths[shard]}: cannot be read ({error.strerror})") from error
            if len(self._open) < _MAX_OPEN_SHARDS:
                self._open[shard] = fd
                return fd, True
            return fd, False


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _read_at(fd: int, out: memoryview, offset: int) -> int:
    """Fill `out` from a place in the file, as far as one call goes; bytes read. Without preadv: by a copy."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], offset)
    data = os.pread(fd, len(out), offset)
    out[: len(data)] = data
    return len(data)
