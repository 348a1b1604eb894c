"""Layout `fp8_experts`: FP8 experts of one layer, as the grouped GEMM of vllm-xpu-kernels reads them.

    P.gate_up_proj        F8_E4M3 or F8_E5M2 [E, H, 2I]   physically transposed
    P.gate_up_proj_scale  F32 [E], or [E, H/128, 2I/128]
    P.down_proj           F8_E4M3 or F8_E5M2 [E, I, H]
    P.down_proj_scale     F32 [E], or [E, I/128, H/128]
    P.gate_up_proj_bias, P.down_proj_bias  [E, 2I], [E, H]  where the model has them

P ends in `.experts`. The kernel takes one scale per expert and GEMM, or blocks of 128 x 128; nothing per channel,
which is `fp8_channel_experts`. Gate and up that were quantized with different per-tensor scales share a GEMM: serving
engines requantize both to the larger scale. Here they become blocks, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xpuquant.formats.checkpoint import Array
from xpuquant.formats.layouts.base import Conversion, Layout, Matrix, OutTensor, Piece, Stored
from xpuquant.formats.layouts.fillers import FillExpertScales
from xpuquant.formats.layouts.modules import ExpertStack, Module
from xpuquant.formats.layouts.scales import block_start, kept
from xpuquant.formats.layouts.stacks import (
    bias_tensor,
    expert_bias,
    expert_scale,
    float_members,
    fp8_stack,
    roles_of_stacks,
    several_dtypes,
    stack_suffixes,
    transposed_codes,
    transposed_matrices,
    transposed_tensor,
)
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded, even_groups
from xpuquant.formats.weights.floats import ELEMENTS, FP8_BLOCK, FloatWeight


class Fp8Experts(Layout):
    name = "fp8_experts"
    family = "xpu"
    kernel = "grouped GEMM fp8"

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | None:
        if (floats := fp8_stack(module)) is None:
            return None
        stack, sources = floats
        if grouped_gemm_refusal(stack, sources) is not None:
            return None  # `fp8_channel_experts` takes it, or says why nothing does
        blocks = not _per_tensor(stack, sources)
        tensors: list[OutTensor] = []
        for name, roles in roles_of_stacks(stack):
            codes = transposed_tensor(stack, name, roles)
            E, K, N = codes.shape
            shape = (K // FP8_BLOCK, N // FP8_BLOCK) if blocks else ()
            pieces: list[Piece] = []
            for expert in range(E):
                members = float_members(stack, roles, expert)
                pieces.append(FillExpertScales(members if blocks else members[:1], blocks).piece())
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
            gated=stack.gated,
            weight_dtype=tensors[0].dtype,
        )
        facts = list(stack.facts)
        if blocks and all(source.granularity == "tensor" for source in sources):
            differ = "differ" if _known(stack) else "may differ (they were not read)"
            facts.append(f"per-tensor scales of gate and up {differ}: stored as 128x128 blocks, exactly")
        return Conversion(stack.name, scheme, tuple(tensors), (*facts, *kept("F32", scale_dtype)))

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return stack_suffixes(scheme)

    def matrices(self, stored: Stored) -> list[Matrix]:
        matrices = transposed_matrices(stored)
        for part in stored.scheme.stacks:
            E, K, N = stored.tensors[part].shape
            blocks = (K // FP8_BLOCK, N // FP8_BLOCK) if stored.scheme.granularity == "block" else ()
            stored.check(f"{part}_scale", "F32", (E, *blocks))
        return matrices

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        part, taken, codes = transposed_codes(stored, matrix, start, stop)
        scale = expert_scale(stored, part, matrix)
        down, across = (FP8_BLOCK, FP8_BLOCK) if scale.ndim == 2 else (1 << 62, matrix.K)
        return Decoded(
            ELEMENTS[stored.tensors[part].dtype],
            codes.view(np.uint8).T,
            scale.T if scale.ndim == 2 else scale.reshape(1, 1),
            np.arange(taken.start, taken.stop, taken.step) // down,
            even_groups(matrix.K, across),
        )

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        """Rows `start:stop`; where scales cover blocks, `start` is a multiple of their rows."""
        part, taken, codes = transposed_codes(stored, matrix, start, stop)
        scale = expert_scale(stored, part, matrix)
        if scale.ndim == 2:
            scale = scale[:, block_start(stored.scheme, taken.start) : -(-taken.stop // FP8_BLOCK)]
        arrays = {"weight": np.ascontiguousarray(codes), "weight_scale": np.ascontiguousarray(scale)}
        return arrays | expert_bias(stored, part, matrix, taken)


def grouped_gemm_refusal(stack: ExpertStack, sources: Sequence[FloatWeight]) -> str | None:
    """Why the grouped GEMM of vllm-xpu-kernels cannot take a stack of FP8 experts; None where it can."""
    if any(source.granularity == "channel" for source in sources):
        return "the grouped GEMM has no fp8 scales per channel"
    if (reason := several_dtypes(sources)) is not None:
        return reason
    if _per_tensor(stack, sources):
        return None
    cause = "the grouped GEMM's fp8 blocks"
    if all(source.granularity == "tensor" for source in sources):
        cause = f"{'different' if _known(stack) else 'possibly different'} per-tensor scales of gate and up"
    if stack.interleaved and len(stack.upper_roles) == 2:
        return f"{cause} cannot cover columns that alternate gate and up"
    for source in sources:
        if source.granularity == "block" and (source.block[0] % FP8_BLOCK or source.block[1] % FP8_BLOCK):
            return f"the grouped GEMM has no fp8 blocks of {source.block[0]}x{source.block[1]} (128x128)"
        if source.N % FP8_BLOCK or source.K % FP8_BLOCK:
            return f"{cause} need N and K to be multiples of {FP8_BLOCK}, an expert has [{source.N}, {source.K}]"
    return None


def _sharing(stack: ExpertStack) -> list[tuple[FloatWeight, ...]]:
    """Of each expert, the matrices that share a GEMM with another."""
    together = (float_members(stack, stack.upper_roles, expert) for expert in range(stack.experts))
    return [members for members in together if len(members) > 1]


def _known(stack: ExpertStack) -> bool:
    """Whether the per-tensor scales of the matrices that share a GEMM could be read."""
    return all(weight.scale_value is not None for members in _sharing(stack) for weight in members)


def _per_tensor(stack: ExpertStack, sources: Sequence[FloatWeight]) -> bool:
    """Whether one scale per expert and GEMM is exact: the matrices that share a GEMM are known to share it."""
    if any(source.granularity != "tensor" for source in sources):
        return False
    return _known(stack) and all(len({weight.scale_value for weight in members}) == 1 for members in _sharing(stack))
