"""`diff A B`: are these the same tensors? The fastest answer to "is it the checkpoint?"

Names, dtypes, shapes and bytes of two folders, files or repositories on the Hub, however they are sharded. Tensors are
compared as bytes: a NaN equals itself, and -0 is not 0. Modules that the two store otherwise, such as a checkpoint
and its conversion, are then compared by their values (`decoded_diff.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.sources.open import on_the_hub, or_no_such_folder
from xpuquant.conversion.sources.repo_files import list_files, read_json
from xpuquant.conversion.sources.shard_reader import ShardReader
from xpuquant.conversion.sources.weight_files import index_file, parse_index, pick_weight_files
from xpuquant.conversion.tree import Tree
from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array, Slice, as_array, whole
from xpuquant.formats.dtypes import BITS
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import row_blocks
from xpuquant.values import frozen

if TYPE_CHECKING:
    from xpuquant.conversion.decoded_diff import ModuleValues
    from xpuquant.conversion.diff_sides import Side
    from xpuquant.conversion.sources.hub import Remote

_BLOCK_BYTES = 4 << 20
_RANGE_BYTES = 32 << 20
"""Of a repository on the Hub: a request takes longer to begin than a disk."""


@frozen(sealed=True)
class Values:
    """A tensor that is in both with the same dtype and shape, and other bytes.

    differ   elements that differ, of `elements`
    first    flat index of the first
    max_abs  largest difference of two finite values; None where elements are no numbers (sub-byte types)
    """

    name: str
    differ: int
    elements: int
    first: int
    max_abs: float | None


@frozen(sealed=True)
class Difference:
    """What two sets of tensors do not share.

    only_a, only_b  names
    types           name → (dtype and shape in A, in B)
    values          tensors of equal type and other values; empty where values were not compared
    same            tensors found equal, and their bytes
    decoded         modules and float tensors that are stored otherwise, compared by their values
    left            tensors of the lists above whose values are not compared in `decoded`
    not_decoded     why values were not compared so; None where they were, or did not have to be
    """

    a: str
    b: str
    only_a: Sequence[str]
    only_b: Sequence[str]
    types: Mapping[str, tuple[str, str]]
    values: Sequence[Values]
    same: int
    same_bytes: int
    compared_values: bool
    decoded: Sequence[ModuleValues] = ()
    left: Sequence[str] = ()
    not_decoded: str | None = None

    @property
    def equal(self) -> bool:
        """Whether every tensor is the same, by name, dtype, shape and, where they were compared, bytes."""
        return not (self.only_a or self.only_b or self.types or self.values)

    @property
    def same_values(self) -> bool:
        """Whether every tensor is the same, or part of what is stored otherwise and of equal values."""
        return self.equal or (not self.left and bool(self.decoded) and all(one.same for one in self.decoded))

    @property
    def suspects(self) -> set[str]:
        """Every tensor that is not the same on both sides."""
        return {*self.only_a, *self.only_b, *self.types, *(one.name for one in self.values)}


class Tensors:
    """The tensors of a folder, of one file, or of a repository on the Hub, of which only what is compared is read: in
    ranges, or from the client's cache where it holds the shard.

    name     as the user named it
    tensors  name → tensor
    block    bytes that are read at a time
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.block = _BLOCK_BYTES
        self._remote: Remote | None = None
        path = Path(name)
        if not path.exists():
            path, self._remote = _repository(name)
        if self._remote is not None:
            remote = self._remote
            self.block = _RANGE_BYTES
            shards = _shards(sorted(remote.blobs), lambda file: read_json(remote.download(file), file))
        elif path.is_dir():
            tree = Tree(path)
            shards = _shards(list_files(path), lambda file: read_json(tree, file))
        else:
            tree, shards = Tree(path.resolve().parent), (path.resolve().name,)
        self._readers = {} if self._remote is not None else dict.fromkeys(shards, ShardReader(tree, shards))
        self.tensors: dict[str, Tensor] = {}
        for shard in shards:
            for tensor_name, tensor in self._header(shard).items():
                if tensor_name in self.tensors:
                    raise DamagedError(
                        f"{name}: '{tensor_name}' is in both {self.tensors[tensor_name].file} and {shard}"
                    )
                self.tensors[tensor_name] = tensor

    def _header(self, shard: str) -> dict[str, Tensor]:
        if self._remote is not None:
            return self._remote.header(shard)
        return self._readers[shard].header(shard)

    def read(self, box: Slice) -> Array:
        """A slice as an array of its dtype and shape."""
        shard = box.tensor.file
        if self._remote is not None and shard not in self._readers and self._remote.cached(shard) is not None:
            tree = self._remote.download(shard)  # there: it is compared with the Hub's digest
            self._remote.check_answers(shard, tree)
            self._readers[shard] = ShardReader(tree, (shard,))
        if shard in self._readers:
            return self._readers[shard].read(box)
        assert self._remote is not None
        parts = [self._remote.read(shard, start, start + length) for start, length in box.runs()]
        return as_array(box, np.frombuffer(b"".join(parts), np.uint8))

    def sha256(self, shard: str) -> str | None:
        """Of a file on the Hub, as the Hub says; None of others."""
        return None if self._remote is None else self._remote.blobs[shard].sha256


def _shards(names: Sequence[str], read: Callable[[str], dict[str, Any]]) -> tuple[str, ...]:
    index_name = index_file(names)
    index = None if index_name is None else parse_index(read(index_name), index_name)
    return pick_weight_files(names, index, index_name).shards


