"""The two sides of a decoded `diff`: what each holds, and its matrices as something that can be read in rows.

A side is a quantized checkpoint of any format that is read, a repo that was converted, or a model that is not
quantized; in a folder or on the Hub. Of one on the Hub headers are read, and then the shards that hold what is compared
are downloaded into the client's cache, each compared with the Hub's sha256.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.converted import StoredModules
from xpuquant.conversion.sources.base import Source, read_slice
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.verify.exactness import BLOCK_CODES, find_matrix, in_rows, matrices_by_role, packed_blocks
from xpuquant.conversion.verify.verdict import CONTRADICTIONS, contradiction
from xpuquant.errors import UsageError
from xpuquant.formats.checkpoint import Array, Slice, columns, rows
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.guard import guarded
from xpuquant.formats.layouts.base import Matrix, Stored
from xpuquant.formats.layouts.modules import ExpertStack, Module, gather_modules, is_interleaved
from xpuquant.formats.readers.reading import read
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import QUANT_METHOD
from xpuquant.formats.weights.base import ROWS_MULTIPLE, Weight, row_blocks
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.floats import is_upended, view
from xpuquant.formats.weights.packed import Rows, unpacked_rows
from xpuquant.values import frozen

if TYPE_CHECKING:
    from xpuquant.conversion.sources.streamed import StreamedSource

_FUSED = "gate_up"
_HALVES = ("gate", "up")


@frozen
class View:
    """One `[N, K]` matrix of a side, to be read in blocks of rows."""

    N: int
    K: int

    def rows(self, start: int, stop: int) -> Rows:
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[int, int, Rows]]:
        """All rows, in blocks that suit the way it is stored."""
        for start, stop in row_blocks(self.N, self.K, ROWS_MULTIPLE, BLOCK_CODES):
            yield start, stop, self.rows(start, stop)

    def float_tensor(self) -> Tensor | None:
        """The tensor that it lies in where it is not quantized."""
        return None


@frozen
class WeightView(View):
    """A matrix of a quantized checkpoint."""

    source: Source
    weight: Weight

    def rows(self, start: int, stop: int) -> Rows:
        recipe = self.weight.as_packed(start, stop)
        return in_rows(recipe.build([read_slice(self.source, part) for part in recipe.inputs]))

    def blocks(self) -> Iterator[tuple[int, int, Rows]]:
        for start, stop, block in packed_blocks(self.weight, self.source):
            yield start, stop, in_rows(block)


@frozen
class _StoredView(View):
    repo: StoredModules
    stored: Stored
    matrix: Matrix

    def rows(self, start: int, stop: int) -> Rows:
        return in_rows(self.repo.layout(self.stored).as_packed(self.stored, self.matrix, start, stop))


@frozen
class FloatView(View):
    """A matrix that is not quantized; `upended` where it lies as `[K, N]`."""

    side: Side
    tensor: Tensor
    upended: bool = False

    def rows(self, start: int, stop: int) -> Rows:
        data = self.side.read((columns if self.upended else rows)(self.tensor, start, stop))
        values = np.ascontiguousarray(data.T if self.upended else data).astype(np.float64)
        one, none = np.ones((1, 1)), np.zeros(len(values), np.int64)
        return Decoded("float", values, one, none, np.zeros(values.shape[1], np.int64))

    def float_tensor(self) -> Tensor | None:
        return self.tensor


@frozen
class _HalfView(View):
    """The gate or the up rows of a matrix that has both: every other row, or one half.

    first  the first of its rows in `of`
    step   2 where gate and up alternate, else 1
    """

    of: View
    first: int
    step: int

    def rows(self, start: int, stop: int) -> Rows:
        begin, end = self.first + self.step * start, self.first + self.step * (stop - 1) + 1
        aligned = begin // ROWS_MULTIPLE * ROWS_MULTIPLE
        block = unpacked_rows(self.of.rows(aligned, min(-(-end // ROWS_MULTIPLE) * ROWS_MULTIPLE, self.of.N)))
        mine = slice(begin - aligned, end - aligned, self.step)
        return replace(block, codes=np.ascontiguousarray(block.codes[mine]), row=block.row[mine])

    def float_tensor(self) -> Tensor | None:
        return self.of.float_tensor()


MatrixPlace = tuple[str, int | None]
"""Role and expert of a matrix in its module."""


class Side:
    """One of the two, opened: its modules and what belongs to none.

    source   where its bytes are
    modules  name → module of a quantized checkpoint, as the readers find it
    stored   name → module of a repo that was converted
    plain    name → float tensor that is no part of a quantized module
    dropped  tensors that say nothing: the readers leave them out of a conversion
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.modules: dict[str, Module] = {}
        self.stored: Mapping[str, Stored] = {}
        self.dropped: set[str] = set()
        self._repo: StoredModules | None = None
        checkpoint = source.checkpoint
        plain: Mapping[str, Tensor] = checkpoint.tensors
        if checkpoint.method == QUANT_METHOD:
            with guarded("config.json"):
                self._repo = StoredModules(checkpoint.tensors, partial(read_slice, source), checkpoint.quantization)
            self.stored, plain = self._repo.modules, self._repo.plain
        elif checkpoint.quantization:
            plain = self._read()
        self.plain = {name: tensor for name, tensor in plain.items() if tensor.dtype in FLOATS}

    def _read(self) -> Mapping[str, Tensor]:
        checkpoint = self.source.checkpoint
        reading = read(checkpoint)
        self.modules = {module.name: module for module in gather_modules(checkpoint, reading.weights)}
        used = {tensor.name for weight in reading.weights for tensor in weight.tensors}
        rest = {tensor.name: tensor for tensor in reading.rest}
        unread = {name for name in checkpoint.tensors if name not in used and name not in rest}
        self.dropped = {name for name in unread if not any(name.startswith(f"{at}.") for at in reading.refused)}
        return rest

    @property
    def is_converted(self) -> bool:
        """Whether it is a repo in a layout of ours."""
        return self._repo is not None

    def fetch(self, names: Collection[str], reporter: Reporter) -> None:
        """Download the shards that hold some of its tensors, where it is on the Hub and they are not here yet.

        Raises:
            EnvironmentFault: network, disk. DamagedError: what comes is not what the Hub lists.
        """
        tensors = self.source.checkpoint.tensors
        streamed = _streamed(self.source)
        if streamed is None:
            return
        shards = sorted({tensors[name].file for name in names if name in tensors})
        missing = [shard for shard in shards if not streamed.is_cached(shard)]
        if missing:
            streamed.check_disk(missing)
            reporter.phase("download", sum(streamed.remote.blobs[shard].nbytes for shard in missing))
            streamed.fetch_shards(missing, reporter.advance)

    def nbytes(self, names: Collection[str]) -> int:
        """Of some tensors, as far as it has them."""
        tensors = self.source.checkpoint.tensors
        return sum(tensors[name].nbytes for name in names if name in tensors)

    def read(self, box: Slice) -> Array:
        """A slice of one of its tensors."""
        return read_slice(self.source, box)

    def names(self) -> list[str]:
        """Its quantized modules."""
        return [*self.modules, *self.stored]

    def views(self, name: str) -> dict[MatrixPlace, View]:
        """The matrices of one of its modules."""
        if name in self.modules:
            found = self.modules[name].matrices()
            return {(role, at): WeightView(weight.N, weight.K, self.source, weight) for role, at, weight in found}
        stored = self.stored.get(name)
        if stored is None or self._repo is None:
            return {}
        matrices = matrices_by_role(self._repo, stored)
        return {place: _StoredView(m.N, m.K, self._repo, stored, m) for place, m in matrices.items()}

    def halves(self, name: str, place: MatrixPlace, fused: View) -> dict[MatrixPlace, View]:
        """A matrix of gate and up, taken apart."""
        N, alternate = fused.N // 2, is_interleaved(self.source.checkpoint)
        return {
            (role, place[1]): _HalfView(N, fused.K, fused, i if alternate else i * N, 2 if alternate else 1)
            for i, role in enumerate(_HALVES)
        }

    def view(self, name: str, place: MatrixPlace, theirs: View) -> View | None:
        """The matrix in which this side has another side's; None where it has none."""
        views = self.views(name)
        role, expert = place
        fused = views.get((_FUSED, expert)) if role in _HALVES else None
        if place in views:
            return views[place]
        if fused is not None:
            return self.halves(name, place, fused)[place]
        stored = self.stored.get(name)
        if stored is not None and self._repo is not None:
            matrix = find_matrix(matrices_by_role(self._repo, stored), *place)
            return _StoredView(matrix.N, matrix.K, self._repo, stored, matrix)
        return self._floats(name, place, theirs)

    def _floats(self, name: str, place: MatrixPlace, theirs: View) -> View | None:
        """The same matrix where it is not quantized."""
        weight = theirs.weight if isinstance(theirs, WeightView) else None
        role, expert = place
        if weight is not None and weight.stack in self.plain and expert is not None:
            stack, upended = self.plain[weight.stack], is_upended(weight)
            return FloatView(weight.N, weight.K, self, view(stack, stack.dtype, stack.shape[1:], expert), upended)
        stacked = self._stacked_floats(name, place)
        if stacked is not None:
            return stacked
        below = name if expert is None else f"{name}.{expert}.{role}_proj"
        tensor = self.plain.get(f"{below if weight is None else weight.name}.weight")
        if tensor is None or len(tensor.shape) != 2:
            return None
        return FloatView(*tensor.shape, self, tensor)

    def _stacked_floats(self, name: str, place: MatrixPlace) -> View | None:
        """The same matrix in a stack of the unquantized model: `gate_up_proj` `[E, 2I, H]` and `down_proj` `[E, H, I]`,
        or each expert's upended, as gpt-oss and Llama 4 have them. Their shapes tell which."""
        role, expert = place
        upper, lower = (self.plain.get(f"{name}.{part}_proj") for part in (_FUSED, "down"))
        if expert is None or upper is None or lower is None or len(upper.shape) != 3 or len(lower.shape) != 3:
            return None
        (a, b), (c, d) = upper.shape[1:], lower.shape[1:]
        upended = (a, b) == (d, 2 * c)
        if not upended and (a, b) != (2 * d, c):
            return None
        stack = lower if role == "down" else upper
        if expert >= stack.shape[0]:
            return None
        N, K = stack.shape[1:][::-1] if upended else stack.shape[1:]
        matrix = FloatView(N, K, self, view(stack, stack.dtype, stack.shape[1:], expert), upended)
        return self.halves(name, place, matrix)[place] if role in _HALVES else matrix

    def biases(self, name: str) -> Mapping[str, Sequence[Slice]] | None:
        """Role → the bias of each expert of a checkpoint's stack, or of one that is not quantized; None of anything
        else."""
        module = self.modules.get(name)
        if isinstance(module, ExpertStack):
            return module.biases
        stacks = {role: self.plain.get(f"{name}.{role}_proj_bias") for role in (_FUSED, "down")}
        if not self.plain.keys() & {f"{name}.{role}_proj" for role in stacks}:
            return None
        return {
            role: [rows(stack, expert, expert + 1) for expert in range(stack.shape[0])]
            for role, stack in stacks.items()
            if stack is not None and len(stack.shape) == 2
        }

    def bias_values(self, name: str) -> dict[MatrixPlace, Array]:
        """The biases of a stack of experts, those of gate and up each by itself."""
        found: dict[MatrixPlace, Array] = {}
        alternate = is_interleaved(self.source.checkpoint)
        for role, slices in (self.biases(name) or {}).items():
            for expert, part in enumerate(slices):
                values = self.read(part).reshape(-1).astype(np.float64)
                if role == _FUSED:
                    halves = (values[0::2], values[1::2]) if alternate else np.split(values, 2)
                    found |= {(half, expert): of for half, of in zip(_HALVES, halves, strict=True)}
                else:
                    found[role, expert] = values
        return found

    def tensors_of(self, name: str, *, biases: bool, input_scales: bool) -> set[str]:
        """The tensors whose meaning is compared where a module's matrices are.

        Args:
            biases: those of experts too.
            input_scales: scales of activations too.
        """
        if name in self.stored:
            beside = (*(() if biases else ("bias",)), *(() if input_scales else ("input_scale",)))
            tensors = self.stored[name].tensors.items()
            return {tensor.name for suffix, tensor in tensors if not suffix.endswith(beside)}
        found: set[str] = set()
        if name in self.modules:
            found = {tensor.name for _, _, weight in self.modules[name].matrices() for tensor in weight.tensors}
        if biases:
            found |= {part.tensor.name for slices in (self.biases(name) or {}).values() for part in slices}
        return found if input_scales else {one for one in found if not one.endswith("input_scale")}


def open_sides(a: str, b: str) -> tuple[Side, Side] | str:
    """Both sides, or why they are not decoded."""
    for name in (a, b):
        if Path(name).is_file():
            return f"{name} is one file, and only a folder or a repo says what its tensors mean"
    try:
        ours, theirs = (Side(open_source(name, stream=not Path(name).is_dir())) for name in (a, b))
    except (UsageError, *CONTRADICTIONS) as error:
        return contradiction(error) if isinstance(error, CONTRADICTIONS) else str(error)
    return ours, theirs


def _streamed(source: Source) -> StreamedSource | None:
    """The source where it is on the Hub; None where it is here, or in the cache of a client that is offline."""
    if source.revision is None:
        return None
    from xpuquant.conversion.sources.streamed import StreamedSource

    return source if isinstance(source, StreamedSource) else None
