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

from collections.abc import Sequence

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.layouts.base import Conversion, Layout, Matrix, OutTensor, Piece, Refusal, Stored
from xpuquant.formats.layouts.fillers import FillGroupScales, FillInterleaved, FillWords, word_pieces
from xpuquant.formats.layouts.modules import ExpertStack, Module
from xpuquant.formats.layouts.scales import rounded
from xpuquant.formats.layouts.stacks import (
    EXPERT_STACKS,
    GEMM_N_MULTIPLE,
    alternates,
    bias_tensor,
    part_rows,
    roles_of_stacks,
    stack_suffixes,
    stored_matrices,
)
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, unpack_nibbles
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import row_blocks
from xpuquant.formats.weights.decoded import Decoded, even_groups
from xpuquant.formats.weights.integers import IntWeight, common_group_size, divide_groups

GROUP_SIZES = (32, 64, 128, 256)
"""C++ check of the grouped GEMM (vllm-xpu-kernels csrc/xpu/grouped_gemm)."""

Experts = dict[str, list[IntWeight]]
"""Role → weight of each expert, in order."""


class Int4Experts(Layout):
    name = "int4_experts"
    family = "xpu"
    kernel = "grouped GEMM s4"

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, ExpertStack) or (experts := _integers(module)) is None:
            return None
        if (reason := _refusal(experts)) is not None:
            return Refusal(reason)
        weights = [weight for members in experts.values() for weight in members]
        # config.json has one group size per module, and finer groups are exact.
        size = common_group_size(weights, GROUP_SIZES)
        if size is None:
            return Refusal(f"no group size of {list(GROUP_SIZES)} divides the groups of all experts")
        dtypes = {weight.scale_dtype for weight in weights}
        # Experts of one tensor have one dtype; float32 holds both others exactly.
        dtype = scale_dtype or (next(iter(dtypes)) if len(dtypes) == 1 else "F32")
        tensors: list[OutTensor] = []
        for name, roles in roles_of_stacks(module):
            words: list[Piece] = []
            scales: list[Piece] = []
            for expert in range(module.experts):
                members = [experts[role][expert] for role in roles]
                words += _word_pieces(members, alternates(module, roles))
                scales += _scale_pieces(members, alternates(module, roles), size, dtype)
            N, K = sum(weight.N for weight in members), members[0].K
            shape = (module.experts, N)
            tensors.append(OutTensor(f"{module.name}.{name}", "U8", (*shape, K // 2), tuple(words)))
            tensors.append(OutTensor(f"{module.name}.{name}_scale", dtype, (*shape, K // size), tuple(scales)))
            if module.biases:
                tensors.append(bias_tensor(module, name))
        scheme = Scheme(
            layout=self.name,
            group_size=size,
            scale_dtype=dtype,
            bias=bool(module.biases),
            interleaved=module.interleaved,
        )
        return Conversion(module.name, scheme, tuple(tensors), module.facts, rounded(dtypes, scale_dtype))

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return stack_suffixes(scheme)

    def matrices(self, stored: Stored) -> list[Matrix]:
        for part in EXPERT_STACKS:
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
        return Decoded("int", codes, scale, np.arange(stop - start), col)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        part, rows = part_rows(stored, matrix, start, stop)
        arrays = {"weight": rows(part), "weight_scale": rows(f"{part}_scale")}
        return arrays | ({"bias": rows(f"{part}_bias")} if stored.scheme.bias else {})


def _integers(stack: ExpertStack) -> Experts | None:
    """The experts of a stack, all of whose matrices are integer weights; None for any other."""
    experts = {
        role: [weight for weight in members if isinstance(weight, IntWeight)] for role, members in stack.weights.items()
    }
    complete = all(len(members) == len(stack.weights[role]) for role, members in experts.items())
    return experts if complete else None


def _refusal(experts: Experts) -> str | None:
    """Why the kernel cannot take one of the matrices."""
    for role, members in experts.items():
        for weight in members:
            if weight.bits > 4:
                return f"{weight.bits}-bit integers have no XPU kernel ({role} of the experts)"
            if weight.has_zero_points:
                return "asymmetric experts have no XPU kernel (the grouped GEMM has no zero points)"
            if weight.act_order:
                return "act-order experts have no XPU kernel (the grouped GEMM has no g_idx)"
            if weight.N % GEMM_N_MULTIPLE or weight.K % GROUP_SIZES[0]:
                return f"{role} is [{weight.N}, {weight.K}]; the grouped GEMM needs N % 8 == 0, K % 32 == 0"
    return None


def _word_pieces(members: Sequence[IntWeight], alternate: bool) -> list[Piece]:
    """The words of one expert in a stacked tensor; rows of the two members by turns where they `alternate`."""
    if not alternate:
        return [piece for weight in members for piece in word_pieces(weight, signed=True)]
    gate, up = members
    return [
        FillInterleaved(
            FillWords(gate, start, stop, signed=True).piece(),
            FillWords(up, start, stop, signed=True).piece(),
            stop - start,
        ).piece()
        for start, stop in row_blocks(gate.N, gate.K, NIBBLES_PER_WORD)
    ]


def _scale_pieces(members: Sequence[IntWeight], alternate: bool, size: int, dtype: str) -> list[Piece]:
    """The scales of one expert in a stacked tensor, in groups of `size` columns."""
    pieces = [FillGroupScales(each, divide_groups(each, size), dtype, by_row=True).piece() for each in members]
    if not alternate:
        return pieces
    gate, up = pieces
    return [FillInterleaved(gate, up, members[0].N).piece()]
