"""Layouts `uint4_experts` and `int8_experts`: integer experts of a layer, as ARK's expert kernels read them.

    uint4_experts  P.gate_up_proj             uint8 [E, 2I, H/2]   low nibble = even column; unsigned
                   P.down_proj                uint8 [E, H, I/2]
    int8_experts   P.gate_up_proj             int8 [E, 2I, H], asymmetric uint8
                   P.down_proj                int8 [E, H, I], asymmetric uint8
    both           P.gate_up_proj_scale             [E, 2I, H/g]
                   P.down_proj_scale                [E, H, I/g]
    asymmetric     P.gate_up_proj_zero_point  uint8 [E, 2I, H/g]   the true zero points
                   P.down_proj_zero_point     uint8 [E, H, I/g]

P ends in `.experts`; rows of gate_up_proj are all gate, then all up. A value is (code - zero point) * scale.
`uint4_experts` is always asymmetric: symmetric experts of 4 bits are `int4_experts`, which vllm-xpu-kernels computes.

The kernels are `moe_gemm_prefill` and `moe_gemm_decode` of auto-round-lib 0.16 (module `auto_round_kernel`, a pinned
requirement of vLLM on XPU; `_validate_moe_quant_args` has the checks): N % 16 == 0, K % g == 0, scales and zero points
`[E, N, K/g]` in the dtype of the activations, int8 handed over as uint8. They add no bias. Zero points of 0 to 255 are
exact in float16 and bfloat16. Prefill widens a stack to 16 bits first, so (code - zero point) * scale is rounded once.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.layouts.base import Conversion, Layout, Matrix, OutTensor, Piece, Refusal, Stored
from xpuquant.formats.layouts.fillers import FillZeroOctets, octet_pieces, word_pieces
from xpuquant.formats.layouts.int_stacks import Experts, all_weights, expert_scales, int_stack, stacked_scale_dtype
from xpuquant.formats.layouts.modules import ExpertStack, Module
from xpuquant.formats.layouts.scales import rounded
from xpuquant.formats.layouts.stacks import (
    part_rows,
    roles_of_stacks,
    stack_suffixes,
    stored_matrices,
)
from xpuquant.formats.packing.plain import unpack_nibbles
from xpuquant.formats.scheme import ARK_MULTIPLE, Scheme
from xpuquant.formats.weights.decoded import Decoded, each_row, even_groups, subtract_zeros
from xpuquant.formats.weights.integers import IntWeight, common_group_size, divide_groups
from xpuquant.formats.weights.packed import Packed

ARK_GROUP_SIZES = (128, 64, 32, 16)
"""Groups that are written. The kernels take any even size; longer ones are cut, for tensor parallelism to cut I."""


def ark_refusal(stack: ExpertStack) -> str | None:
    """Why ARK's expert kernels cannot take a stack, whatever its numbers; None where they can."""
    if stack.biases:
        return "ARK's expert kernels add no bias"
    if stack.interleaved:
        return "rows that alternate gate and up are written for the grouped GEMM alone"
    for role, _, weight in stack.matrices():
        if weight.N % ARK_MULTIPLE or weight.K % ARK_MULTIPLE:
            return f"{role} is [{weight.N}, {weight.K}]; ARK's expert kernels are given multiples of {ARK_MULTIPLE}"
    return None


