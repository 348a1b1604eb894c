"""Where a checkpoint comes from: a folder here, a Hub repo in convert/sources/hub.py.

What flows: `open_source` reads config, index and headers (never weights) and hands them to the readers as a
`Checkpoint`; the executor and the verification then read slices through `read_into`, from any thread. Nothing is
ever written, unpickled or executed. A shard that changes while it is being read is noticed by `check_unchanged`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from xpuquant.conversion.sources.repo_files import find_files
from xpuquant.conversion.sources.shard_reader import ShardReader
from xpuquant.errors import DamagedError, UsageError, one_line
from xpuquant.formats.checkpoint import Array, Checkpoint, Slice, as_array, whole
from xpuquant.formats.safetensors import Tensor

if TYPE_CHECKING:
    from xpuquant.conversion.sources.hub import HubSource


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

    def read_text(self, name: str) -> str | None:
        """A small text file, for the card; None where there is none of that name."""
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
        self._shards = ShardReader(folder, found.shards)
        notes = list(found.notes)
        tensors: dict[str, Tensor] = {}
        for shard in found.shards:
            merge_header(tensors, notes, self._shards.header(shard), found.index)
        check_index(tensors, found.index)
        self.checkpoint = Checkpoint(
            config=found.config,
            quantization=found.quantization,
            tensors=tensors,
            peek=self._shards.peek,
            notes=tuple(notes),
        )
        self.nbytes = self._shards.nbytes

    def read_into(self, part: Slice, out: Array) -> None:
        self._shards.read_into(part, out)

    def copy_file(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Content only: the mode follows the umask, and a link of the Hub cache becomes a file.
        shutil.copyfile(self.folder / name, target)

    def read_text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def fingerprint(self) -> str:
        # The configs too: they decide what the tensors mean.
        configs = json.dumps([self.checkpoint.config, self.checkpoint.quantization], sort_keys=True)
        return hashlib.sha256((self._shards.fingerprint() + configs).encode()).hexdigest()

    def check_unchanged(self) -> None:
        self._shards.check_unchanged()


def read_slice(source: Source, part: Slice) -> Array:
    """A slice as an array of its dtype and shape."""
    out = np.empty(part.nbytes, np.uint8)
    source.read_into(part, out)
    return as_array(part, out)


def read_all(source: Source, tensor: Tensor) -> Array:
    """A whole tensor."""
    return read_slice(source, whole(tensor)).reshape(tensor.shape)


def merge_header(
    tensors: dict[str, Tensor],
    notes: list[str],
    header: Mapping[str, Tensor],
    index: Mapping[str, str] | None,
) -> None:
    """Add one shard's tensors. The index decides between two shards that hold the same name.

    Raises:
        DamagedError: a name twice, and no index to decide.
    """
    ignored: list[str] = []
    unlisted: list[str] = []
    for name, tensor in header.items():
        listed = None if index is None else index.get(name)
        if listed is not None and listed != tensor.file:
            ignored.append(name)
            continue
        if name in tensors:
            raise DamagedError(
                f"'{name}' is in both {tensors[name].file} and {tensor.file}, and no index says which is meant"
            )
        if index is not None and listed is None:
            unlisted.append(name)
        tensors[name] = tensor
    for names, what in (
        (ignored, "the index takes from another file: ignored"),
        (unlisted, "the index does not list: taken along"),
    ):
        if names:
            also = f" and {len(names) - 1} more" if names[1:] else ""
            notes.append(one_line(f"{header[names[0]].file} holds '{names[0]}'{also}, which {what}"))


def check_index(tensors: Mapping[str, Tensor], index: Mapping[str, str] | None) -> None:
    """Raises DamagedError where the index lists a tensor that its shard does not hold."""
    for name, shard in (index or {}).items():
        if name not in tensors:
            raise DamagedError(f"{shard}: the index lists '{name}', the file does not hold it")


def open_source(name: str, revision: str | None = None, stream: bool = False) -> LocalSource | HubSource:
    """Open a folder, or a repository on the Hub at a revision (a branch, a tag, a commit).

    Args:
        stream: a repository is to be read without downloading all of it; see `hub_stream.py`.

    Raises:
        UsageError: neither a folder nor a model on the Hub; a revision of a folder.
        EnvironmentFault: the Hub cannot be reached, or does not let us in.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"{name} is a folder; --revision is for repositories on the Hub")
        if stream:
            raise UsageError(f"{name} is a folder; --stream is for repositories on the Hub")
        return LocalSource(folder)
    if folder.exists():
        raise UsageError(f"{name} is a file; give the folder it lies in")
    from xpuquant.conversion.sources.hub import is_repo_id, open_hub

    if not is_repo_id(name):
        raise UsageError(f"{name}: no such folder, and no repo id like owner/name")
    return open_hub(name, revision, stream=stream)
