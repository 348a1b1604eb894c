"""Layout `int8_linear`: W8A16 linears as two planes of nibbles, which oneDNN's int4 matmul multiplies exactly.

    P.qweight  int32 [N, 2K/8]    unsigned nibbles; of each group of g columns the high nibbles, then the low ones
    P.scales         [2K/g, N]    of each group 16 times the scale, then the scale
    P.qzeros   int32 [2K/g, N/8]  nibbles along N: of each group the high nibbles of the true zero points, then the low
                                  ones; 8 and 0 where the weight is symmetric
    P.g_idx    int32 [K]          act-order only: stored column j is source column g_idx[j]

A code is 16 * high + low, and so is a zero point, so (code - zero) * scale is the sum of two int4 products, of which
`int4_gemm_w4a16` (see `int4_linear.py`) computes one with 2K columns, where each group of the activations comes twice.
The planes lie side by side within a group, not one after the other, so that tensor parallelism can cut K; groups have
at most 128 columns for the same reason.

ARK's linears (`woqgemm`) read 8 bits too, but on an XPU only symmetric ones, from a blob that is made on the device and
cannot be cut, and compute in int8. vllm-xpu-kernels 0.1.16 has no operator with 8-bit integer weights.
"""

from __future__ import annotations

import math

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.architecture import is_embedding
from xpuquant.formats.checkpoint import Array, columns, rows
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.layouts.base import NO_EMBEDDINGS, Conversion, Layout, Matrix, OutTensor, Refusal, Stored
from xpuquant.formats.layouts.int_linears import layer_rows, order_of, source_columns, zero_nibbles
from xpuquant.formats.layouts.modules import Linear, Module
from xpuquant.formats.layouts.plane_fillers import HIGH, FillPlaneScales, FillPlaneZeros, plane_pieces
from xpuquant.formats.layouts.scales import rounded
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, unpack_nibbles
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded, even_groups, subtract_zeros
from xpuquant.formats.weights.integers import GROUP_MULTIPLE, IntWeight, common_group_size, divide_groups

LONGEST_GROUP = 128


class Int8Linear(Layout):
    name = "int8_linear"
    family = "xpu"
    kernel = "int4_gemm_w4a16, two planes"

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, Linear) or not isinstance(module.weight, IntWeight):
            return None
        name, weight = module.name, module.weight
        N, K = weight.N, weight.K
        if weight.bits <= 4:
            return None
        if is_embedding(name):
            return NO_EMBEDDINGS
        if K % GROUP_MULTIPLE or N % NIBBLES_PER_WORD:
            return Refusal(f"the planes of 8 bits need K % 32 == 0 and N % 8 == 0, not [{N}, {K}]")
        common = common_group_size((weight,))
        if common is None:
            return Refusal(f"groups of {weight.group_size} in K={K} share no multiple of 32 columns")
        groups = divide_groups(weight, math.gcd(common, LONGEST_GROUP))
        rows_of_groups, dtype = 2 * (K // groups.size), scale_dtype or weight.scale_dtype
        tensors = [
            OutTensor(f"{name}.qweight", "I32", (N, 2 * K // NIBBLES_PER_WORD), plane_pieces(weight, groups.size)),
            OutTensor(f"{name}.scales", dtype, (rows_of_groups, N), (FillPlaneScales(weight, groups, dtype).piece(),)),
            OutTensor(
                f"{name}.qzeros",
                "I32",
                (rows_of_groups, N // NIBBLES_PER_WORD),
                (FillPlaneZeros(weight, groups).piece(),),
            ),
        ]
        tensors += order_of(name, weight)
        scheme = Scheme(
            layout=self.name,
            group_size=groups.size,
            scale_dtype=dtype,
            symmetric=not weight.has_octet_zeros,
            act_order=weight.act_order,
        )
        rounded_to = rounded((weight.scale_dtype,), scale_dtype)
        return Conversion(name, scheme, tuple(tensors), weight.facts, rounded_to)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return ("qweight", "scales", "qzeros", *["g_idx"] * scheme.act_order)

    def matrices(self, stored: Stored) -> list[Matrix]:
        qweight, scheme = stored.tensors["qweight"], stored.scheme
        if qweight.dtype != "I32" or len(qweight.shape) != 2 or scheme.scale_dtype not in FLOATS:
            raise DamagedError(f"{qweight.name} is {qweight.dtype} {list(qweight.shape)}, want I32 [N, 2K/8]")
        N, K = qweight.shape[0], qweight.shape[1] * NIBBLES_PER_WORD // 2
        groups = 2 * (K // scheme.group_size)
        stored.check("scales", scheme.scale_dtype, (groups, N))
        stored.check("qzeros", "I32", (groups, N // NIBBLES_PER_WORD))
        if scheme.act_order:
            stored.check("g_idx", "I32", (K,))
        return [Matrix("linear", N, K)]

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        size, n = stored.scheme.group_size, stop - start
        words = stored.load(rows(stored.tensors["qweight"], start, stop))
        planes = unpack_nibbles(words.view(np.uint8)).reshape(n, -1, 2, size)
        codes = (planes[:, :, 0] << np.uint8(4) | planes[:, :, 1]).reshape(n, matrix.K)
        nibbles = zero_nibbles(stored, start, stop)
        col = even_groups(matrix.K, size)
        values = subtract_zeros(codes, (nibbles[0::2] << np.uint8(4) | nibbles[1::2]).T, 8, col)
        scale = stored.load(columns(stored.tensors["scales"], start, stop))
        self._check_scales(stored, scale)
        if stored.scheme.act_order:
            at = source_columns(stored, matrix.K)
            values, col = np.take(values, at, axis=1), col[at]
        return Decoded("int", values, scale[1::2].T, np.arange(n), col)

    def _check_scales(self, stored: Stored, scale: Array) -> None:
        """Raises DamagedError where the two planes are not scaled as one number."""
        high, low = scale[0::2].astype(np.float64), scale[1::2].astype(np.float64)
        wrong = ~((high == HIGH * low) | (np.isnan(high) & np.isnan(low)))
        if wrong.any():
            group, row = np.argwhere(wrong)[0]
            raise DamagedError(
                f"{stored.name}.scales: row {2 * group} is {high[group, row]:g}, not {HIGH} times row {2 * group + 1}, "
                f"{low[group, row]:g}"
            )

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        return layer_rows(stored, start, stop)
