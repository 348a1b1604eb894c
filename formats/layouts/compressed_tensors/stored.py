"""A module of a compressed-tensors output, read back by the code that reads compressed-tensors sources.

That reader shares nothing with what wrote the module, so decoding through it is the proof that others can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.checkpoint import Array, Checkpoint, Slice, whole
from xpuquant.formats.layouts.base import Matrix, Stored
from xpuquant.formats.layouts.compressed_tensors.config import FAMILY, scheme_of
from xpuquant.formats.readers.reading import read
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.decoded import Decoded

_PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_scale")


@dataclass(frozen=True)
class CtStored(Stored):
    """`weight` is the module as our source reader understands it."""

    weight: Weight


class CtLayout:
    """What the layouts of the family share."""

    family = FAMILY

    def matrices(self, stored: Stored) -> list[Matrix]:
        weight = weight_of(stored)
        return [Matrix("linear", weight.N, weight.K)]

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        weight = weight_of(stored)
        return weight.decode([stored.load(part) for part in weight.decode_inputs(start, stop)], start, stop)

    def kernel_scheme(self, stored: Stored) -> Scheme | None:
        """The scheme of the XPU layout that a loader makes of the module without touching its codes; None where no
        kernel takes it."""
        raise NotImplementedError


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


def for_kernels(layout: object, stored: Stored) -> Stored | None:
    """A module as kernels are to be checked on it; None for one they are not.

    Of the experts of a layer only the first is: a kernel that reads one reads all of its shape.
    """
    if not isinstance(layout, CtLayout):
        return stored
    expert = expert_of(stored.name)
    scheme = layout.kernel_scheme(stored)
    if scheme is None or (expert is not None and expert[1] > 0):
        return None
    return replace(stored, scheme=scheme)
