"""Where a checkpoint comes from: a folder here, a Hub repo in convert/hub.py.

What flows: `open_source` reads config, index and headers (never weights) and hands them to the readers as a
`Checkpoint`; the executor and the verification then read slices through `read_into`, from any thread. Nothing is
ever written, unpickled or executed. A shard that changes while it is being read is noticed by `check_unchanged`.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from xpuquant.convert.files import FoundFiles, find_files
from xpuquant.errors import DamagedError, EnvironmentFault, UsageError, one_line
from xpuquant.formats.checkpoint import Array, Checkpoint, Slice, as_array, whole
from xpuquant.formats.safetensors import PREFIX_BYTES, Tensor, header_length, parse_header

_MAX_OPEN_SHARDS = 256
_MAX_PEEK_BYTES = 1 << 28
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Source(Protocol):
    """A checkpoint to read from. Thread-safe."""

    @property
    def name(self) -> str:
        """As the user named it: a path or a repo id."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit a repo id was resolved to; None for a folder."""
        ...

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def extra_files(self) -> tuple[str, ...]:
        """Files to copy as they are, relative paths."""
        ...

    @property
    def left_files(self) -> Mapping[str, str]:
        """Files that are not copied → why."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        ...

    def read_into(self, part: Slice, out: Array) -> None:
        """Fill `out` (flat uint8, `part.nbytes` long) with a slice's bytes."""
        ...

    def copy_file(self, name: str, target: Path) -> None:
        """Copy one of `extra_files`."""
        ...

    def fingerprint(self) -> str:
        """Identifies the content as far as can be told without reading it."""
        ...

    def check_unchanged(self) -> None:
        """Raises DamagedError if a shard is no longer the file that was opened."""
        ...


class LocalSource:
    """A folder with safetensors shards."""

    revision: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        found = find_files(folder)
        self.extra_files = found.extra
        self.left_files: Mapping[str, str] = found.left
        self._paths = {shard: folder / shard for shard in found.shards}
        self._stats = {shard: self._stat(shard) for shard in found.shards}
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        tensors, notes = self._headers(found)
        self.checkpoint = Checkpoint(
            config=found.config,
            quantization=found.quantization,
            tensors=tensors,
            peek=self._peek,
            notes=(*found.notes, *notes),
        )
        self.nbytes = sum(size for size, _ in self._stats.values())

    def read_into(self, part: Slice, out: Array) -> None:
        shard = part.tensor.file
        fd, keep = self._descriptor(shard)
        try:
            position = 0
            view = memoryview(out)
            for offset, length in part.runs():
                end = position + length
                while position < end:
                    got = os.preadv(fd, [view[position:end]], offset)
                    if got == 0:
                        raise DamagedError(f"{shard}: is truncated inside '{part.tensor.name}'; download it again")
                    position += got
                    offset += got
        except OSError as error:
            raise EnvironmentFault(f"{self._paths[shard]}: cannot be read ({error.strerror})") from error
        finally:
            if not keep:
                os.close(fd)

    def copy_file(self, name: str, target: Path) -> None:
        data = (self.folder / name).read_bytes()
        target.write_bytes(data)
        if os.access(self.folder / name, os.X_OK):
            target.chmod(target.stat().st_mode | 0o100)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for shard, (size, changed) in self._stats.items():
            digest.update(f"{shard} {size} {changed}\n".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        for shard, stat in self._stats.items():
            if self._stat(shard) != stat:
                raise DamagedError(f"{self._paths[shard]} changed while it was being converted; start again")

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def _stat(self, shard: str) -> tuple[int, int]:
        try:
            stat = self._paths[shard].stat()
        except OSError as error:
            raise EnvironmentFault(f"{self._paths[shard]}: cannot be read ({error.strerror})") from error
        return stat.st_size, stat.st_mtime_ns

    def _descriptor(self, shard: str) -> tuple[int, bool]:
        """An open descriptor, and whether it stays open (repos of thousands of shards reopen)."""
        with self._lock:
            if shard in self._open:
                return self._open[shard], True
            fd = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) < _MAX_OPEN_SHARDS:
                self._open[shard] = fd
                return fd, True
            return fd, False

    def _headers(self, found: FoundFiles) -> tuple[dict[str, Tensor], list[str]]:
        tensors: dict[str, Tensor] = {}
        notes: list[str] = []
        for shard in found.shards:
            size = self._stats[shard][0]
            try:
                with self._paths[shard].open("rb") as file:
                    length = header_length(file.read(PREFIX_BYTES), shard, size)
                    header = file.read(length)
            except OSError as error:
                raise EnvironmentFault(f"{self._paths[shard]}: cannot be read ({error.strerror})") from error
            merge_header(tensors, notes, parse_header(header, shard, size), found.index)
        check_index(tensors, found.index)
        return tensors, notes

    def _peek(self, tensor: Tensor) -> Array | None:
        if tensor.nbytes > _MAX_PEEK_BYTES:
            return None
        part = whole(tensor)
        out = np.empty(part.nbytes, np.uint8)
        self.read_into(part, out)
        return as_array(part, out)


def merge_header(
    tensors: dict[str, Tensor], notes: list[str], header: Mapping[str, Tensor], index: Mapping[str, str] | None
) -> None:
    """Add one shard's tensors. The index decides between two shards that hold the same name.

    Raises:
        DamagedError: a name twice, and no index to decide.
    """
    for name, tensor in header.items():
        listed = None if index is None else index.get(name)
        if listed is not None and listed != tensor.file:
            notes.append(one_line(f"{tensor.file} also holds '{name}', which the index takes from {listed}: ignored"))
            continue
        if name in tensors:
            raise DamagedError(one_line(f"'{name}' is in both {tensors[name].file} and {tensor.file}, and no index "
                                        "says which is meant"))  # fmt: skip
        if index is not None and listed is None:
            notes.append(one_line(f"{tensor.file} holds '{name}', which the index does not list: taken along"))
        tensors[name] = tensor


def check_index(tensors: Mapping[str, Tensor], index: Mapping[str, str] | None) -> None:
    """Raises DamagedError where the index lists a tensor that its shard does not hold."""
    for name, shard in (index or {}).items():
        if name not in tensors:
            raise DamagedError(one_line(f"{shard}: the index lists '{name}', the file does not hold it"))


def open_source(name: str) -> LocalSource:
    """Open a folder.

    Raises:
        UsageError: no such folder.
    """
    folder = Path(name)
    if folder.is_dir():
        return LocalSource(folder)
    if folder.is_file():
        raise UsageError(f"{name} is a file; give the folder it lies in")
    raise UsageError(one_line(f"{name}: no such folder"))


