"""What a reader is: tensors of one module in, weights in normal form out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight

Parts = Mapping[str, Tensor]
"""Tensor suffix → tensor, of one module."""

STACKS = ("gate_up_proj", "down_proj")
"""Tensors in which sources stack the experts of a layer."""


class Reader(Protocol):
    """One file of `readers/` per source format, listed in `readers.READERS`."""

    @property
    def name(self) -> str:
        """The format's name, for reports."""
        ...

    @property
    def methods(self) -> frozenset[str]:
        """Values of `quant_method` that may announce this format, as `Checkpoint.method` spells them."""
        ...

    @property
    def suffixes(self) -> frozenset[str]:
        """Tensor suffixes of the format, `weight` and `bias` excepted."""
        ...

    def claims(self, parts: Parts) -> bool:
        """Whether these tensors are a module of this format. Looks at names, dtypes and shapes only."""
        ...

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        """The weights of one module (several for a stacked expert tensor).

        Raises:
            UnsupportedError: sound, but nothing this tool can convert; the message is the reason.
            DamagedError: tensors missing, or of shapes that contradict each other.
        """
        ...


def float_scale(scale: Tensor, dtypes: Sequence[str] = FLOATS) -> Tensor:
    """The tensor itself, which holds scales. Raises DamagedError where its dtype is none of `dtypes`."""
    if scale.dtype not in dtypes:
        raise DamagedError(f"{scale.name} is {scale.dtype}, want one of {', '.join(dtypes)}")
    return scale


def both_quantized(parts: Parts) -> None:
    """Raises UnsupportedError where one of the two stacks of a layer's experts stayed float."""
    for part in STACKS:
        if part in parts and parts[part].dtype in FLOATS:
            raise UnsupportedError(f"the experts of a layer share one format; unquantized: {part} of every expert")


def check_static(scale: Tensor) -> None:
    """Raises UnsupportedError for a scale of activations that is more than one number: a factor of each column."""
    if math.prod(scale.shape) != 1:
        raise UnsupportedError(f"{scale.name} is {scale.dtype} {list(scale.shape)}, want one static scale per tensor")


def need(parts: Parts, suffix: str, name: str, *, dtype: str | None = None, dims: int | None = None) -> Tensor:
    """A tensor a module must have.

    Raises:
        DamagedError: it is missing, or has another dtype or rank.
    """
    tensor = parts.get(suffix)
    if tensor is None:
        raise DamagedError(f"{name}.{suffix} is missing; is a shard incomplete? Download it again")
    if dtype is not None and tensor.dtype != dtype:
        raise DamagedError(f"{tensor.name} is {tensor.dtype}, want {dtype}")
    if dims is not None and len(tensor.shape) != dims:
        raise DamagedError(f"{tensor.name} has shape {list(tensor.shape)}, want {dims} dimensions")
    return tensor
