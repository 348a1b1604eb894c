"""Layout `int4_experts`: the experts of one layer, as the grouped GEMM of vllm-xpu-kernels reads them.

    P.gate_up_proj        uint8 [E, 2I, H/2]   low nibble = even column; two's complement nibbles (u4 XOR 8)
    P.gate_up_proj_scale        [E, 2I, H/g]
    P.down_proj           uint8 [E, H, I/2]
    P.down_proj_scale           [E, H, I/g]
    P.gate_up_proj_bias, P.down_proj_bias  [E, 2I], [E, H]  where the model has them

P ends in `.experts`. Rows of gate_up_proj are all gate, then all up; gpt-oss alternates gate, up. The kernel
(`cutlass_grouped_gemm_interface`) has no zero points, takes g in {32, 64, 128, 256}, and its first forward
would otherwise do the XOR itself, into a second copy of every expert (`implement_zp`).
"""

from __future__ import annotations

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.layouts.base import Conversion, Layout, Matrix, OutTensor, Piece, Refusal, Stored
from xpuquant.formats.layouts.int_stacks import (
    Experts,
    all_weights,
    expert_scales,
    expert_words,
    int_stack,
    stacked_scale_dtype,
)
from xpuquant.formats.layouts.modules import Module
from xpuquant.formats.layouts.scales import rounded
from xpuquant.formats.layouts.stacks import (
    GEMM_N_MULTIPLE,
    alternates,
    bias_tensor,
    part_rows,
    roles_of_stacks,
    stack_suffixes,
    stored_matrices,
)
from xpuquant.formats.packing.plain import unpack_nibbles
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded, each_row, even_groups
from xpuquant.formats.weights.integers import common_group_size
from xpuquant.formats.weights.packed import Packed

GROUP_SIZES = (32, 64, 128, 256)
"""C++ check of the grouped GEMM (vllm-xpu-kernels csrc/xpu/grouped_gemm)."""


class Int4Experts(Layout):
    name = "int4_experts"
    family = "xpu"
    kernel = "grouped GEMM s4"

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if (integers := int_stack(module)) is None:
            return None
        stack, experts = integers
        weights = all_weights(experts)
        if any(weight.bits > 4 or weight.has_zero_points for weight in weights):
            return None
        if (reason := _refusal(experts)) is not None:
            return Refusal(reason)
        # config.json has one group size per module, and finer groups are exact.
        size = common_group_size(weights, GROUP_SIZES)
        if size is None:
            return Refusal(f"no group size of {list(GROUP_SIZES)} divides the groups of all experts")
        dtype = stacked_scale_dtype(experts, scale_dtype)
        tensors: list[OutTensor] = []
        for name, roles in roles_of_stacks(stack):
            words: list[Piece] = []
            scales: list[Piece] = []
            for expert in range(stack.experts):
                members = [experts[role][expert] for role in roles]
                words += expert_words(members, alternates(stack, roles), signed=True)
                scales += expert_scales(members, alternates(stack, roles), size, dtype)
            N, K = sum(weight.N for weight in members), members[0].K
            shape = (stack.experts, N)
            tensors.append(OutTensor(f"{stack.name}.{name}", "U8", (*shape, K // 2), tuple(words)))
            tensors.append(OutTensor(f"{stack.name}.{name}_scale", dtype, (*shape, K // size), tuple(scales)))
            if stack.biases:
                tensors.append(bias_tensor(stack, name))
        scheme = Scheme(
            layout=self.name,
            group_size=size,
            scale_dtype=dtype,
            bias=bool(stack.biases),
            interleaved=stack.interleaved,
            gated=stack.gated,
        )
        rounded_to = rounded((weight.scale_dtype for weight in weights), scale_dtype)
        return Conversion(stack.name, scheme, tuple(tensors), stack.facts, rounded_to)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return stack_suffixes(scheme)

    def matrices(self, stored: Stored) -> list[Matrix]:
        for part in stored.scheme.stacks:
            weight, scale = stored.tensors[part], stored.tensors[f"{part}_scale"]
            if weight.dtype != "U8" or len(weight.shape) != 3:
                raise DamagedError(f"{weight.name} is {weight.dtype} {list(weight.shape)}, want U8 [E, N, K/2]")
            E, N, half = weight.shape
            if scale.shape != (E, N, half * 2 // stored.scheme.group_size):
                raise DamagedError(f"{scale.name} has shape {list(scale.shape)}, weight {list(weight.shape)}")
            if scale.dtype != stored.scheme.scale_dtype:
                raise DamagedError(f"{scale.name} is {scale.dtype}, config.json says {stored.scheme.scale_dtype}")
        return stored_matrices(stored, packed=2)

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        part, rows = part_rows(stored, matrix, start, stop)
        nibbles = unpack_nibbles(rows(part))
        codes = (nibbles ^ np.uint8(8)).view(np.int8) - np.int8(8)  # sign extension
        scale = rows(f"{part}_scale")
        col = even_groups(matrix.K, stored.scheme.group_size)
        return Decoded("int", codes, scale, each_row(stop - start), col)

    def as_packed(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Packed:
        part, rows = part_rows(stored, matrix, start, stop)
        unsigned = rows(part) ^ np.uint8(0x88)  # two's complement n is unsigned n + 8
        col = even_groups(matrix.K, stored.scheme.group_size)
        return Packed("int", unsigned, None, rows(f"{part}_scale"), each_row(stop - start), col)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        part, rows = part_rows(stored, matrix, start, stop)
        arrays = {"weight": rows(part), "weight_scale": rows(f"{part}_scale")}
        return arrays | ({"bias": rows(f"{part}_bias")} if stored.scheme.bias else {})


def _refusal(experts: Experts) -> str | None:
    """Why the kernel cannot take one of the matrices."""
    for role, members in experts.items():
        for weight in members:
            if weight.act_order:
                return "act-order experts have no XPU kernel (the grouped GEMM has no g_idx)"
            if weight.N % GEMM_N_MULTIPLE or weight.K % GROUP_SIZES[0]:
                return f"{role} is [{weight.N}, {weight.K}]; the grouped GEMM needs N % 8 == 0, K % 32 == 0"
    return None