def _repository(name: str) -> tuple[Path, Remote | None]:
    """A repository on the Hub; where the client is offline, its folder in the cache instead."""
    from xpuquant.conversion.hub.client import connect, is_offline  # folders need no client of the Hub
    from xpuquant.conversion.sources.hub import CachedSource, Remote, open_hub

    repo, revision = on_the_hub(name)
    with or_no_such_folder(name):
        if is_offline():
            source = open_hub(repo, revision)
            assert isinstance(source, CachedSource)
            return source.folder, None
        return Path(name), Remote(connect(), repo, revision)


def compare(a: str, b: str, *, values: bool, decode: bool = True, reporter: Reporter) -> Difference:
    """Compare two of: a folder, a file, `owner/name` or `owner/name@revision` on the Hub.

    Args:
        values: compare bytes.
        decode: compare the values of what the two store otherwise; not without `values`. Of a repository on the Hub the
            shards that hold it are downloaded.

    Raises:
        UsageError: no such folder, or no safetensors in it. DamagedError: not sound safetensors files.
        EnvironmentFault: network.
    """
    ours, theirs = Tensors(a), Tensors(b)
    both = [name for name in ours.tensors if name in theirs.tensors]
    types = {
        name: (_type(ours.tensors[name]), _type(theirs.tensors[name]))
        for name in both
        if _type(ours.tensors[name]) != _type(theirs.tensors[name])
    }
    alike = [name for name in both if name not in types]
    only_a = sorted(ours.tensors.keys() - theirs.tensors.keys())
    only_b = sorted(theirs.tensors.keys() - ours.tensors.keys())
    others = {*only_a, *only_b, *types}
    # Before bytes are compared: shards that are downloaded for their modules need not be read in ranges too.
    sides = _open(a, b, others, reporter) if others and values and decode else None
    found: list[Values] = []
    if values:
        reporter.phase("compare", sum(ours.tensors[name].nbytes for name in alike))
        for name in alike:
            difference = _values(ours, theirs, name)
            reporter.advance(ours.tensors[name].nbytes)
            found += [difference] if difference is not None else []
    equal = set(alike) - {difference.name for difference in found}
    nbytes = sum(ours.tensors[name].nbytes for name in equal)
    stored = Difference(a, b, only_a, only_b, types, found, len(equal), nbytes, values)
    if stored.equal or not (values and decode):
        return stored
    return _decoded(stored, sides or _open(a, b, stored.suspects, reporter), reporter)


def _open(a: str, b: str, suspects: set[str], reporter: Reporter) -> tuple[Side, Side] | str:
    """Both sides, with the shards that will be decoded; or why they are not."""
    from xpuquant.conversion.decoded_diff import fetch_modules
    from xpuquant.conversion.diff_sides import open_sides

    sides = open_sides(a, b)
    if not isinstance(sides, str):
        fetch_modules(*sides, suspects, reporter)
    return sides


def _decoded(stored: Difference, sides: tuple[Side, Side] | str, reporter: Reporter) -> Difference:
    """The same with the values of what is stored otherwise."""
    from xpuquant.conversion.decoded_diff import compare_modules, same_floats

    if isinstance(sides, str):
        return replace(stored, left=sorted(stored.suspects), not_decoded=sides)
    modules, spoken = compare_modules(*sides, stored.suspects, reporter)
    floats = same_floats(*sides, [name for name in stored.types if name not in spoken], reporter)
    left = sorted(stored.suspects - spoken - floats.keys())
    return replace(stored, decoded=(*modules, *floats.values()), left=left)


def _same_file(ours: Tensors, theirs: Tensors, mine: str, other: str) -> bool:
    """Whether two files on the Hub are known to be the same bytes."""
    sha256 = ours.sha256(mine)
    return sha256 is not None and sha256 == theirs.sha256(other)


def _type(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _values(ours: Tensors, theirs: Tensors, name: str) -> Values | None:
    mine, other = whole(ours.tensors[name]), whole(theirs.tensors[name])
    if mine.tensor.begin == other.tensor.begin and _same_file(ours, theirs, mine.tensor.file, other.tensor.file):
        return None
    # Sub-byte types are carried as bytes: what is counted there is bytes.
    is_number = BITS[mine.tensor.dtype] >= 8 and mine.tensor.dtype not in ("BOOL", "C64")
    elements, differ, first, largest = 0, 0, -1, 0.0
    for start, stop in row_blocks(mine.stop, mine.nbytes // max(mine.stop, 1), limit=max(ours.block, theirs.block)):
        x = ours.read(Slice(mine.tensor, start, stop)).reshape(-1)
        y = theirs.read(Slice(other.tensor, start, stop)).reshape(-1)
        same = (x.view(np.uint8) == y.view(np.uint8)).reshape(-1, x.itemsize).all(axis=1)
        wrong = np.flatnonzero(~same)
        if len(wrong):
            first = elements + int(wrong[0]) if first < 0 else first
            differ += len(wrong)
            if is_number:
                gap = np.abs(x[wrong].astype(np.float64) - y[wrong].astype(np.float64))
                largest = max(largest, float(gap[np.isfinite(gap)].max(initial=0.0)))
        elements += x.size
    return Values(name, differ, elements, first, largest if is_number else None) if differ else None
