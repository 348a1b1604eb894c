"""`diff A B`: are these the same tensors? The fastest answer to "is it the checkpoint?"

Names, dtypes, shapes and bytes of two folders or files, however they are sharded. Values are compared as bytes: a NaN
equals itself, and -0 is not 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.sources.repo_files import list_files, read_json
from xpuquant.conversion.sources.shard_reader import ShardReader
from xpuquant.conversion.sources.weight_files import index_file, parse_index, pick_weight_files
from xpuquant.conversion.tree import Tree
from xpuquant.errors import DamagedError, UsageError
from xpuquant.formats.checkpoint import Slice, whole
from xpuquant.formats.dtypes import BITS
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import row_blocks

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Difference:
    """What two sets of tensors do not share.

    only_a, only_b  names
    types           name → (dtype and shape in A, in B)
    values          tensors of equal type and other values; empty where values were not compared
    same            tensors found equal, and their bytes
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

    @property
    def equal(self) -> bool:
        return not (self.only_a or self.only_b or self.types or self.values)


class Tensors:
    """The tensors of a folder or of one file."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            names = list_files(path)
            index_name = index_file(names)
            index = None if index_name is None else parse_index(read_json(Tree(path), index_name), index_name)
            folder, shards = path, pick_weight_files(names, index, index_name).shards
        elif path.exists():
            folder, shards = path.resolve().parent, (path.resolve().name,)
        else:
            raise UsageError(f"{path}: no such file or folder")
        self.reader = ShardReader(Tree(folder), shards)
        self.tensors: dict[str, Tensor] = {}
        for shard in shards:
            for name, tensor in self.reader.header(shard).items():
                if name in self.tensors:
                    raise DamagedError(f"{path}: '{name}' is in both {self.tensors[name].file} and {shard}")
                self.tensors[name] = tensor


def compare(a: Path, b: Path, *, values: bool, reporter: Reporter) -> Difference:
    """Compare two folders or files.

    Raises:
        UsageError: no such folder, or no safetensors in it. DamagedError: not sound safetensors files.
    """
    ours, theirs = Tensors(a), Tensors(b)
    both = [name for name in ours.tensors if name in theirs.tensors]
    types = {
        name: (_type(ours.tensors[name]), _type(theirs.tensors[name]))
        for name in both
        if _type(ours.tensors[name]) != _type(theirs.tensors[name])
    }
    alike = [name for name in both if name not in types]
    found: list[Values] = []
    if values:
        reporter.phase("compare", sum(ours.tensors[name].nbytes for name in alike))
        for name in alike:
            difference = _values(ours, theirs, name)
            reporter.advance(ours.tensors[name].nbytes)
            found += [difference] if difference is not None else []
    equal = set(alike) - {difference.name for difference in found}
    return Difference(
        str(a),
        str(b),
        sorted(ours.tensors.keys() - theirs.tensors.keys()),
        sorted(theirs.tensors.keys() - ours.tensors.keys()),
        types,
        found,
        len(equal),
        sum(ours.tensors[name].nbytes for name in equal),
        values,
    )


def _type(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _values(ours: Tensors, theirs: Tensors, name: str) -> Values | None:
    mine, other = whole(ours.tensors[name]), whole(theirs.tensors[name])
    # Sub-byte types are carried as bytes: what is counted there is bytes.
    is_number = BITS[mine.tensor.dtype] >= 8 and mine.tensor.dtype not in ("BOOL", "C64")
    elements, differ, first, largest = 0, 0, -1, 0.0
    for start, stop in row_blocks(mine.stop, mine.nbytes // max(mine.stop, 1), limit=_BLOCK_BYTES):
        x = ours.reader.read(Slice(mine.tensor, start, stop)).reshape(-1)
        y = theirs.reader.read(Slice(other.tensor, start, stop)).reshape(-1)
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