class ArkInts(Layout):
    """What the two layouts share: all but the width of a code.

    bits    of a stored code
    packed  columns per stored element
    """

    family = "xpu"
    bits: int
    packed: int

    @abstractmethod
    def fits(self, weights: list[IntWeight]) -> bool:
        """Whether the layout is for a stack of these."""

    @abstractmethod
    def codes(self, weight: IntWeight, symmetric: bool) -> tuple[Piece, ...]:
        """The codes of one expert's matrix."""

    def symmetric(self, weights: list[IntWeight]) -> bool:
        """Whether a stack of these needs no zero points."""
        return False

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if (integers := int_stack(module)) is None or not self.fits(all_weights(integers[1])):
            return None
        stack, experts = integers
        weights = all_weights(experts)
        if any(weight.act_order for weight in weights):
            return Refusal("act-order experts have no XPU kernel (no expert kernel has a g_idx)")
        if (reason := ark_refusal(stack)) is not None:
            return Refusal(reason)
        size = common_group_size(weights, ARK_GROUP_SIZES)
        if size is None:
            return Refusal(f"no group size of {list(ARK_GROUP_SIZES)} divides the groups of all experts")
        symmetric, dtype = self.symmetric(weights), stacked_scale_dtype(experts, scale_dtype)
        tensors = tuple(
            tensor
            for name, roles in roles_of_stacks(stack)
            for tensor in self._tensors(stack, experts, name, roles, size, dtype, symmetric)
        )
        scheme = Scheme(layout=self.name, group_size=size, scale_dtype=dtype, symmetric=symmetric, gated=stack.gated)
        rounded_to = rounded((weight.scale_dtype for weight in weights), scale_dtype)
        return Conversion(stack.name, scheme, tensors, stack.facts, rounded_to)

    def _tensors(
        self,
        stack: ExpertStack,
        experts: Experts,
        name: str,
        roles: tuple[str, ...],
        size: int,
        dtype: str,
        symmetric: bool,
    ) -> list[OutTensor]:
        """`gate_up_proj` or `down_proj`, its scales and zero points."""
        codes: list[Piece] = []
        scales: list[Piece] = []
        zeros: list[Piece] = []
        for expert in range(stack.experts):
            members = [experts[role][expert] for role in roles]
            scales += expert_scales(members, False, size, dtype)
            for weight in members:
                codes += self.codes(weight, symmetric)
                zeros.append(FillZeroOctets(weight, divide_groups(weight, size), octets=self.bits == 8).piece())
        shape, K = (stack.experts, sum(weight.N for weight in members)), members[0].K
        label = self.code_dtype(symmetric)
        tensors = [
            OutTensor(f"{stack.name}.{name}", label, (*shape, K // self.packed), tuple(codes)),
            OutTensor(f"{stack.name}.{name}_scale", dtype, (*shape, K // size), tuple(scales)),
        ]
        if not symmetric:
            tensors.append(OutTensor(f"{stack.name}.{name}_zero_point", "U8", (*shape, K // size), tuple(zeros)))
        return tensors

    def code_dtype(self, symmetric: bool) -> str:
        """safetensors label of the codes."""
        return "I8" if symmetric else "U8"

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        zeros = tuple(f"{part}_zero_point" for part in scheme.stacks) * (not scheme.symmetric)
        return stack_suffixes(scheme) + zeros

    def matrices(self, stored: Stored) -> list[Matrix]:
        scheme = stored.scheme
        for part in stored.scheme.stacks:
            weight, label = stored.tensors[part], self.code_dtype(scheme.symmetric)
            if weight.dtype != label or len(weight.shape) != 3:
                raise DamagedError(
                    f"{weight.name} is {weight.dtype} {list(weight.shape)}, config.json says {label} [E, N, K]"
                )
            E, N, width = weight.shape
            groups = (E, N, width * self.packed // scheme.group_size)
            stored.check(f"{part}_scale", scheme.scale_dtype, groups)
            if not scheme.symmetric:
                stored.check(f"{part}_zero_point", "U8", groups)
        return stored_matrices(stored, packed=self.packed)

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        part, rows = part_rows(stored, matrix, start, stop)
        col = even_groups(matrix.K, stored.scheme.group_size)
        if stored.scheme.symmetric:
            values = rows(part).astype(np.int16)
        else:
            codes = unpack_nibbles(rows(part)) if self.packed == 2 else rows(part)
            values = subtract_zeros(codes, rows(f"{part}_zero_point"), self.bits, col)
        return Decoded("int", values, rows(f"{part}_scale"), each_row(stop - start), col)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        part, rows = part_rows(stored, matrix, start, stop)
        arrays = {"weight": rows(part), "weight_scale": rows(f"{part}_scale")}
        return arrays if stored.scheme.symmetric else arrays | {"weight_zero_point": rows(f"{part}_zero_point")}


class Uint4Experts(ArkInts):
    """At most 4 bits, some with zero points: where others have none, it is 8."""

    name = "uint4_experts"
    kernel = "ARK 0.16 moe, u4"
    bits = 4
    packed = 2

    def fits(self, weights: list[IntWeight]) -> bool:
        return all(weight.bits <= 4 for weight in weights) and any(weight.has_zero_points for weight in weights)

    def codes(self, weight: IntWeight, symmetric: bool) -> tuple[Piece, ...]:
        return word_pieces(weight)

    def as_packed(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Packed:
        part, rows = part_rows(stored, matrix, start, stop)
        scale, zeros = rows(f"{part}_scale"), rows(f"{part}_zero_point")
        col = even_groups(matrix.K, stored.scheme.group_size)
        return Packed("int", rows(part), zeros, scale, each_row(stop - start), col)


class Int8Experts(ArkInts):
    """Any width: code minus zero point of fewer than 8 bits is a signed byte, so only those of 8 need zero points."""

    name = "int8_experts"
    kernel = "ARK 0.16 moe, int8"
    bits = 8
    packed = 1

    def fits(self, weights: list[IntWeight]) -> bool:
        return any(weight.bits > 4 for weight in weights)

    def codes(self, weight: IntWeight, symmetric: bool) -> tuple[Piece, ...]:
        return octet_pieces(weight, signed=symmetric)

    def symmetric(self, weights: list[IntWeight]) -> bool:
        return not any(weight.has_octet_zeros for weight in weights)
