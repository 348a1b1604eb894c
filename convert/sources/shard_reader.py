"""Reading the safetensors shards of a folder: headers first, then slices, from any thread."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from xpuquant.conversion.open_files import OpenFiles
from xpuquant.conversion.tree import Identity, Tree, check_same
from xpuquant.errors import DamagedError, EnvironmentFault
from xpuquant.formats.checkpoint import Array, Slice, as_array, whole
from xpuquant.formats.safetensors import PREFIX_BYTES, Tensor, header_length, parse_header

_MAX_PEEK_BYTES = 1 << 28


class ShardReader:
    """The shards of one folder. They are read by position, never mapped: a file that is cut short while it is read
    is an error here, not a SIGBUS.

    identities  shard → which file it was when it was first looked at
    """

    def __init__(self, tree: Tree, shards: Iterable[str]) -> None:
        self._tree = tree
        self.identities = {shard: self._identity(shard) for shard in shards}
        self._files = OpenFiles(partial(_opened, tree, self.identities))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(identity.size for identity in self.identities.values())

    def header(self, shard: str) -> dict[str, Tensor]:
        """Name → tensor of one shard.

        Raises:
            DamagedError: not a sound safetensors file. EnvironmentFault: unreadable.
        """
        size = self.identities[shard].size
        try:
            with os.fdopen(self._tree.open(shard, self.identities[shard]), "rb") as file:
                length = header_length(file.read(PREFIX_BYTES), shard, size)
                header = file.read(length)
        except OSError as error:
            raise unreadable(self._tree, shard, error) from error
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
        read_box(self._files, self._tree, box, out)

    def peek(self, tensor: Tensor) -> Array | None:
        """A small tensor; None for one that is not."""
        return self.read(whole(tensor)) if tensor.nbytes <= _MAX_PEEK_BYTES else None

    def fingerprint(self) -> str:
        """Identifies the files by name, size and time of change."""
        digest = hashlib.sha256()
        for shard, identity in self.identities.items():
            digest.update(f"{shard} {identity.size} {identity.mtime_ns}\n".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises DamagedError if a shard is no longer the file that was opened."""
        for shard, identity in self.identities.items():
            check_same(self._tree.path / shard, identity, self._identity(shard))

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def _identity(self, shard: str) -> Identity:
        try:
            return self._tree.identity(shard)
        except OSError as error:
            raise unreadable(self._tree, shard, error) from error


def _opened(tree: Tree, identities: Mapping[str, Identity], shard: str) -> int:
    """A descriptor of a shard that is the file it was."""
    return tree.open(shard, identities[shard])


def unreadable(tree: Tree, shard: str, error: OSError) -> EnvironmentFault:
    """What the system said of a shard, for people."""
    return EnvironmentFault(f"{tree.path / shard}: cannot be read ({error.strerror})")


def _copied_from(fd: int, into: tuple[memoryview], offset: int) -> int:
    (out,) = into
    data = os.pread(fd, len(out), offset)
    out[: len(data)] = data
    return len(data)


_PITCH_READ_THROUGH = 1 << 14
"""Bytes from one run to the next below which what lies between is read with them: a call of its own takes the time of
two to three such distances out of the page cache, and the disk reads whole pages."""

_READ_THROUGH_BYTES = 1 << 19
"""Read at once then: it stays in the second-level cache until the runs have been taken out of it."""


def read_box(files: OpenFiles, tree: Tree, box: Slice, out: Array) -> None:
    """Fill `out` (flat uint8, `box.nbytes` long) with the bytes of a slice of one of the files, which are in `tree`.

    Raises:
        DamagedError: the file ends before, or is another. EnvironmentFault: unreadable.
    """
    shard = box.tensor.file
    try:
        fd = files.acquire(shard)
        try:
            _read_box(fd, box, out)
        finally:
            files.release(shard)
    except OSError as error:
        raise unreadable(tree, shard, error) from error


def _read_box(fd: int, box: Slice, out: Array) -> None:
    offset, length, pitch, count = box.lines()
    if count > 1 and pitch <= _PITCH_READ_THROUGH:
        _read_through(fd, box, out)
    else:
        for line in range(count):
            _read_run(fd, box, offset + line * pitch, out[line * length : (line + 1) * length])


def _read_through(fd: int, box: Slice, out: Array) -> None:
    """Fill `out` with the runs of a slice by reading all that lies from the first to the last."""
    offset, length, pitch, count = box.lines()
    at_once = min(count, max(1, _READ_THROUGH_BYTES // pitch))
    lines, found = out.reshape(count, length), np.empty((at_once, pitch), np.uint8)
    for top in range(0, count, at_once):
        high = min(at_once, count - top)
        # To the end of the last run, behind which the file may end.
        _read_run(fd, box, offset + top * pitch, found.reshape(-1)[: (high - 1) * pitch + length])
        lines[top : top + high] = found[:high, :length]


def _read_run(fd: int, box: Slice, offset: int, out: Array) -> None:
    """Fill `out` with the bytes from `offset` on."""
    view, position = out.data, 0
    while position < len(view):
        got = _READ_AT(fd, (view[position:],), offset + position)
        if got == 0:
            raise DamagedError(f"{box.tensor.file}: is truncated inside '{box.tensor.name}'; download it again")
        position += got


_READ_AT: Callable[[int, tuple[memoryview], int], int] = getattr(os, "preadv", _copied_from)
"""Fills memory from a place in the file, as far as one call goes; bytes read. Where there is no preadv: by a copy."""
