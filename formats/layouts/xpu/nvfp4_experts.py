"""Layout `nvfp4_experts`: NVFP4 experts of a layer as integers, which ARK's expert kernels read.

    P.gate_up_proj               int8     [E, 2I, H]     twice the E2M1 numbers: -12 to 12
    P.gate_up_proj_scale         bfloat16 [E, 2I, H/16]
    P.gate_up_proj_global_scale  float32  [E, 2]         of gate and of up
    P.down_proj                  int8     [E, H, I]
    P.down_proj_scale            bfloat16 [E, H, I/16]
    P.down_proj_global_scale     float32  [E, 1]

P ends in `.experts`; rows of gate_up_proj are all gate, then all up. An expert's global scale multiplies the product of
its matrix (where the scheme says `divides` it is its divisor): that of gate and of up before the activation, which is
not linear. Scales are as in `nvfp4_linear.py`.

The kernels are those of `ark_experts.py`, with 8 bits, symmetric, in groups of 16. Prefill widens a stack to 16 bits: 2
significant bits times 4 are exact there, as the code times the scale is not for other integers.
"""

from __future__ import annotations

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.checkpoint import rows as rows_of
from xpuquant.formats.layouts.base import Conversion, Layout, Matrix, OutTensor, Piece, Refusal, Stored
from xpuquant.formats.layouts.modules import ExpertStack, Module
from xpuquant.formats.layouts.nvfp4_fillers import FillGlobalScales, FillHalvedScales, FillIntegers, row_pieces
from xpuquant.formats.layouts.scales import kept
from xpuquant.formats.layouts.stacks import (
    part_of,
    part_rows,
    roles_of_stacks,
    stack_suffixes,
    stored_matrices,
)
from xpuquant.formats.layouts.xpu.ark_experts import ark_refusal
from xpuquant.formats.layouts.xpu.nvfp4_linear import check_scheme, doubled
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.nvfp4 import GROUP, Nvfp4Weight
from xpuquant.formats.weights.parts import source_matrices

_NUMBERS = {"gate_up_proj": 2, "up_proj": 1, "down_proj": 1}
"""Global scales of an expert in each tensor."""


class Nvfp4Experts(Layout):
    name = "nvfp4_experts"
    family = "xpu"
    kernel = "ARK 0.16 moe, int8"

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, ExpertStack):
            return None
        sources = [source for _, _, weight in module.matrices() for source in source_matrices(weight)]
        if not all(isinstance(source, Nvfp4Weight) for source in sources):
            return None
        if (reason := ark_refusal(module)) is not None:
            return Refusal(reason)
        divides = {weight.divides for _, _, weight in module.matrices() if isinstance(weight, Nvfp4Weight)}
        if len(divides) > 1:
            return Refusal("of experts of one layer some have a factor for a global scale, some a divisor")
        tensors = tuple(tensor for name, roles in roles_of_stacks(module) for tensor in _tensors(module, name, roles))
        scheme = Scheme(
            layout=self.name, group_size=GROUP, scale_dtype="BF16", divides=divides.pop(), gated=module.gated
        )
        return Conversion(module.name, scheme, tensors, (*module.facts, *kept("BF16", scale_dtype)))

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return (*stack_suffixes(scheme), *(f"{part}_global_scale" for part in scheme.stacks))

    def matrices(self, stored: Stored) -> list[Matrix]:
        check_scheme(stored)
        for part in stored.scheme.stacks:
            weight = stored.tensors[part]
            if weight.dtype != "I8" or len(weight.shape) != 3:
                raise DamagedError(f"{weight.name} is {weight.dtype} {list(weight.shape)}, want I8 [E, N, K]")
            E, N, K = weight.shape
            stored.check(f"{part}_scale", "BF16", (E, N, K // GROUP))
            stored.check(f"{part}_global_scale", "F32", (E, _NUMBERS[part]))
        return stored_matrices(stored)

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        part, rows = part_rows(stored, matrix, start, stop)
        return doubled(rows(part), rows(f"{part}_scale"), _number(stored, matrix), stored.scheme)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        part, rows = part_rows(stored, matrix, start, stop)
        number = _number(stored, matrix)
        return {"weight": rows(part), "weight_scale": rows(f"{part}_scale"), "global_scale": number}


def _tensors(stack: ExpertStack, name: str, roles: tuple[str, ...]) -> list[OutTensor]:
    """`gate_up_proj` or `down_proj` and its scales."""
    codes: list[Piece] = []
    scales: list[Piece] = []
    numbers: list[Piece] = []
    for expert in range(stack.experts):
        members = [weight for role in roles if isinstance(weight := stack.weights[role][expert], Nvfp4Weight)]
        for weight in members:
            codes += row_pieces(FillIntegers, weight)
            scales.append(FillHalvedScales(weight, by_row=True).piece())
        # gate and up that are one matrix have one, twice.
        numbers.append(FillGlobalScales(tuple(members * (_NUMBERS[name] // len(members)))).piece())
    shape, K = (stack.experts, sum(weight.N for weight in members)), members[0].K
    return [
        OutTensor(f"{stack.name}.{name}", "I8", (*shape, K), tuple(codes)),
        OutTensor(f"{stack.name}.{name}_scale", "BF16", (*shape, K // GROUP), tuple(scales)),
        OutTensor(f"{stack.name}.{name}_global_scale", "F32", (stack.experts, _NUMBERS[name]), tuple(numbers)),
    ]


def _number(stored: Stored, matrix: Matrix) -> Array:
    """float32 `[1]`: the global scale of one expert's matrix."""
    assert matrix.expert is not None, "a matrix of a stack is an expert's"
    table = stored.tensors[f"{part_of(stored.scheme, matrix)}_global_scale"]
    place = int(matrix.role == "up" and stored.scheme.gated)
    return stored.load(rows_of(table, matrix.expert, matrix.expert + 1))[0, place : place + 1]
