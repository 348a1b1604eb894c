"""Layout `ct_fp8`: compressed-tensors `float-quantized`, and `naive-quantized` where activations are not quantized.

    P.weight        F8_E4M3 [N, K]
    P.weight_scale  [1]; [N, 1]; [ceil(N/n), ceil(K/k)]   per tensor, per channel, in blocks; a multiplier
    P.input_scale   [1]                                   static activation scale

(compressed_tensors/compressors/naive_quantized). Scales keep the source's dtype; exponents (E8M0), for which the format
has no room outside MX, are widened to float32, which is exact.
"""

from __future__ import annotations

import numpy as np

from xpuquant.formats.architecture import expert_of
from xpuquant.formats.checkpoint import Array, rows, whole
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.layouts.base import Conversion, Matrix, OutTensor, Piece, Refusal, Stored
from xpuquant.formats.layouts.compressed_tensors.config import CtScheme
from xpuquant.formats.layouts.compressed_tensors.modules import bias_tensors, ct_refusal
from xpuquant.formats.layouts.compressed_tensors.stored import CtLayout, weight_of
from xpuquant.formats.layouts.fillers import FillScales, code_pieces
from xpuquant.formats.layouts.modules import CtLinear, Module
from xpuquant.formats.layouts.scales import rounded
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.floats import ELEMENTS, FP8_BLOCK, FloatWeight

_CODES = "F8_E4M3"


class CtFp8(CtLayout):
    name = "ct_fp8"
    kernel = "fp8_gemm_w8a16"
    expert_kernel = "grouped GEMM fp8"

    def kernel_of(self, scheme: Scheme, name: str) -> str:
        is_block_linear = scheme.granularity == "block" and expert_of(name) is None
        return "fp8_gemm" if is_block_linear else super().kernel_of(scheme, name)

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, CtLinear) or not isinstance(module.weight, FloatWeight):
            return None
        name, weight = module.name, module.weight
        if weight.dtype not in ELEMENTS or weight.is_mx:
            return None
        if (reason := ct_refusal(module)) is not None:
            return Refusal(reason)
        if weight.dtype != _CODES:
            return Refusal(f"{weight.dtype} has no compressed-tensors format: its 8-bit floats are E4M3")
        N, K = weight.N, weight.K
        dtype = scale_dtype or (weight.scale.dtype if weight.scale.dtype in FLOATS else "F32")
        is_block = weight.granularity == "block"
        shape = (1,) if weight.granularity == "tensor" else (-(-N // weight.block[0]), -(-K // weight.block[1]))
        tensors = [
            OutTensor(f"{name}.weight", _CODES, (N, K), code_pieces(weight)),
            OutTensor(f"{name}.weight_scale", dtype, shape, (FillScales(weight, dtype).piece(),)),
        ]
        if weight.input_scale is not None:
            static = Piece((whole(weight.input_scale),), weight.input_scale.nbytes)
            tensors.append(OutTensor(f"{name}.input_scale", weight.input_scale.dtype, (1,), (static,)))
        scheme = CtScheme(
            layout=self.name,
            granularity=weight.granularity,
            group_size=weight.block[1] if is_block else 0,
            block_n=weight.block[0] if is_block else 0,
            scale_dtype=dtype,
            input_scale=weight.input_scale is not None,
            activations=module.activations,
        )
        rounded_to = rounded((weight.scale.dtype,), scale_dtype)
        return Conversion(name, scheme, (*tensors, *bias_tensors(module)), weight.facts, rounded_to)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return ("weight", "weight_scale", *["input_scale"] * scheme.input_scale)

    def kernel_scheme(self, stored: Stored) -> Scheme | None:
        weight, scheme = weight_of(stored), stored.scheme
        if scheme.granularity == "block":
            ragged = weight.N % scheme.block_n or weight.K % scheme.group_size
            if ragged or scheme.block_n % 16 or scheme.group_size != FP8_BLOCK:
                return None
        return Scheme(
            "fp8_linear",
            scheme.granularity,
            scheme.group_size,
            scheme.block_n,
            scale_dtype="F32",
            input_scale=scheme.input_scale,
        )

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        """As vLLM's XPU kernel classes take a loaded checkpoint: float32 scales, those of blocks transposed."""
        scheme, scale = stored.scheme, stored.tensors["weight_scale"]
        part = whole(scale)
        if scheme.granularity == "channel":
            part = rows(scale, start, stop)
        elif scheme.granularity == "block":
            part = rows(scale, start // scheme.block_n, -(-stop // scheme.block_n))
        grid = stored.load(part).astype(np.float32)
        arrays = {
            "weight": stored.load(rows(stored.tensors["weight"], start, stop)),
            "weight_scale": np.ascontiguousarray(grid.T) if scheme.granularity == "block" else grid.reshape(-1),
        }
        if scheme.input_scale:
            arrays["input_scale"] = stored.array("input_scale").astype(np.float32)
        return arrays
