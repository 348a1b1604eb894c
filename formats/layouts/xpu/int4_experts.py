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
from dataclasses import dataclass
from typing import cast

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.dtypes import nbytes
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
from xpuquant.formats.layouts.stacks import bias_tensor, interleaved, part_rows, stored_matrices, upper_roles
from xpuquant.formats.layouts.xpu.int4_linear import Scales, Words
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, SIGN_FLIP, unpack_nibbles
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import IntWeight, row_blocks
from xpuquant.formats.weights.decoded import Decoded, even_groups
from xpuquant.formats.weights.groups import Regrouping, regroup

GROUP_SIZES = (32, 64, 128, 256)
N_MULTIPLE = 8
"""C++ checks of the grouped GEMM (vllm-xpu-kernels csrc/xpu/grouped_gemm): N % 8 == 0, g in the list above."""


@dataclass(frozen=True)
class SignedWords(Words):
    """Fills rows of two's complement nibbles, from row `start` on."""

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        super().__call__(arrays, out)
        words = out.view(np.uint32)
        np.bitwise_xor(words, SIGN_FLIP, out=words)


class Int4Experts:
    name = "int4_experts"
    family = "xpu"

    def takes(self, module: Module) -> bool:
        return isinstance(module, ExpertStack) and all(
            isinstance(weight, IntWeight) for weights in module.weights.values() for weight in weights
        )

    def refuses(self, module: Module) -> str | None:
        stack = _stack(module)
        for role in stack.weights:
            for weight in _weights(stack, role):
                if weight.bits > 4:
                    return f"{weight.bits}-bit integers have no XPU kernel ({role} of the experts)"
                if not weight.symmetric and not weight.widened:
                    return "asymmetric experts have no XPU kernel (the grouped GEMM has no zero points)"
                if weight.act_order:
                    return "act-order experts have no XPU kernel (the grouped GEMM has no g_idx)"
                if weight.N % N_MULTIPLE or weight.K % GROUP_SIZES[0]:
                    return f"{role} is [{weight.N}, {weight.K}]; the grouped GEMM needs N % 8 == 0, K % 32 == 0"
        if _group_size(stack) is None:
            return f"no group size of {list(GROUP_SIZES)} divides the groups of all experts"
        return None

    def convert(self, module: Module, scale_dtype: str | None) -> Conversion:
        stack = _stack(module)
        size = _group_size(stack)
        assert size is not None, "convert follows refuses"
        dtypes = {weight.scale_dtype for role in stack.weights for weight in _weights(stack, role)}
        # Experts of one tensor have one dtype; float32 holds both others exactly.
        dtype = scale_dtype or (dtypes.pop() if len(dtypes) == 1 else "F32")
        tensors: list[OutTensor] = []
        for out, roles in (("gate_up_proj", upper_roles(stack)), ("down_proj", ("down",))):
            members = [_weights(stack, role) for role in roles]
            N, K = sum(weights[0].N for weights in members), members[0][0].K
            shape = (stack.experts, N)
            words = [piece for e in range(stack.experts) for piece in _word_pieces(stack, roles, e)]
            tensors.append(OutTensor(f"{stack.name}.{out}", "U8", (*shape, K // 2), tuple(words)))
            scales = [piece for e in range(stack.experts) for piece in _scale_pieces(stack, roles, e, size, dtype)]
            tensors.append(OutTensor(f"{stack.name}.{out}_scale", dtype, (*shape, K // size), tuple(scales)))
            if stack.biases:
                tensors.append(bias_tensor(stack, out))
        scheme = Scheme(
            layout=self.name,
            group_size=size,
            scale_dtype=dtype,
            bias=bool(stack.biases),
            interleaved=stack.interleaved,
        )
        facts = dict.fromkeys(fact for role in stack.weights for weight in stack.weights[role] for fact in weight.facts)
        return Conversion(stack.name, scheme, tuple(tensors), tuple(facts))

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        roles = ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale")
        return (*roles, *("gate_up_proj_bias", "down_proj_bias") * scheme.bias)

    def matrices(self, stored: Stored) -> list[Matrix]:
        for part in ("gate_up_proj", "down_proj"):
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


def _word_pieces(stack: ExpertStack, roles: tuple[str, ...], expert: int) -> list[Piece]:
    members = [_weights(stack, role)[expert] for role in roles]
    row_bytes = members[0].K // 2
    if len(members) == 2 and stack.interleaved:
        gate, up = members
        blocks = row_blocks(gate.N, 2 * row_bytes, NIBBLES_PER_WORD)
        return [
            interleaved(
                (gate.word_inputs(a, b), up.word_inputs(a, b)),
                (SignedWords(gate, a), SignedWords(up, a)),
                b - a,
                row_bytes,
            )
            for a, b in blocks
        ]
    return [
        Piece(weight.word_inputs(start, stop), (stop - start) * row_bytes, SignedWords(weight, start))
        for weight in members
        for start, stop in row_blocks(weight.N, row_bytes, NIBBLES_PER_WORD)
    ]


def _scale_pieces(stack: ExpertStack, roles: tuple[str, ...], expert: int, size: int, dtype: str) -> list[Piece]:
    members = [_weights(stack, role)[expert] for role in roles]
    row_bytes = nbytes(dtype, (members[0].K // size,))
    makes = [Scales(weight, _regroup(weight, size), dtype, transposed=True) for weight in members]
    if len(members) == 2 and stack.interleaved:
        gate, up = members
        return [interleaved((gate.scale_inputs(), up.scale_inputs()), (makes[0], makes[1]), gate.N, row_bytes)]
    return [
        Piece(weight.scale_inputs(), weight.N * row_bytes, make) for weight, make in zip(members, makes, strict=True)
    ]


def _stack(module: Module) -> ExpertStack:
    assert isinstance(module, ExpertStack)
    return module


def _weights(stack: ExpertStack, role: str) -> tuple[IntWeight, ...]:
    # `takes` has looked at every one; looking again for each expert would be quadratic in their number.
    return cast("tuple[IntWeight, ...]", stack.weights[role])


def _group_size(stack: ExpertStack) -> int | None:
    """The one group size of a stack: config.json has one per module, and finer groups are exact."""
    size = 0
    for role in stack.weights:
        for weight in _weights(stack, role):
            groups = regroup(weight, GROUP_SIZES, also=(size,))
            if groups is None:
                return None
            size = groups.size
    return size


def _regroup(weight: IntWeight, size: int) -> Regrouping:
    groups = regroup(weight, (size,))
    assert groups is not None, "_group_size divides every weight's groups"
    return groups
