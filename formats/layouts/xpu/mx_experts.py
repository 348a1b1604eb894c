"""Layouts `mxfp4_experts` and `mxfp8_experts`: MX experts of a layer, as vllm-xpu-kernels' grouped GEMM reads them.

    mxfp4_experts  P.gate_up_proj        uint8 [E, 2I, H/2]    E2M1 nibbles, low nibble = even column
                   P.down_proj           uint8 [E, H, I/2]
    mxfp8_experts  P.gate_up_proj        F8_E4M3 or F8_E5M2 [E, H, 2I]   physically transposed
                   P.down_proj           F8_E4M3 or F8_E5M2 [E, I, H]
    both           P.gate_up_proj_scale  uint8 [E, 2I, H/32]   E8M0
                   P.down_proj_scale     uint8 [E, H, I/32]
                   P.gate_up_proj_bias, P.down_proj_bias  [E, 2I], [E, H]  where the model has them

P ends in `.experts`. Rows of gate_up_proj are all gate, then all up; gpt-oss alternates gate, up, as its activation
kernel reads them (`swigluoai_and_mul`). gpt-oss as published is `mxfp4_experts` already, but for its names and shapes.

The kernel's own order of MXFP8's exponents is `[E, N, K/32]`; given `[E, K/32, N]`, it transposes them on every call.
It tells the two apart by size, so a square one cannot be given to it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Conversion, Layout, Matrix, OutTensor, Piece, Refusal, Stored
from xpuquant.formats.layouts.fillers import FillBlockScales, FillInterleaved, code_pieces
from xpuquant.formats.layouts.modules import ExpertStack, Module
from xpuquant.formats.layouts.scales import kept
from xpuquant.formats.layouts.stacks import (
    GEMM_N_MULTIPLE,
    alternates,
    bias_tensor,
    expert_bias,
    expert_scale,
    float_members,
    float_stack,
    part_rows,
    roles_of_stacks,
    several_dtypes,
    stack_suffixes,
    stored_matrices,
    transposed_codes,
    transposed_matrices,
    transposed_tensor,
)
from xpuquant.formats.scheme import FP8_DTYPES, Scheme
from xpuquant.formats.weights.base import row_blocks
from xpuquant.formats.weights.decoded import Decoded, each_row, even_groups
from xpuquant.formats.weights.floats import E8M0, ELEMENTS, MX_GROUP, FloatWeight
from xpuquant.formats.weights.packed import Packed

NIBBLES = {"U8": "e2m1"}


class MxExperts(Layout):
    """What the two layouts share: limits, and exponents row by row as the source has them.

    elements  dtype label of the stored codes → `Decoded.number`
    """

    family = "xpu"
    elements: dict[str, str]

    @abstractmethod
    def codes(self, stack: ExpertStack, name: str, roles: tuple[str, ...]) -> OutTensor:
        """The codes of `gate_up_proj` or `down_proj`."""

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if (floats := float_stack(module)) is None:
            return None
        stack, sources = floats
        if not all(source.is_mx and source.dtype in self.elements for source in sources):
            return None
        if (reason := self.refusal(stack, sources)) is not None:
            return Refusal(reason)
        tensors: list[OutTensor] = []
        for name, roles in roles_of_stacks(stack):
            tensors += [self.codes(stack, name, roles), _exponents(stack, name, roles)]
            if stack.biases:
                tensors.append(bias_tensor(stack, name))
        scheme = Scheme(
            layout=self.name,
            group_size=MX_GROUP,
            scale_dtype="U8",
            bias=bool(stack.biases),
            interleaved=stack.interleaved,
            gated=stack.gated,
        )
        if tensors[0].dtype in FP8_DTYPES:
            scheme = replace(scheme, weight_dtype=tensors[0].dtype)
        return Conversion(stack.name, scheme, tuple(tensors), (*stack.facts, *kept("U8", scale_dtype)))

    def refusal(self, stack: ExpertStack, sources: list[FloatWeight]) -> str | None:
        """Why the kernel cannot take a stack of these source matrices, or None."""
        for source in sources:
            if source.N % GEMM_N_MULTIPLE or source.K % MX_GROUP:
                return f"an expert has [{source.N}, {source.K}]; the grouped GEMM needs N % 8 == 0, K % 32 == 0"
        return several_dtypes(sources)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return stack_suffixes(scheme)


class Mxfp4Experts(MxExperts):
    name = "mxfp4_experts"
    kernel = "grouped GEMM mxfp4"
    elements = NIBBLES

    def codes(self, stack: ExpertStack, name: str, roles: tuple[str, ...]) -> OutTensor:
        """`[E, N, K/2]`, byte for byte."""
        pieces: list[Piece] = []
        for expert in range(stack.experts):
            members = float_members(stack, roles, expert)
            width = members[0].K // 2
            if alternates(stack, roles):
                for start, stop in row_blocks(members[0].N, 2 * width):
                    even, odd = (Piece((each.code_rows(start, stop),), (stop - start) * width) for each in members)
                    pieces.append(FillInterleaved(even, odd, stop - start).piece())
            else:
                pieces += [piece for member in members for piece in code_pieces(member)]
        shape = (stack.experts, sum(member.N for member in members), width)
        return OutTensor(f"{stack.name}.{name}", "U8", shape, tuple(pieces))

    def matrices(self, stored: Stored) -> list[Matrix]:
        for part in stored.scheme.stacks:
            weight = stored.tensors[part]
            if weight.dtype != "U8" or len(weight.shape) != 3:
                raise DamagedError(f"{weight.name} is {weight.dtype} {list(weight.shape)}, want U8 [E, N, K/2]")
            E, N, half = weight.shape
            stored.check(f"{part}_scale", "U8", (E, N, 2 * half // MX_GROUP))
        return stored_matrices(stored, packed=2)

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        return self.as_packed(stored, matrix, start, stop).decoded()

    def as_packed(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Packed:
        part, rows = part_rows(stored, matrix, start, stop)
        scale, col = rows(f"{part}_scale").view(numpy_dtype(E8M0)), even_groups(matrix.K, MX_GROUP)
        return Packed("e2m1", rows(part), None, scale, each_row(stop - start), col)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        part, rows = part_rows(stored, matrix, start, stop)
        arrays = {"weight": rows(part), "weight_scale": rows(f"{part}_scale")}
        return arrays | ({"bias": rows(f"{part}_bias")} if stored.scheme.bias else {})


class Mxfp8Experts(MxExperts):
    name = "mxfp8_experts"
    kernel = "grouped GEMM mxfp8"
    elements = ELEMENTS

    def refusal(self, stack: ExpertStack, sources: list[FloatWeight]) -> str | None:
        for _, roles in roles_of_stacks(stack):
            N, K = sum(stack.weights[role][0].N for role in roles), stack.weights[roles[0]][0].K
            if N * MX_GROUP == K:
                return f"experts of [{N}, {K}] have square exponents, whose axes the grouped GEMM mistakes"
        return super().refusal(stack, sources)

    def codes(self, stack: ExpertStack, name: str, roles: tuple[str, ...]) -> OutTensor:
        return transposed_tensor(stack, name, roles)

    def matrices(self, stored: Stored) -> list[Matrix]:
        matrices = transposed_matrices(stored)
        for part in stored.scheme.stacks:
            E, K, N = stored.tensors[part].shape
            stored.check(f"{part}_scale", "U8", (E, N, K // MX_GROUP))
        return matrices

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        part, taken, codes = transposed_codes(stored, matrix, start, stop)
        return Decoded(
            ELEMENTS[stored.tensors[part].dtype],
            codes.view(np.uint8).T,
            expert_scale(stored, part, matrix)[taken].view(numpy_dtype(E8M0)),
            each_row(stop - start),
            even_groups(matrix.K, MX_GROUP),
        )

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        part, taken, codes = transposed_codes(stored, matrix, start, stop)
        scale = np.ascontiguousarray(expert_scale(stored, part, matrix)[taken])
        arrays = {"weight": np.ascontiguousarray(codes), "weight_scale": scale}
        return arrays | expert_bias(stored, part, matrix, taken)


def _exponents(stack: ExpertStack, name: str, roles: tuple[str, ...]) -> OutTensor:
    """`[E, N, K/32]` of `gate_up_proj` or `down_proj`."""
    pieces: list[Piece] = []
    for expert in range(stack.experts):
        members = float_members(stack, roles, expert)
        of_members = [FillBlockScales(member, 1, MX_GROUP, "U8", by_row=True).piece() for member in members]
        if alternates(stack, roles):
            gate, up = of_members
            pieces.append(FillInterleaved(gate, up, members[0].N).piece())
        else:
            pieces += of_members
    shape = (stack.experts, sum(member.N for member in members), members[0].K // MX_GROUP)
    return OutTensor(f"{stack.name}.{name}_scale", "U8", shape, tuple(pieces))
