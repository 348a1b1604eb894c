"""A module of a compressed-tensors output, read back by the code that reads compressed-tensors sources.

That reader shares nothing with what wrote the module, so decoding through it is the proof that others can read it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.checkpoint import Array, Checkpoint, Slice, whole
from xpuquant.formats.layouts.base import Layout, Matrix, Stored
from xpuquant.formats.layouts.compressed_tensors.config import FAMILY, scheme_of
from xpuquant.formats.readers.reading import read
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.packed import Rows
from xpuquant.values import frozen

_PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_scale")


@frozen
class CtStored(Stored):
    """`weight` is the module as our source reader understands it."""

    weight: Weight


class CtLayout(Layout):
    """What the layouts of the family share.

    expert_kernel  the XPU kernel that vLLM's own loader makes the experts of a layer ready for
    """

    family = FAMILY
    expert_kernel: str

    def kernel_of(self, scheme: Scheme, name: str) -> str:
        return self.kernel if expert_of(name) is None else self.expert_kernel

    def matrices(self, stored: Stored) -> list[Matrix]:
        weight = weight_of(stored)
        return [Matrix("linear", weight.N, weight.K)]

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        recipe = weight_of(stored).decoded(start, stop)
        return recipe.build([stored.load(part) for part in recipe.inputs])

    def as_packed(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Rows:
        recipe = weight_of(stored).as_packed(start, stop)
        return recipe.build([stored.load(part) for part in recipe.inputs])

    @abstractmethod
    def kernel_scheme(self, stored: Stored) -> Scheme | None:
        """The scheme of the XPU layout that a loader makes of the module without touching its codes; None where no
        kernel takes it."""

    def for_kernels(self, stored: Stored) -> Stored | None:
        """As a loader makes it. Of the experts of a layer only the first: a kernel that reads one reads all of its
        shape."""
        expert = expert_of(stored.name)
        scheme = self.kernel_scheme(stored)
        if scheme is None or (expert is not None and expert[1] > 0):
            return None
        return replace(stored, scheme=scheme)


def weight_of(stored: Stored) -> Weight:
    """The reader's view of a stored module."""
    assert isinstance(stored, CtStored)
    return stored.weight


def stored_modules(
    quantization: Mapping[str, Any], tensors: Mapping[str, Tensor], load: Callable[[Slice], Array]
) -> dict[str, Stored]:
    """The modules among the tensors of an output, whole ones only.

    Raises:
        DamagedError: config and tensors contradict each other.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix in _PARTS:
            grouped.setdefault(module, {})[suffix] = tensor
    whole_ones = {
        name: parts
        for name, parts in grouped.items()
        if "weight_scale" in parts and ("weight" in parts or "weight_packed" in parts)
    }
    if not whole_ones:
        return {}
    shown = {tensor.name: tensor for parts in whole_ones.values() for tensor in parts.values()}
    checkpoint = Checkpoint({}, quantization, shown, peek=lambda tensor: load(whole(tensor)))
    try:
        reading = read(checkpoint)
    except UnsupportedError as error:
        raise DamagedError(str(error)) from error
    for name, reason in reading.refused.items():
        raise DamagedError(f"{name}: {reason}")
    return {
        weight.name: CtStored(
            weight.name,
            scheme_of(quantization, weight.name, whole_ones[weight.name]),
            whole_ones[weight.name],
            load,
            weight,
        )
        for weight in reading.weights
    }
