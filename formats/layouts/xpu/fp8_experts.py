"""Layout `fp8_experts`: FP8 experts of one layer, as the grouped GEMM of vllm-xpu-kernels reads them.

    P.gate_up_proj        F8_E4M3 or F8_E5M2 [E, H, 2I]   physically transposed
    P.gate_up_proj_scale  F32 [E], or [E, H/128, 2I/128]
    P.down_proj           F8_E4M3 or F8_E5M2 [E, I, H]
    P.down_proj_scale     F32 [E], or [E, I/128, H/128]
    P.gate_up_proj_bias, P.down_proj_bias  [E, 2I], [E, H]  where the model has them

P ends in `.experts`. The kernel takes one scale per expert and GEMM, or blocks of 128 x 128; nothing per channel.
Gate and up that were quantized with different per-tensor scales share a GEMM: serving engines requantize both to the
larger scale. Here they become blocks, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.formats.layouts.base import (
    Array,
    Conversion,
    ExpertStack,
    Matrix,
    Module,
    OutTensor,
    Piece,
    Stored,
)
from xpuquant.formats.layouts.stacks import bias_tensor, upper_roles
from xpuquant.formats.layouts.transposed_stacks import (
    STACKS,
    all_parts,
    expert_bias,
    expert_scale,
    float_parts,
    is_float_stack,
    one_dtype,
    stack_facts,
    stack_suffixes,
    stored_codes,
    transposed_matrices,
    transposed_tensor,
)
from xpuquant.formats.layouts.xpu.fp8_linear import block_start, check_tensor
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded, even_groups
from xpuquant.formats.weights.floats import ELEMENTS, FP8_BLOCK, FloatWeight


@dataclass(frozen=True)
class StackScales:
    """Fills the float32 scales of one expert: one number, or `[K/128, N/128]` of matrices that lie side by side."""

    members: tuple[FloatWeight, ...]
    blocks: bool

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        target = out.view(np.float32)
        if not self.blocks:
            target[...] = self.members[0].grid(arrays[0]).astype(np.float32).reshape(1)
            return
        grids = [
            weight.spread(weight.grid(array), FP8_BLOCK, FP8_BLOCK)
            for weight, array in zip(self.members, arrays, strict=True)
        ]
        scales = np.concatenate([grid.astype(np.float32) for grid in grids]).T
        target.reshape(scales.shape)[...] = scales


class Fp8Experts:
    name = "fp8_experts"
    family = "xpu"

    def takes(self, module: Module) -> bool:
        return (
            isinstance(module, ExpertStack)
            and is_float_stack(module)
            and not any(part.is_mx or part.dtype not in ELEMENTS for part in all_parts(module))
        )

    def refuses(self, module: Module) -> str | None:
        stack = _stack(module)
        if any(part.granularity == "channel" for part in all_parts(stack)):
            return "per-channel fp8 experts have no XPU kernel (one scale per expert, or 128x128 blocks)"
        if reason := one_dtype(stack):
            return reason
        if _per_tensor(stack):
            return None
        cause = "fp8 block scales"
        if all(part.granularity == "tensor" for part in all_parts(stack)):
            known = all(part.scale_value is not None for part in _sharing(stack))
            cause = f"{'different' if known else 'possibly different'} per-tensor scales of gate and up"
        if stack.interleaved and len(upper_roles(stack)) == 2:
            return f"{cause} cannot cover columns that alternate gate and up"
        for part in all_parts(stack):
            if part.granularity == "block" and (part.block[0] % FP8_BLOCK or part.block[1] % FP8_BLOCK):
                return f"fp8 blocks of {part.block[0]}x{part.block[1]} have no XPU expert kernel (128x128)"
            if part.N % FP8_BLOCK or part.K % FP8_BLOCK:
                return f"{cause} need N and K to be multiples of {FP8_BLOCK}, an expert has [{part.N}, {part.K}]"
        return None

    def convert(self, module: Module, scale_dtype: str | None) -> Conversion:
        """The scales are float32 whatever `scale_dtype` says: the kernel takes nothing else."""
        stack = _stack(module)
        blocks = not _per_tensor(stack)
        tensors: list[OutTensor] = []
        for name, roles in zip(STACKS, (upper_roles(stack), ("down",)), strict=True):
            codes = transposed_tensor(stack, name, roles)
            E, K, N = codes.shape
            shape = (K // FP8_BLOCK, N // FP8_BLOCK) if blocks else ()
            pieces: list[Piece] = []
            for e in range(E):
                members = tuple(part for role in roles for part in float_parts(stack, role, e))
                inputs = tuple(weight.scale_rows(0, weight.N) for weight in members)
                pieces.append(
                    Piece(
                        inputs if blocks else inputs[:1],
                        4 * int(np.prod(shape)),
                        StackScales(members, blocks),
                    )
                )
            tensors += [codes, OutTensor(f"{stack.name}.{name}_scale", "F32", (E, *shape), tuple(pieces))]
            if stack.biases:
                tensors.append(bias_tensor(stack, name))
        scheme = Scheme(
            layout=self.name,
            granularity="block" if blocks else "tensor",
            group_size=FP8_BLOCK if blocks else 0,
            block_n=FP8_BLOCK if blocks else 0,
            scale_dtype="F32",
            bias=bool(stack.biases),
            interleaved=stack.interleaved,
            weight_dtype=tensors[0].dtype,
        )
        sources = all_parts(stack)
        facts = list(stack_facts(stack))
        if blocks and all(part.granularity == "tensor" for part in sources):
            known = all(part.scale_value is not None for part in _sharing(stack))
            differ = "differ" if known else "may differ (they were not read)"
            facts.append(f"per-tensor scales of gate and up {differ}: stored as 128x128 blocks, exactly")
        return Conversion(stack.name, scheme, tuple(tensors), tuple(facts))

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return stack_suffixes(scheme)

    def matrices(self, stored: Stored) -> list[Matrix]:
        matrices = transposed_matrices(stored)
        for part in STACKS:
            E, K, N = stored.tensors[part].shape
            blocks = (K // FP8_BLOCK, N // FP8_BLOCK) if stored.scheme.granularity == "block" else ()
            check_tensor(stored.tensors[f"{part}_scale"], "F32", (E, *blocks))
        return matrices

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        part, taken, codes = stored_codes(stored, matrix, start, stop)
        scale = expert_scale(stored, part, matrix)
        down, across = (FP8_BLOCK, FP8_BLOCK) if scale.ndim == 2 else (1 << 62, matrix.K)
        return Decoded(
            ELEMENTS[stored.tensors[part].dtype],
            codes.view(np.uint8).T,
            scale.T if scale.ndim == 2 else scale.reshape(1, 1),
            np.arange(taken.start, taken.stop, taken.step or 1) // down,
            even_groups(matrix.K, across),
        )

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        """Rows `start:stop`; where scales cover blocks, `start` is a multiple of their rows."""
        part, taken, codes = stored_codes(stored, matrix, start, stop)
        scale = expert_scale(stored, part, matrix)
        if scale.ndim == 2:
            scale = scale[:, block_start(stored.scheme, taken.start) : -(-taken.stop // FP8_BLOCK)]
        arrays = {"weight": np.ascontiguousarray(codes), "weight_scale": np.ascontiguousarray(scale)}
        return arrays | expert_bias(stored, part, matrix, taken)


def _stack(module: Module) -> ExpertStack:
    assert isinstance(module, ExpertStack)
    return module


def _sharing(stack: ExpertStack) -> list[FloatWeight]:
    """The matrices that share a GEMM with another."""
    together = [
        [part for role in upper_roles(stack) for part in float_parts(stack, role, e)] for e in range(stack.experts)
    ]
    return [part for members in together if len(members) > 1 for part in members]


def _per_tensor(stack: ExpertStack) -> bool:
    """Whether one scale per expert and GEMM is exact: the matrices that share a GEMM are known to share it."""
    if any(part.granularity != "tensor" for part in all_parts(stack)):
        return False
    for e in range(stack.experts):
        members = [part for role in upper_roles(stack) for part in float_parts(stack, role, e)]
        values = {part.scale_value for part in members}
        if len(members) > 1 and (len(values) > 1 or None in values):
            return False
    return True
