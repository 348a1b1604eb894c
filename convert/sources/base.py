"""What a source is: a checkpoint to read from, in a folder (`folder.py`) or on the Hub (`hub.py`, `streamed.py`).

What flows: opening a source reads config, index and headers, never weights, and makes the `Checkpoint` that readers
see. Conversion and verification then read slices through `read_into`, from any thread. Nothing is ever written,
unpickled or executed. A file that changes while it is read, a shard or one that is copied, is noticed by
`check_unchanged`; between a run and the one that resumes it, by `identities`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np

from xpuquant.conversion.sources.repo_files import FoundFiles
from xpuquant.conversion.sources.weight_files import are_of_one_set
from xpuquant.conversion.tree import Identity, Tree, Written
from xpuquant.errors import DamagedError, UsageError, one_line
from xpuquant.formats.checkpoint import Array, Checkpoint, Slice, as_array
from xpuquant.formats.safetensors import Tensor


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
        """Files to copy as they are; paths below the folder."""
        ...

    @property
    def left_files(self) -> Mapping[str, str]:
        """Files that are not copied → why."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        ...

    def read_into(self, box: Slice, out: Array) -> None:
        """Fill `out` (flat uint8, `box.nbytes` long) with the bytes of a slice."""
        ...

    def copy_file(self, name: str, into: Tree) -> Written:
        """Copy one of `extra_files`, under its name."""
        ...

    def read_text(self, name: str) -> str | None:
        """A small text file, for the card; None where there is none of that name, or it is too large to be read."""
        ...

    def fingerprint(self) -> str:
        """Text that is equal for equal content, as far as can be told without reading the weights."""
        ...

    def identities(self) -> Mapping[str, Identity]:
        """Shard → which file it is; empty where a commit says what is in it."""
        ...

    def check_unchanged(self) -> None:
        """Raises DamagedError if a shard, or a file to copy, is no longer the file that was there at the start."""
        ...


def read_slice(source: Source, box: Slice) -> Array:
    """A slice as an array of its dtype and shape."""
    out = np.empty(box.nbytes, np.uint8)
    source.read_into(box, out)
    return as_array(box, out)


def bytes_by_dtype(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Label of a dtype → bytes of the tensors that have it, the most first."""
    total = Counter[str]()
    for tensor in tensors:
        total[tensor.dtype] += tensor.nbytes
    return dict(sorted(total.items(), key=lambda entry: -entry[1]))


def checkpoint_of(
    found: FoundFiles, headers: Iterable[Mapping[str, Tensor]], peek: Callable[[Tensor], Array | None]
) -> Checkpoint:
    """What readers see of a source.

    Args:
        headers: name → tensor of each shard, in the order of `found.shards`.
        peek: reads a small tensor; None for one that is not to be read while planning.

    Raises:
        DamagedError: index and headers contradict each other.
        UsageError: files of which it cannot be told whether they belong together.
    """
    notes = list(found.notes)
    tensors: dict[str, Tensor] = {}
    places = _module_files(found.index or {})
    for header in headers:
        if found.index is None and len(found.shards) > 1:
            _check_no_adapter(header)
        _merge_header(tensors, notes, header, found.index, places)
    for name, shard in (found.index or {}).items():
        if name not in tensors:
            raise DamagedError(f"{shard}: the index lists '{name}', the file does not hold it")
    return Checkpoint(found.config, found.quantization, tensors, peek, tuple(notes))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _module_files(index: Mapping[str, str]) -> dict[str, set[str]]:
    places: dict[str, set[str]] = {}
    for name, file in index.items():
        places.setdefault(_module(name), set()).add(file)
    return places


_ADAPTER = re.compile(r"(?:.*\.)?lora_(?:[AB]|down|up|embedding_[AB]|magnitude_vector)(?:\..*)?|base_model\.model\..*")


def _check_no_adapter(header: Mapping[str, Tensor]) -> None:
    """Raises UsageError for a file that is an adapter, whatever it is called, among others that no index lists."""
    if header and all(_ADAPTER.fullmatch(name) for name in header):
        name, tensor = next(iter(header.items()))
        raise UsageError(
            f"{tensor.file} is an adapter ('{name}'), not weights of the model, and no index tells; move it away"
        )


def _merge_header(
    tensors: dict[str, Tensor],
    notes: list[str],
    header: Mapping[str, Tensor],
    index: Mapping[str, str] | None,
    places: Mapping[str, set[str]],
) -> None:
    """Add one shard's tensors. Where two shards hold the same name, the index says which is meant.

    A shard may be another checkpoint's, of which the index takes a few tensors (vllm-project/vllm#54230): what it does
    not list of a module that lies elsewhere is the other checkpoint's. What it lists nowhere else it has forgotten.

    Args:
        places: module → the files that the index takes it from.

    Raises:
        UsageError: a name twice, and no index to decide.
    """
    ignored: list[str] = []
    unlisted: list[str] = []
    foreign: list[str] = []
    for name, tensor in header.items():
        listed = None if index is None else index.get(name)
        if listed is not None and listed != tensor.file:
            ignored.append(name)
            continue
        if index is not None and listed is None and tensor.file not in places.get(_module(name), {tensor.file}):
            foreign.append(name)
            continue
        if name in tensors:
            # Of a set of shards none can be spared.
            other = tensors[name].file
            fix = "add one" if are_of_one_set(other, tensor.file) else "remove one of the files"
            raise UsageError(f"'{name}' is in both {other} and {tensor.file}, and no index says which is meant; {fix}")
        if index is not None and listed is None:
            unlisted.append(name)
        tensors[name] = tensor
    for names, what in (
        (ignored, "the index takes from another file: ignored"),
        (foreign, "the index does not list, and whose module it takes from another file: ignored"),
        (unlisted, "the index does not list: taken along"),
    ):
        if names:
            also = f" and {len(names) - 1} more" if names[1:] else ""
            notes.append(one_line(f"{header[names[0]].file} holds '{names[0]}'{also}, which {what}"))
