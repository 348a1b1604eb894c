"""What the MXFP4 and MXFP8 expert layouts share: exponents `[E, N, K/32]`, row by row as the source has them.

Rows of `gate_up_proj_scale` are all gate, then all up; gpt-oss alternates gate, up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from xpuquant.formats.layouts.base import Conversion, ExpertStack, Module, OutTensor, Piece, Stored
from xpuquant.formats.layouts.stacks import bias_tensor, interleaved, upper_roles
from xpuquant.formats.layouts.transposed_stacks import (
    STACKS,
    all_parts,
    float_parts,
    is_float_stack,
    one_dtype,
    stack_facts,
)
from xpuquant.formats.layouts.xpu.fp8_linear import check_tensor
from xpuquant.formats.scheme import FP8_DTYPES, Scheme
from xpuquant.formats.weights.floats import MX_GROUP, FloatWeight, Scales

N_MULTIPLE = 8
"""C++ check of the grouped GEMM (vllm-xpu-kernels csrc/xpu/grouped_gemm)."""


def takes_stack(module: Module, dtypes: dict[str, str]) -> bool:
    """Whether every matrix is MX with codes of one of these dtypes."""
    return (
        isinstance(module, ExpertStack)
        and is_float_stack(module)
        and all(part.is_mx and part.dtype in dtypes for part in all_parts(module))
    )


def refuses_stack(module: Module) -> str | None:
    """Limits of the grouped GEMM that both element types share."""
    assert isinstance(module, ExpertStack)
    for part in all_parts(module):
        if part.N % N_MULTIPLE or part.K % MX_GROUP:
            return f"an expert has [{part.N}, {part.K}]; the grouped GEMM needs N % 8 == 0, K % 32 == 0"
    return one_dtype(module)


def convert_stack(
    module: Module, layout: str, codes: Callable[[ExpertStack, str, tuple[str, ...]], OutTensor]
) -> Conversion:
    """A whole stack.

    Args:
        codes: makes `gate_up_proj` or `down_proj` from (stack, name, its roles).
    """
    assert isinstance(module, ExpertStack)
    tensors: list[OutTensor] = []
    for name, roles in zip(STACKS, (upper_roles(module), ("down",)), strict=True):
        tensors += [codes(module, name, roles), _exponents(module, name, roles)]
        if module.biases:
            tensors.append(bias_tensor(module, name))
    scheme = Scheme(
        layout=layout,
        group_size=MX_GROUP,
        scale_dtype="U8",
        bias=bool(module.biases),
        interleaved=module.interleaved,
    )
    if tensors[0].dtype in FP8_DTYPES:
        scheme = replace(scheme, weight_dtype=tensors[0].dtype)
    return Conversion(module.name, scheme, tuple(tensors), stack_facts(module))


def check_exponents(stored: Stored, part: str, E: int, N: int, K: int) -> None:
    """Raises DamagedError where a stack's exponents are not `[E, N, K/32]`."""
    check_tensor(stored.tensors[f"{part}_scale"], "U8", (E, N, K // MX_GROUP))


def _exponents(stack: ExpertStack, name: str, roles: tuple[str, ...]) -> OutTensor:
    pieces: list[Piece] = []
    for e in range(stack.experts):
        members = [part for role in roles for part in float_parts(stack, role, e)]
        G = members[0].K // MX_GROUP
        if stack.interleaved and len(roles) == 2:
            gate, up = members
            inputs = ((gate.scale_rows(0, gate.N),), (up.scale_rows(0, up.N),))
            pieces.append(interleaved(inputs, (_by_row(gate), _by_row(up)), gate.N, G))
            continue
        pieces += [
            Piece((part.scale_rows(0, part.N),), part.N * G, None if _verbatim(part) else _by_row(part))
            for part in members
        ]
    shape = (stack.experts, sum(part.N for part in members), G)
    return OutTensor(f"{stack.name}.{name}_scale", "U8", shape, tuple(pieces))


def _by_row(weight: FloatWeight) -> Scales:
    return Scales(weight, 1, MX_GROUP, "U8", by_row=True)


def _verbatim(weight: FloatWeight) -> bool:
    return weight.block == (1, MX_GROUP) and not weight.exponent_shift and not weight.transposed
