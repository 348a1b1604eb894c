"""Experts of a layer as one module whose tensors have an axis more: each expert's part is read as a module of its own.

    P.gate_proj.weight            F8 [E, N, K]            Step-3.5: P ends in `moe`; up_proj and down_proj likewise
    P.gate_proj.weight_scale_inv     [E, N/128, K/128]
    P.input_linear.weight         F8 [E, 2I, H]           Granite 3 and 4: P ends in `block_sparse_moe`; gate, then up
    P.input_linear.weight_scale      [E, 2I, 1]           (llm-compressor, examples/quantization_w8a8_fp8/granite4)
    P.output_linear.weight        F8 [E, H, I]

Whatever a format has for one matrix it may have for a stack, so every reader meets the parts as it knows them: the
bytes of one expert, under the tensor's own name. What has no axis of experts (a scale of one number, a shape) is
shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.architecture import stacked_experts
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.readers.base import Parts, Reader
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.floats import view

CODES = ("weight", "weight_packed", "qweight")
"""Tensors that hold the codes of a module, in some format each."""

_SHAPES = ("weight_shape",)
"""Tensors that describe the codes of all experts at once: those of one follow from its own."""


def codes_of_stack(parts: Parts) -> Tensor | None:
    """The 3-D codes of a stack; None for any other module."""
    for suffix in CODES:
        if (codes := parts.get(suffix)) is not None:
            return codes if len(codes.shape) == 3 and codes.dtype not in FLOATS else None
    return None


def expert_parts(name: str, parts: Parts, codes: Tensor) -> Iterator[tuple[str, Parts]]:
    """(name, tensors) of each expert's matrix.

    Raises:
        UnsupportedError: the name does not tell what the matrices are.
        DamagedError: a tensor is of another number of experts.
    """
    for expert in range(codes.shape[0]):
        member = stacked_experts(name, expert)
        if member is None:
            raise UnsupportedError(f"{codes.name} is {codes.dtype} {list(codes.shape)}: a stack of unknown matrices")
        yield (
            member,
            {suffix: _part(tensor, expert, codes) for suffix, tensor in parts.items() if suffix not in _SHAPES},
        )


def read_stack(reader: Reader, checkpoint: Checkpoint, name: str, parts: Parts, codes: Tensor) -> Iterator[Weight]:
    """The weights of a stack. Raises as `Reader.read` and `expert_parts`."""
    described = tuple(parts[suffix] for suffix in _SHAPES if suffix in parts)
    fact = f"experts in one tensor, {list(codes.shape[1:])} each, from the shapes"
    for member, own in expert_parts(name, parts, codes):
        for weight in reader.read(replace(checkpoint, known_as={member: name}), member, own):
            yield replace(
                weight,
                tensors=(*weight.tensors, *described),
                facts=(fact, *weight.facts),
                stack=f"{name}.weight",
            )


def _part(tensor: Tensor, expert: int, codes: Tensor) -> Tensor:
    if tensor.shape in ((), (1,)):
        return tensor
    if tensor.shape[0] != codes.shape[0]:
        raise DamagedError(f"{tensor.name} has shape {list(tensor.shape)}, {codes.name} is of {codes.shape[0]} experts")
    return view(tensor, tensor.dtype, tensor.shape[1:], expert)
