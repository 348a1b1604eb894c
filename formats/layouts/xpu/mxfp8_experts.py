"""Layout `mxfp8_experts`: MXFP8 experts of one layer, as the grouped GEMM of vllm-xpu-kernels reads them.

    P.gate_up_proj        F8_E4M3 or F8_E5M2 [E, H, 2I]   physically transposed
    P.gate_up_proj_scale  uint8 [E, 2I, H/32]   E8M0
    P.down_proj           F8_E4M3 or F8_E5M2 [E, I, H]
    P.down_proj_scale     uint8 [E, H, I/32]
    P.gate_up_proj_bias, P.down_proj_bias  [E, 2I], [E, H]  where the model has them

P ends in `.experts`. The kernel's own order of the exponents is `[E, N, K/32]`; given `[E, K/32, N]`, it transposes
them on every call. It tells the two apart by size, so a square one cannot be given to it.
"""

from __future__ import annotations

import numpy as np

from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Array, Conversion, ExpertStack, Matrix, Module, Stored
from xpuquant.formats.layouts.stacks import upper_roles
from xpuquant.formats.layouts.transposed_stacks import (
    STACKS,
    expert_bias,
    expert_scale,
    stack_suffixes,
    stored_codes,
    transposed_matrices,
    transposed_tensor,
)
from xpuquant.formats.layouts.xpu.mx_experts import check_exponents, convert_stack, refuses_stack, takes_stack
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded, even_groups
from xpuquant.formats.weights.floats import E8M0, ELEMENTS, MX_GROUP


class Mxfp8Experts:
    name = "mxfp8_experts"
    family = "xpu"

    def takes(self, module: Module) -> bool:
        return takes_stack(module, ELEMENTS)

    def refuses(self, module: Module) -> str | None:
        assert isinstance(module, ExpertStack)
        for roles in (upper_roles(module), ("down",)):
            N, K = sum(module.weights[role][0].N for role in roles), module.weights[roles[0]][0].K
            if N * MX_GROUP == K:
                return f"experts of [{N}, {K}] have square exponents, whose axes the grouped GEMM mistakes"
        return refuses_stack(module)

    def convert(self, module: Module, scale_dtype: str | None) -> Conversion:
        """Exponents stay exponents whatever `scale_dtype` says."""
        return convert_stack(module, self.name, transposed_tensor)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return stack_suffixes(scheme)

    def matrices(self, stored: Stored) -> list[Matrix]:
        matrices = transposed_matrices(stored)
        for part in STACKS:
            E, K, N = stored.tensors[part].shape
            check_exponents(stored, part, E, N, K)
        return matrices

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        part, taken, codes = stored_codes(stored, matrix, start, stop)
        return Decoded(
            ELEMENTS[stored.tensors[part].dtype],
            codes.view(np.uint8).T,
            expert_scale(stored, part, matrix)[taken].view(numpy_dtype(E8M0)),
            np.arange(stop - start),
            even_groups(matrix.K, MX_GROUP),
        )

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        part, taken, codes = stored_codes(stored, matrix, start, stop)
        scale = np.ascontiguousarray(expert_scale(stored, part, matrix)[taken])
        arrays = {"weight": np.ascontiguousarray(codes), "weight_scale": scale}
        return arrays | expert_bias(stored, part, matrix, taken)
