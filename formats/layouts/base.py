"""What a layout is: the on-disk contract of one kind of module, as code.

A layout says whether the kernel takes a module of the source and which output tensors it becomes (`offer`); which
tensors a stored module has, which matrices they hold and what those mean (`suffixes`, `matrices`, `decode`); and what a
kernel is given of them (`layer`, `for_kernels`). `offer` only describes: a `Piece` names its input slices and carries
the filler that will make its bytes, so that a plan is complete before a weight is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array, Slice, as_bytes, whole
from xpuquant.formats.dtypes import nbytes
from xpuquant.formats.layouts.modules import Module
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import Arrays, row_blocks
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.packed import Rows
from xpuquant.values import frozen


class Filler(ABC):
    """What makes the bytes of a piece; see `fillers.py`."""

    __slots__ = ()

    @abstractmethod
    def fill(self, arrays: Arrays, out: Array) -> None:
        """Fill the piece's bytes (flat uint8 `out`) from the arrays of its inputs."""

    def cut(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """The piece in pieces of about `limit` bytes, each input of which is a part of the same input here."""
        yield piece


@frozen(slots=True)
class Piece:
    """A run of bytes of one output tensor.

    inputs  source slices, read in order
    nbytes  length of the run
    filler  makes it; None for a verbatim copy of the single input
    """

    inputs: tuple[Slice, ...]
    nbytes: int
    filler: Filler | None = None

    def fill(self, arrays: Arrays, out: Array) -> None:
        """Make the run from the arrays of its inputs."""
        if self.filler is None:
            out[...] = arrays[0].reshape(-1).view(np.uint8)
        else:
            self.filler.fill(arrays, out)

    def cut(self, limit: int) -> Iterator[Piece]:
        """The run in pieces of about `limit` bytes, each input of which is a part of the same input here; the piece
        itself where it is no longer, or cannot be cut."""
        if self.filler is None or self.nbytes <= limit:
            yield self
        else:
            yield from self.filler.cut(self, limit)


@frozen(slots=True)
class OutTensor:
    """One tensor of the output; `pieces` are its bytes in file order, without gaps."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@frozen
class Matrix:
    """One `[N, K]` matrix of a stored module: the module itself, or one expert's part of a stack.

    role  `linear`, `gate`, `up`, `down`, or `gate_up` (gpt-oss: interleaved rows, one matrix)
    """

    role: str
    N: int
    K: int
    expert: int | None = None


@frozen
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


@frozen
class Refusal:
    """Why the kernel of a layout cannot take a module, for the list of what has no exact layout."""

    reason: str


NO_EMBEDDINGS = Refusal("an embedding is looked up, not multiplied: no XPU kernel reads quantized rows")


@frozen
class Stored:
    """A module of an output repo: its scheme, its tensors by suffix, and how to read them."""

    name: str
    scheme: Scheme
    tensors: Mapping[str, Tensor]
    load: Callable[[Slice], Array]

    def array(self, suffix: str) -> Array:
        """A whole tensor; for the small ones (scales, zero points, g_idx)."""
        return self.load(whole(self.tensors[suffix]))

    def check(self, suffix: str, dtype: str, shape: tuple[int, ...] | None) -> None:
        """Raises DamagedError where a tensor is not as the scheme says.

        Args:
            shape: None where the scheme's granularity is none that the layout has.
        """
        tensor = self.tensors[suffix]
        if tensor.dtype != dtype or tensor.shape != shape:
            wanted = "another granularity" if shape is None else f"{dtype} {list(shape)}"
            raise DamagedError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, config.json says {wanted}")


class Layout(ABC):
    """One on-disk contract, listed in `formats/layouts/__init__.py`.

    name    as it stands in config.json
    family  which `--layout` it belongs to
    kernel  the XPU kernel that reads it, as plans and cards name it; see `kernel_of`
    """

    name: str
    family: str
    kernel: str

    def kernel_of(self, scheme: Scheme, name: str) -> str:
        """The XPU kernel that reads the module `name` stored so."""
        return self.kernel

    @abstractmethod
    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        """What the module becomes in this layout. None where the layout is for another kind of module; a refusal where
        it is for this kind, but the kernel cannot take this one.

        Args:
            scale_dtype: safetensors label of the type that the user wants the scales in; None for the source's.
        """

    @abstractmethod
    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors a stored module has, after the module's name and a dot (experts: the name
        of the stack)."""

    @abstractmethod
    def matrices(self, stored: Stored) -> list[Matrix]:
        """The matrices a stored module holds. Raises DamagedError where shapes or dtypes break the contract."""

    @abstractmethod
    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        """Rows `start:stop` of a matrix, in source column order, by the plain definition of the layout."""

    def as_packed(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Rows:
        """The same rows, packed where the layout can show them so."""
        return self.decode(stored, matrix, start, stop)

    @abstractmethod
    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        """The arrays a kernel takes for rows `start:stop` of one matrix (multiples of 8), by role: see
        `kernels.Layer`."""

    def for_kernels(self, stored: Stored) -> Stored | None:
        """The module as kernels are to be checked on it, under the scheme that they know; None for one they are not."""
        return stored


def copied(tensor: Tensor, name: str | None = None) -> OutTensor:
    """A tensor that keeps its bytes, dtype and shape."""
    pieces = tuple(
        Piece((Slice(as_bytes(tensor), start, stop),), stop - start) for start, stop in row_blocks(tensor.nbytes, 1)
    )
    return OutTensor(name or tensor.name, tensor.dtype, tensor.shape, pieces)
