"""What a layout is: the on-disk contract of one kind of module, as code.

A layout answers four questions: does the kernel take this module (`refuses`), which output tensors does it become
and from which source bytes (`convert`), which matrices does a stored module hold (`matrices`), and what do they
mean (`decode`). `convert` only describes: a `Piece` names its input slices and carries the function that will make
its bytes, so that a plan is complete before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from xpuquant.formats.checkpoint import Slice, as_bytes, whole
from xpuquant.formats.dtypes import nbytes, numpy_dtype
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import Weight, row_blocks
from xpuquant.formats.weights.decoded import Decoded

Array = np.ndarray[Any, Any]

Make = Callable[[Sequence[Array], Array], None]
"""Fills the piece's bytes (flat uint8 `out`) from the arrays of its inputs."""


@dataclass(frozen=True)
class Piece:
    """A run of bytes of one output tensor.

    inputs  source slices, read in order
    nbytes  length of the run
    make    fills it; None for a verbatim copy of the single input. With a method `cut(piece, limit)`, it can also fill
            the run in parts
    """

    inputs: tuple[Slice, ...]
    nbytes: int
    make: Make | None = None

    def cut(self, limit: int) -> Iterator[Piece]:
        """The run in pieces of about `limit` bytes, each input of which is a part of the same input here; the piece
        itself where it is no longer, or cannot be cut."""
        cut = getattr(self.make, "cut", None)
        if cut is None or self.nbytes <= limit:
            yield self
        else:
            yield from cut(self, limit)


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the output; `pieces` are its bytes in file order, without gaps."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Matrix:
    """One `[N, K]` matrix of a stored module: the module itself, or one expert's part of a stack.

    role  `linear`, `gate`, `up`, `down`, or `gate_up` (gpt-oss: interleaved rows, one matrix)
    """

    role: str
    N: int
    K: int
    expert: int | None = None


@dataclass(frozen=True)
class Linear:
    """A source module that stays one module. `bias` is informative: it passes through on its own."""

    name: str
    weight: Weight


@dataclass(frozen=True)
class ExpertStack:
    """The experts of one layer.

    name         `model.layers.0.mlp.experts`
    weights      role → weight of each expert, in order; roles gate, up, down or gate_up, down
    biases       role → bias slice of each expert (dtype of the source); empty where there are none
    interleaved  gate and up rows alternate in the output (gpt-oss's activation reads them so)
    """

    name: str
    weights: Mapping[str, tuple[Weight, ...]]
    biases: Mapping[str, tuple[Slice, ...]] = field(default_factory=dict)
    interleaved: bool = False

    @property
    def experts(self) -> int:
        return len(self.weights["down"])


Module = Linear | ExpertStack


@dataclass(frozen=True)
class Conversion:
    """A module's place in the output.

    scheme   what a loader must know of it; None where it was dequantized
    facts    what was decided and from what, for the report
    rounded  safetensors label of the type that scales were rounded to, because the user asked for it; None where every
             scale has its source's value
    """

    name: str
    scheme: Scheme | None
    tensors: tuple[OutTensor, ...]
    facts: tuple[str, ...] = ()
    rounded: str | None = None


@dataclass(frozen=True)
class Stored:
    """A module of an output repo: its scheme, its tensors by suffix, and how to read them."""

    name: str
    scheme: Scheme
    tensors: Mapping[str, Tensor]
    load: Callable[[Slice], Array]

    def array(self, suffix: str) -> Array:
        """A whole tensor; for the small ones (scales, zero points, g_idx)."""
        return self.load(whole(self.tensors[suffix]))


class Layout(Protocol):
    """One file of `formats/` each; found by its module attribute `LAYOUT`."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str:
        """Which `--layout` it belongs to."""
        ...

    def takes(self, module: Module) -> bool:
        """Whether this is the layout for this kind of module (by type, not by limits)."""
        ...

    def refuses(self, module: Module) -> str | None:
        """Why the kernel cannot take it, or None."""
        ...

    def convert(self, module: Module, scale_dtype: str | None) -> Conversion:
        """Describe the output. `scale_dtype` None keeps the source's dtype."""
        ...

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors a stored module has, after the module's name and a dot (experts: the name
        of the stack)."""
        ...

    def matrices(self, stored: Stored) -> list[Matrix]:
        """The matrices a stored module holds. Raises DamagedError where shapes or dtypes break the contract."""
        ...

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        """Rows `start:stop` of a matrix, in source column order, by the plain definition of the layout."""
        ...

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        """The arrays a kernel takes for rows `start:stop` of one matrix (multiples of 8), by role: see
        `kernels.Layer`."""
        ...


def copied(tensor: Tensor, name: str | None = None) -> OutTensor:
    """A tensor that keeps its bytes, dtype and shape."""
    pieces = tuple(
        Piece((Slice(as_bytes(tensor), start, stop),), stop - start) for start, stop in row_blocks(tensor.nbytes, 1)
    )
    return OutTensor(name or tensor.name, tensor.dtype, tensor.shape, pieces)


@dataclass(frozen=True)
class Cast:
    """Fills a piece with one input cast to `dtype` (a safetensors label)."""

    dtype: str

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        target = out.view(numpy_dtype(self.dtype))
        target[...] = arrays[0].reshape(target.shape)
