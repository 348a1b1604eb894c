"""Layouts `ct_mxfp4` and `ct_mxfp8`: compressed-tensors `mxfp4-pack-quantized` and `mxfp8-quantized`.

    ct_mxfp4   P.weight_packed  U8 [N, K/2]       E2M1 nibbles (sign << 3 | magnitude), low nibble = even column
    ct_mxfp8   P.weight         F8_E4M3 [N, K]
    both       P.weight_scale   U8 [N, K/32]      E8M0: 2^(byte - 127), 255 is NaN

(compressed_tensors/compressors/nvfp4, mxfp4). Releases before 0.14 read the exponents of MXFP4 4 times too small.
"""

from __future__ import annotations

import numpy as np

from xpuquant.formats.checkpoint import Array, rows
from xpuquant.formats.layouts.base import Conversion, Matrix, OutTensor, Refusal, Stored
from xpuquant.formats.layouts.compressed_tensors.config import CtScheme
from xpuquant.formats.layouts.compressed_tensors.modules import bias_tensors, ct_refusal
from xpuquant.formats.layouts.compressed_tensors.stored import CtLayout
from xpuquant.formats.layouts.fillers import FillBlockScales, code_pieces
from xpuquant.formats.layouts.modules import CtLinear, Module
from xpuquant.formats.layouts.scales import kept
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.floats import MX_GROUP, FloatWeight
from xpuquant.formats.weights.nvfp4 import Nvfp4Weight
from xpuquant.values import frozen


@frozen
class CtMx(CtLayout):
    """A layout of MX linears.

    name           of the layout
    kernel         that reads a linear once a loader has turned its exponents on their side
    expert_kernel  that reads the experts of a layer
    element        of the source that it takes; see `FloatWeight`
    codes          suffix of the codes' tensor
    dtype          their safetensors label
    packed         columns per stored element
    xpu_layout     name of the XPU layout that holds the same codes
    """

    name: str
    kernel: str
    expert_kernel: str
    element: str
    codes: str
    dtype: str
    packed: int
    xpu_layout: str

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, CtLinear) or not isinstance(module.weight, FloatWeight):
            return None
        name, weight = module.name, module.weight
        if isinstance(weight, Nvfp4Weight):
            why = "its tensors are those of compressed-tensors' nvfp4-pack-quantized already"
            if not weight.divides:
                # Of powers of two the inverse is exact; whether a factor is one, headers do not tell.
                why = "few factors over all have an exact float32 divisor, which compressed-tensors wants"
            return Refusal(f"NVFP4 is not converted to compressed-tensors: {why}; the layout xpu takes it")
        if not weight.is_mx or (weight.element == "e2m1") != (self.packed == 2):
            return None
        if (reason := ct_refusal(module)) is not None:
            return Refusal(reason)
        if weight.element != self.element:
            return Refusal(f"MX of {weight.element} has no compressed-tensors format: its 8-bit floats are E4M3")
        N, K = weight.N, weight.K
        if K % MX_GROUP:
            return Refusal(f"K={K} is not a multiple of {MX_GROUP}")
        scales = FillBlockScales(weight, 1, MX_GROUP, "U8", by_row=True).piece()
        tensors = (
            OutTensor(f"{name}.{self.codes}", self.dtype, (N, K // self.packed), code_pieces(weight)),
            OutTensor(f"{name}.weight_scale", "U8", (N, K // MX_GROUP), (scales,)),
        )
        scheme = CtScheme(
            layout=self.name,
            group_size=MX_GROUP,
            scale_dtype="U8",
            activations=module.activations,
        )
        facts = (*weight.facts, *kept("U8", scale_dtype))
        return Conversion(name, scheme, (*tensors, *bias_tensors(module)), facts)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return (self.codes, "weight_scale")

    def kernel_scheme(self, stored: Stored) -> Scheme | None:
        return Scheme(self.xpu_layout, group_size=MX_GROUP, scale_dtype="U8")

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        """As vLLM's XPU kernel classes take a loaded checkpoint: exponents transposed."""
        exponents = stored.load(rows(stored.tensors["weight_scale"], start, stop))
        return {
            "weight": stored.load(rows(stored.tensors[self.codes], start, stop)),
            "weight_scale": np.ascontiguousarray(exponents.T),
        }


CT_MXFP4 = CtMx("ct_mxfp4", "fp4_gemm", "grouped GEMM mxfp4", "e2m1", "weight_packed", "U8", 2, "mxfp4_linear")
CT_MXFP8 = CtMx("ct_mxfp8", "fp8_gemm (mx)", "grouped GEMM mxfp8", "e4m3", "weight", "F8_E4M3", 1, "mxfp8_linear")
