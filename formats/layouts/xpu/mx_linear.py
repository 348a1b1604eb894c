"""Layouts `mxfp4_linear` and `mxfp8_linear`: MX linears, as oneDNN's matmuls read them.

Codes lie as they come, exponents are turned on their side.

    mxfp4_linear   P.weight  uint8 [N, K/2]               E2M1 nibbles (sign << 3 | magnitude), low nibble = even column
    mxfp8_linear   P.weight  F8_E4M3 or F8_E5M2 [N, K]
    both           P.weight_scale  uint8 [K/32, N]        E8M0: 2^(byte - 127), 255 is NaN

(OCP Microscaling Formats v1.0, section 5.4.1.) The kernels, `fp4_gemm` and `fp8_gemm` of vllm-xpu-kernels
(csrc/xpu/onednn), take the weight as `.t()`, MXFP4's viewed as `float4_e2m1fn_x2`, and activations in the same format:
there is no 16-bit-activation kernel for MX linears, but for MXFP8 of one group (`xpu_ops.rounds_activations`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.architecture import is_embedding
from xpuquant.formats.checkpoint import Array, columns, rows
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import NO_EMBEDDINGS, Conversion, Layout, Matrix, OutTensor, Refusal, Stored
from xpuquant.formats.layouts.fillers import FillBlockScales, code_pieces
from xpuquant.formats.layouts.modules import Linear, Module
from xpuquant.formats.layouts.scales import kept
from xpuquant.formats.scheme import FP8_DTYPES, Scheme
from xpuquant.formats.weights.decoded import Decoded, each_row, even_groups
from xpuquant.formats.weights.floats import E8M0, ELEMENTS, MX_GROUP, FloatWeight
from xpuquant.formats.weights.packed import Packed, Rows, unpacked_rows
from xpuquant.values import frozen


@frozen
class MxLinear(Layout):
    """A layout of MX linears.

    name      of the layout
    kernel    that reads it
    elements  dtype label of the stored codes → `Decoded.number`
    packed    columns per stored element
    """

    name: str
    kernel: str
    elements: dict[str, str]
    packed: int

    family = "xpu"

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, Linear) or not isinstance(module.weight, FloatWeight):
            return None
        name, weight = module.name, module.weight
        if not weight.is_mx or weight.dtype not in self.elements:
            return None
        if is_embedding(name):
            return NO_EMBEDDINGS
        N, K = weight.N, weight.K
        if K % MX_GROUP:
            return Refusal(f"K={K} is not a multiple of {MX_GROUP}")
        scales = FillBlockScales(weight, 1, MX_GROUP, "U8").piece()
        tensors = (
            OutTensor(f"{name}.weight", weight.dtype, (N, K // self.packed), code_pieces(weight)),
            OutTensor(f"{name}.weight_scale", "U8", (K // MX_GROUP, N), (scales,)),
        )
        scheme = Scheme(layout=self.name, group_size=MX_GROUP, scale_dtype="U8")
        if weight.dtype in FP8_DTYPES:
            scheme = replace(scheme, weight_dtype=weight.dtype)
        return Conversion(name, scheme, tensors, (*weight.facts, *kept("U8", scale_dtype)))

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return ("weight", "weight_scale")

    def matrices(self, stored: Stored) -> list[Matrix]:
        weight = stored.tensors["weight"]
        wanted = stored.scheme.weight_dtype if self.packed == 1 else "U8"
        if weight.dtype != wanted or len(weight.shape) != 2:
            raise DamagedError(
                f"{weight.name} is {weight.dtype} {list(weight.shape)}, config.json says {wanted} [N, K]"
            )
        N, K = weight.shape[0], weight.shape[1] * self.packed
        stored.check("weight_scale", "U8", (K // MX_GROUP, N))
        return [Matrix("linear", N, K)]

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        return unpacked_rows(self.as_packed(stored, matrix, start, stop))

    def as_packed(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Rows:
        weight = stored.tensors["weight"]
        number, codes = self.elements[weight.dtype], stored.load(rows(weight, start, stop)).view(np.uint8)
        exponents = stored.load(columns(stored.tensors["weight_scale"], start, stop))
        scale, row = exponents.view(numpy_dtype(E8M0)).T, each_row(stop - start)
        col = even_groups(matrix.K, MX_GROUP)
        if self.packed == 2:
            return Packed(number, codes, None, scale, row, col)
        return Decoded(number, codes, scale, row, col)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        return {
            "weight": stored.load(rows(stored.tensors["weight"], start, stop)),
            "weight_scale": stored.load(columns(stored.tensors["weight_scale"], start, stop)),
        }


MXFP4_LINEAR = MxLinear("mxfp4_linear", "fp4_gemm", {"U8": "e2m1"}, packed=2)
MXFP8_LINEAR = MxLinear("mxfp8_linear", "fp8_gemm (mx)", ELEMENTS, packed=1)
