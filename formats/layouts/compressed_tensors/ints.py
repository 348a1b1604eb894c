"""Layouts `ct_int4` and `ct_int8`: compressed-tensors `pack-quantized`, with 4 and with 8 bits.

    P.weight_packed      I32 [N, K/8]         offset-binary codes, nibble j of word i is column 8i+j
                             [N, K/4]         of 8 bits, octet j of word i is column 4i+j
    P.weight_scale           [N, G], channel-wise [N, 1]
    P.weight_zero_point  I32 [ceil(N/8), G]   asymmetric only: packed along N as the codes along K, the true zero point
                             [ceil(N/4), G]   of 8 bits
    P.weight_shape       I64 [2]              N, K

(compressed_tensors/compressors/pack_quantized). Codes and zero points are both stored plus half of their range, so a
value is the unsigned `(code - zero point) * scale`, the same as in the XPU layouts. Integers of 5 to 7 bits are stored
with 8: code minus zero point fits.
"""

from __future__ import annotations

import numpy as np

from xpuquant.formats.architecture import expert_of
from xpuquant.formats.checkpoint import Array, rows
from xpuquant.formats.layouts.base import Conversion, Matrix, OutTensor, Piece, Refusal, Stored
from xpuquant.formats.layouts.compressed_tensors.config import CtScheme
from xpuquant.formats.layouts.compressed_tensors.modules import bias_tensors, ct_refusal, groups_in_order
from xpuquant.formats.layouts.compressed_tensors.stored import CtLayout, weight_of
from xpuquant.formats.layouts.fillers import FillGroupScales, FillShape, FillZeroPoints, octet_pieces, word_pieces
from xpuquant.formats.layouts.modules import CtLinear, Module
from xpuquant.formats.layouts.scales import rounded
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.integers import GROUP_MULTIPLE, IntWeight


class CtInts(CtLayout):
    """What the two layouts share: all but the width of a code.

    bits  of a stored code
    """

    bits: int

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, CtLinear) or not isinstance(module.weight, IntWeight):
            return None
        name, weight = module.name, module.weight
        if (weight.bits > 4 or module.octets) != (self.bits == 8):
            return None
        if (reason := ct_refusal(module)) is not None:
            return Refusal(reason)
        if weight.act_order:
            return Refusal(
                "act-order, which compressed-tensors 0.19 and vLLM 0.32 no longer load (actorder group); "
                "the layout xpu takes it"
            )
        N, K = weight.N, weight.K
        if K % GROUP_MULTIPLE:
            return Refusal(f"K={K} is not a multiple of {GROUP_MULTIPLE}")
        groups = groups_in_order(weight, module.group_size)
        if groups is None:
            return Refusal(f"groups of {weight.group_size} in K={K} share no multiple of 32 columns")
        G, octets = K // groups.size, self.bits == 8
        dtype = scale_dtype or weight.scale_dtype
        scales = FillGroupScales(weight, groups, dtype, by_row=True).piece()
        codes = octet_pieces(weight, signed=False) if octets else word_pieces(weight)
        tensors = [
            OutTensor(f"{name}.weight_packed", "I32", (N, K * self.bits // 32), codes),
            OutTensor(f"{name}.weight_scale", dtype, (N, G), (scales,)),
            OutTensor(f"{name}.weight_shape", "I64", (2,), (Piece((), 16, FillShape(N, K)),)),
        ]
        zero_points = (weight.has_octet_zeros if octets else weight.has_zero_points) or module.zero_points
        if zero_points:
            zeros = FillZeroPoints(weight, groups, by_row=True, octets=octets).piece()
            tensors.append(OutTensor(f"{name}.weight_zero_point", "I32", (-(-N * self.bits // 32), G), (zeros,)))
        scheme = CtScheme(
            layout=self.name,
            granularity="channel" if G == 1 else "group",
            group_size=0 if G == 1 else groups.size,
            scale_dtype=dtype,
            symmetric=not zero_points,
        )
        rounded_to = rounded((weight.scale_dtype,), scale_dtype)
        return Conversion(name, scheme, (*tensors, *bias_tensors(module)), weight.facts, rounded_to)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return (
            "weight_packed",
            "weight_scale",
            "weight_shape",
            *["weight_zero_point"] * (not scheme.symmetric),
        )


class CtInt4(CtInts):
    name = "ct_int4"
    kernel = "int4_gemm_w4a16"
    expert_kernel = "grouped GEMM s4"
    bits = 4

    def kernel_of(self, scheme: Scheme, name: str) -> str:
        if not scheme.symmetric and expert_of(name) is not None:
            return "none: vLLM's own loader has no path for asymmetric experts"
        return super().kernel_of(scheme, name)

    def kernel_scheme(self, stored: Stored) -> Scheme | None:
        weight, scheme = weight_of(stored), stored.scheme
        size = scheme.group_size or weight.K
        if size % GROUP_MULTIPLE or (not scheme.symmetric and weight.N % NIBBLES_PER_WORD):
            return None
        return Scheme("int4_linear", group_size=size, scale_dtype=scheme.scale_dtype, symmetric=scheme.symmetric)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        """As vLLM's XPU kernel class takes a loaded checkpoint: scales and zero points transposed."""
        scale = stored.load(rows(stored.tensors["weight_scale"], start, stop))
        arrays = {
            "qweight": stored.load(rows(stored.tensors["weight_packed"], start, stop)),
            "scales": np.ascontiguousarray(scale.T),
        }
        if not stored.scheme.symmetric:
            part = rows(stored.tensors["weight_zero_point"], start // NIBBLES_PER_WORD, -(-stop // NIBBLES_PER_WORD))
            arrays["qzeros"] = np.ascontiguousarray(stored.load(part).T)
        return arrays


class CtInt8(CtInts):
    """What stock vLLM reads on other devices, and Transformers on all: it has no kernel for 8-bit weights on an Intel
    GPU (model_executor/kernels/linear/mixed_precision/xpu.py takes 4 bits)."""

    name = "ct_int8"
    kernel = expert_kernel = "none: vLLM's own loader has no path for 8-bit weights on Intel GPUs"
    bits = 8

    def kernel_scheme(self, stored: Stored) -> Scheme | None:
        return None

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        raise AssertionError("no kernel is asked to read it")
