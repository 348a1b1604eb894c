"""Layout `mxfp4_experts`: MXFP4 experts of one layer, as the grouped GEMM of vllm-xpu-kernels reads them.

    P.gate_up_proj        uint8 [E, 2I, H/2]    E2M1 nibbles, low nibble = even column
    P.gate_up_proj_scale  uint8 [E, 2I, H/32]   E8M0
    P.down_proj           uint8 [E, H, I/2]
    P.down_proj_scale     uint8 [E, H, I/32]
    P.gate_up_proj_bias, P.down_proj_bias  [E, 2I], [E, H]  where the model has them

P ends in `.experts`. Rows of gate_up_proj are all gate, then all up; gpt-oss alternates gate, up, as its activation
kernel reads them (`swigluoai_and_mul`). gpt-oss as published is this layout already, but for its names and shapes.
"""

from __future__ import annotations

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import (
    Array,
    Cast,
    Conversion,
    ExpertStack,
    Matrix,
    Module,
    OutTensor,
    Piece,
    Stored,
)
from xpuquant.formats.layouts.stacks import interleaved, part_rows, stored_matrices
from xpuquant.formats.layouts.transposed_stacks import STACKS, float_parts, stack_suffixes
from xpuquant.formats.layouts.xpu.mx_experts import check_exponents, convert_stack, refuses_stack, takes_stack
from xpuquant.formats.packing.plain import unpack_nibbles
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import row_blocks
from xpuquant.formats.weights.decoded import Decoded, even_groups
from xpuquant.formats.weights.floats import E8M0, MX_GROUP


class Mxfp4Experts:
    name = "mxfp4_experts"
    family = "xpu"

    def takes(self, module: Module) -> bool:
        return takes_stack(module, {"U8": "e2m1"})

    def refuses(self, module: Module) -> str | None:
        return refuses_stack(module)

    def convert(self, module: Module, scale_dtype: str | None) -> Conversion:
        """Exponents stay exponents whatever `scale_dtype` says."""
        return convert_stack(module, self.name, _nibbles)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return stack_suffixes(scheme)

    def matrices(self, stored: Stored) -> list[Matrix]:
        for part in STACKS:
            weight = stored.tensors[part]
            if weight.dtype != "U8" or len(weight.shape) != 3:
                raise DamagedError(f"{weight.name} is {weight.dtype} {list(weight.shape)}, want U8 [E, N, K/2]")
            E, N, half = weight.shape
            check_exponents(stored, part, E, N, 2 * half)
        return stored_matrices(stored, packed=2)

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        part, rows = part_rows(stored, matrix, start, stop)
        return Decoded(
            "e2m1",
            unpack_nibbles(rows(part)),
            rows(f"{part}_scale").view(numpy_dtype(E8M0)),
            np.arange(stop - start),
            even_groups(matrix.K, MX_GROUP),
        )

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        part, rows = part_rows(stored, matrix, start, stop)
        arrays = {"weight": rows(part), "weight_scale": rows(f"{part}_scale")}
        return arrays | ({"bias": rows(f"{part}_bias")} if stored.scheme.bias else {})


def _nibbles(stack: ExpertStack, name: str, roles: tuple[str, ...]) -> OutTensor:
    """`[E, N, K/2]` codes, byte for byte."""
    pieces: list[Piece] = []
    for e in range(stack.experts):
        members = [part for role in roles for part in float_parts(stack, role, e)]
        width = members[0].K // 2
        if stack.interleaved and len(roles) == 2:
            gate, up = members
            pieces += [
                interleaved(((gate.code_rows(a, b),), (up.code_rows(a, b),)), (Cast("U8"), Cast("U8")), b - a, width)
                for a, b in row_blocks(gate.N, 2 * width)
            ]
            continue
        pieces += [
            Piece((part.code_rows(a, b),), (b - a) * width) for part in members for a, b in row_blocks(part.N, width)
        ]
    shape = (stack.experts, sum(part.N for part in members), width)
    return OutTensor(f"{stack.name}.{name}", "U8", shape, tuple(pieces))
