"""One quantized matrix of a source checkpoint in normal form: what a reader yields, what a layout takes.

A `Weight` holds no data. What can be made of it is a `Recipe`: the source slices that will be needed, and the function
that turns their arrays into the normal form. So a plan knows every byte that will be read before one is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

from xpuquant.formats.checkpoint import Array, Slice
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.packed import PackedColumns, Rows
from xpuquant.values import frozen

PIECE_BYTES = 32 << 20
"""Output bytes whose inputs are read at once. Bounds the memory of a conversion (a piece or two per worker); large
enough that most matrices of a `[K/8, N]` source are read in one run, and the columns of others in runs of kilobytes."""

ROWS_MULTIPLE = 32
"""Rows of a block, but the last of a matrix: 32 zero points of any width are whole words."""

CACHED_CODES = 1 << 18
"""Codes unpacked to bytes at once, where there is no direct path: a few such arrays fit the second-level cache."""

Arrays = Sequence[Array]
Build = TypeVar("Build", bound=Callable[..., object])


@frozen(slots=True)
class Recipe(Generic[Build]):
    """Source slices, and what is made of them.

    inputs  the slices to read. For another range of rows they are as many, each along the same axis of the same
            tensor, so that the arrays of a range serve every range inside it (`Slice.inside`)
    build   takes the arrays of the inputs, in their order
    """

    inputs: tuple[Slice, ...]
    build: Build


ArrayRecipe = Recipe[Callable[[Arrays], Array]]
"""Makes an array (a view where possible)."""

FillRecipe = Recipe[Callable[[Arrays, Array], None]]
"""Fills the array that it is given."""

DecodedRecipe = Recipe[Callable[[Arrays], Decoded]]

RowsRecipe = Recipe[Callable[[Arrays], Rows]]
"""Makes rows, packed where they can be; see `packed.py`."""


def all_inputs(recipes: Sequence[Recipe[Any]]) -> tuple[Slice, ...]:
    """The inputs of several recipes, one recipe's after the other's."""
    return tuple(part for recipe in recipes for part in recipe.inputs)


def deal(recipes: Sequence[Recipe[Any]], arrays: Arrays) -> list[Arrays]:
    """The arrays of each recipe, out of those of `all_inputs(recipes)`."""
    left = iter(arrays)
    return [list(islice(left, len(recipe.inputs))) for recipe in recipes]


def row_blocks(N: int, row_bytes: int, multiple: int = 1, limit: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Cut N rows into blocks of about `limit` bytes at most, each a multiple of `multiple` rows but the last."""
    step = max(multiple, limit // max(row_bytes, 1) // multiple * multiple)
    for start in range(0, N, step):
        yield start, min(start + step, N)


@frozen(kw_only=True)
class Weight(ABC):
    """A quantized `[N, K]` matrix of the source.

    name     module name, without the tensor suffix (`model.layers.0.mlp.down_proj`)
    format   the reader's name, for reports
    tensors  every source tensor that belongs to the matrix and is used up by converting it
    bias     the matrix's slice of a stacked bias tensor (gpt-oss); ordinary biases are `name.bias`
    facts    what was decided and from what, for the report (`zero points: minus one (v1), from the words`)
    stack    the tensor in which the unquantized model has the matrix with those of the layer's other experts; empty
             where it has each in a tensor of its own
    """

    name: str
    format: str
    N: int
    K: int
    tensors: tuple[Tensor, ...]
    facts: tuple[str, ...] = ()
    bias: Slice | None = None
    stack: str = ""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Short description for tables: `int4 g64 asymmetric`."""

    @abstractmethod
    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        """Rows `start:stop`, by the plain definition of the format. The verification compares the output with this,
        so it uses nothing of the conversion's fast path."""

    def as_packed(self, start: int, stop: int) -> RowsRecipe:
        """The same rows, packed where the format allows it: for comparing, which is then half the work. Nothing of the
        conversion's fast path either."""
        recipe = self.decoded(start, stop)
        return Recipe(recipe.inputs, recipe.build)

    def as_compared(self, start: int, stop: int) -> Recipe[Callable[[Arrays], Rows | PackedColumns]]:
        """The same rows for nothing but `rows_difference`, which takes some as they lie."""
        recipe = self.as_packed(start, stop)
        return Recipe(recipe.inputs, recipe.build)
