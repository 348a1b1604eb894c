"""Reader for ModelOpt's int4 (`INT4_AWQ` in an unified export): two rows of codes to a byte.

    P.weight           U8 [N/2, K]     two's complement nibbles: row 2i low, row 2i + 1 high
    P.weight_scale     [N, K/g]        a multiplier for each group of columns; symmetric
    P.weight_scale_2   of W4A8_AWQ, which quantizes the scales once more
    P.pre_quant_scale  [K]             a factor of the activations, where it could not be folded into the layer before

(modelopt/torch/export/quant_utils.py, `pack_int4_in_uint8`.) A layer that kept its `pre_quant_scale` is refused as any
with a factor of its activations: `leftovers.py`.
"""

from __future__ import annotations

import numpy as np

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import Array, Checkpoint, Slice, rows
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.packing.plain import pack_nibbles
from xpuquant.formats.readers.base import Parts, need
from xpuquant.formats.readers.compressed_tensors.packed import ScaledInts
from xpuquant.formats.readers.compressed_tensors.shapes import group_of_scales
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import (
    CACHED_CODES,
    Arrays,
    DecodedRecipe,
    FillRecipe,
    Recipe,
    Weight,
    row_blocks,
)
from xpuquant.formats.weights.decoded import Decoded, each_row, subtract_zeros
from xpuquant.formats.weights.integers import column_groups
from xpuquant.values import frozen

_MIDDLE = 8


@frozen(kw_only=True)
class PairedRows(ScaledInts):
    """A module two of whose rows share a byte: its codes are read from an even row on."""

    weight: Tensor

    def code_rows(self, start: int, stop: int) -> Slice:
        return rows(self.weight, start // 2, -(-stop // 2))

    def unpacked(self, stored: Array) -> Array:
        codes = np.stack([stored & 15, stored >> 4], axis=1).reshape(-1, self.K)
        return codes ^ np.uint8(_MIDDLE)  # two's complement plus 8

    def codes(self, start: int, stop: int) -> FillRecipe:
        def fill(arrays: Arrays, out: Array) -> None:
            for first, last in row_blocks(stop - start, self.K, limit=CACHED_CODES):
                out[first:last] = pack_nibbles(self._between(arrays[0], start, start + first, start + last))

        return Recipe((self.code_rows(start, stop),), fill)

    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        scales = self.scales()

        def build(arrays: Arrays) -> Decoded:
            col = column_groups(self)
            values = subtract_zeros(self._between(arrays[0], start, start, stop), None, self.bits, col)
            return Decoded("int", values, scales.build(arrays[1:]).T[start:stop], each_row(stop - start), col)

        return Recipe((self.code_rows(start, stop), *scales.inputs), build)

    def _fill_codes(self, arrays: Arrays, out: Array) -> None:
        raise NotImplementedError("`codes` knows which row it begins with")

    def _between(self, stored: Array, begin: int, start: int, stop: int) -> Array:
        """Codes of rows `start:stop` from the bytes that `code_rows` gives from row `begin` on."""
        first = begin // 2
        part = self.unpacked(stored[start // 2 - first : -(-stop // 2) - first])
        return part[start % 2 : start % 2 + stop - start]


class ModelOptInt4:
    name = "modelopt int4"
    methods = frozenset({"modelopt", "modelopt-mixed"})
    suffixes = frozenset({"weight_scale", "weight_scale_2"})

    def claims(self, parts: Parts) -> bool:
        weight, scale = parts.get("weight"), parts.get("weight_scale")
        return weight is not None and weight.dtype == "U8" and scale is not None and scale.dtype in FLOATS

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        weight, scale = need(parts, "weight", name, dims=2), parts["weight_scale"]
        if "weight_scale_2" in parts:
            raise UnsupportedError("int4 for fp8 activations (ModelOpt's W4A8_AWQ), whose scales are quantized again")
        N, K = 2 * weight.shape[0], weight.shape[1]
        group_size = group_of_scales(scale, N, K)
        if group_size is None or not scale.shape or scale.shape[0] != N:
            shapes = f"{weight.name} U8 {list(weight.shape)} with scales {scale.dtype} {list(scale.shape)}"
            if "modelopt" in checkpoint.method:
                raise DamagedError(f"{shapes}: int4 of {[N, K]} needs scales of {N} rows and a divisor of K in columns")
            raise UnsupportedError(f"{shapes} is no packing that is known here")
        return [
            PairedRows(
                name=name,
                format=self.name,
                N=N,
                K=K,
                tensors=tuple(parts[suffix] for suffix in ("weight", "weight_scale")),
                facts=("4-bit, two rows to a byte, from the shapes", "symmetric: ModelOpt's int4 has no zero points"),
                bits=4,
                group_size=group_size,
                symmetric=True,
                scale_dtype=scale.dtype,
                weight=weight,
                scale=scale,
                zero_point=None,
                padded=False,
            )
        ]
