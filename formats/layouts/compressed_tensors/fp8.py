"""Layout `ct_fp8`: compressed-tensors `float-quantized`, and `naive-quantized` where activations are not quantized.

    P.weight        F8_E4M3 [N, K]
    P.weight_scale  [1]; [N, 1]; [ceil(N/n), ceil(K/k)]   per tensor, per channel, in blocks; a multiplier
    P.input_scale   [1]                                   static activation scale

(compressed_tensors/compressors/naive_quantized). Scales keep the source's dtype; exponents (E8M0), for which the format
has no room outside MX, are widened to float32, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.formats.checkpoint import rows, whole
from xpuquant.formats.dtypes import FLOATS, nbytes, numpy_dtype
from xpuquant.formats.layouts.base import Array, Conversion, Linear, Matrix, Module, OutTensor, Piece, Stored
from xpuquant.formats.layouts.compressed_tensors.config import CtScheme
from xpuquant.formats.layouts.compressed_tensors.modules import CtLinear, bias_tensors, refusal
from xpuquant.formats.layouts.compressed_tensors.stored import CtLayout, weight_of
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import row_blocks
from xpuquant.formats.weights.floats import ELEMENTS, FP8_BLOCK, FloatWeight
from xpuquant.formats.weights.split import SplitFloat

_CODES = "F8_E4M3"


@dataclass(frozen=True)
class Grid:
    """Fills the scales as they lie in the source, in another dtype."""

    weight: FloatWeight
    dtype: str

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        grid = self.weight.grid(arrays[0])
        out.view(numpy_dtype(self.dtype)).reshape(grid.shape)[...] = grid


@dataclass(frozen=True)
class Upright:
    """Fills rows of codes from a source that stores them as columns, or with other rows between them."""

    weight: FloatWeight

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        stored = arrays[0].view(np.uint8)
        codes = stored.T if self.weight.transposed else stored
        step = self.weight.picked.step if isinstance(self.weight, SplitFloat) else 1
        out.reshape(-1, codes.shape[1])[...] = codes[::step]


def upright(weight: FloatWeight) -> Upright | None:
    """What makes rows of codes; None where they lie in the source just so."""
    skips = isinstance(weight, SplitFloat) and weight.picked.step > 1
    return Upright(weight) if weight.transposed or skips else None


class CtFp8(CtLayout):
    name = "ct_fp8"

    def takes(self, module: Module) -> bool:
        weight = module.weight if isinstance(module, Linear) else None
        return isinstance(weight, FloatWeight) and weight.dtype in ELEMENTS and not weight.is_mx

    def refuses(self, module: Module) -> str | None:
        weight = _weight(module)
        if (reason := refusal(module)) is not None:
            return reason
        if weight.dtype != _CODES:
            return f"{weight.dtype} has no compressed-tensors format: its 8-bit floats are E4M3"
        return None

    def convert(self, module: Module, scale_dtype: str | None) -> Conversion:
        weight = _weight(module)
        N, K = weight.N, weight.K
        dtype = scale_dtype or (weight.scale.dtype if weight.scale.dtype in FLOATS else "F32")
        is_block = weight.granularity == "block"
        grid = (-(-N // weight.block[0]), -(-K // weight.block[1]))
        shape = (1,) if weight.granularity == "tensor" else grid
        scales = Piece((weight.scale_rows(0, N),), nbytes(dtype, grid), Grid(weight, dtype))
        make = upright(weight)
        codes = tuple(
            Piece((weight.code_rows(start, stop),), (stop - start) * K, make) for start, stop in row_blocks(N, K)
        )
        tensors = [
            OutTensor(f"{module.name}.weight", _CODES, (N, K), codes),
            OutTensor(f"{module.name}.weight_scale", dtype, shape, (scales,)),
        ]
        if weight.input_scale is not None:
            static = Piece((whole(weight.input_scale),), weight.input_scale.nbytes)
            tensors.append(OutTensor(f"{module.name}.input_scale", weight.input_scale.dtype, (1,), (static,)))
        scheme = CtScheme(
            layout=self.name,
            granularity=weight.granularity,
            group_size=weight.block[1] if is_block else 0,
            block_n=weight.block[0] if is_block else 0,
            scale_dtype=dtype,
            input_scale=weight.input_scale is not None,
            activations=module.activations if isinstance(module, CtLinear) else "",
        )
        return Conversion(module.name, scheme, (*tensors, *bias_tensors(module)), weight.facts)

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


def _weight(module: Module) -> FloatWeight:
    assert isinstance(module, Linear) and isinstance(module.weight, FloatWeight)
    return module.weight
