"""Layout `int4_linear`: W4A16 (and W4A8) linears, as oneDNN's int4 matmul reads them.

    P.qweight  int32 [N, K/8]    unsigned nibbles, nibble j of word i is column 8i+j
    P.scales         [K/g, N]
    P.qzeros   int32 [K/g, N/8]  asymmetric only: nibbles along N, the true zero point
    P.g_idx    int32 [K]         act-order only: stored column j is source column g_idx[j]

The kernel (`int4_gemm_w4a16`, vllm-xpu-kernels csrc/xpu/onednn) takes `qweight.t()` as u4 [K, N] with strides
{1, K}, scales in groups {g, 1}, and zero point 8 as a scalar where there is no `qzeros`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.architecture import is_embedding
from xpuquant.formats.checkpoint import Array, columns, rows
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.layouts.base import NO_EMBEDDINGS, Conversion, Layout, Matrix, OutTensor, Refusal, Stored
from xpuquant.formats.layouts.fillers import FillGroupScales, FillZeroPoints, word_pieces
from xpuquant.formats.layouts.int_linears import layer_rows, order_of, source_columns, zero_nibbles
from xpuquant.formats.layouts.modules import Linear, Module
from xpuquant.formats.layouts.scales import rounded
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded, each_row, even_groups
from xpuquant.formats.weights.integers import GROUP_MULTIPLE, IntWeight, regroup
from xpuquant.formats.weights.packed import Packed, Rows, word_octets


class Int4Linear(Layout):
    name = "int4_linear"
    family = "xpu"
    kernel = "int4_gemm_w4a16"

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, Linear) or not isinstance(module.weight, IntWeight):
            return None
        name, weight = module.name, module.weight
        N, K = weight.N, weight.K
        if weight.bits > 4:
            return None
        if is_embedding(name):
            return NO_EMBEDDINGS
        if K % GROUP_MULTIPLE:
            return Refusal(f"K={K} is not a multiple of {GROUP_MULTIPLE}")
        groups = regroup(weight)
        if groups is None:
            return Refusal(f"groups of {weight.group_size} in K={K} share no multiple of 32 columns")
        if weight.has_zero_points and N % NIBBLES_PER_WORD:
            return Refusal(f"zero points need N to be a multiple of 8, N={N}")
        G = K // groups.size
        dtype = scale_dtype or weight.scale_dtype
        scales = FillGroupScales(weight, groups, dtype).piece()
        tensors = [
            OutTensor(f"{name}.qweight", "I32", (N, K // NIBBLES_PER_WORD), word_pieces(weight)),
            OutTensor(f"{name}.scales", dtype, (G, N), (scales,)),
        ]
        if weight.has_zero_points:
            zeros = FillZeroPoints(weight, groups).piece()
            tensors.append(OutTensor(f"{name}.qzeros", "I32", (G, N // NIBBLES_PER_WORD), (zeros,)))
        tensors += order_of(name, weight)
        scheme = Scheme(
            layout=self.name,
            group_size=groups.size,
            scale_dtype=dtype,
            symmetric=not weight.has_zero_points,
            act_order=weight.act_order,
        )
        rounded_to = rounded((weight.scale_dtype,), scale_dtype)
        return Conversion(name, scheme, tuple(tensors), weight.facts, rounded_to)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return ("qweight", "scales", *["qzeros"] * (not scheme.symmetric), *["g_idx"] * scheme.act_order)

    def matrices(self, stored: Stored) -> list[Matrix]:
        qweight, scheme = stored.tensors["qweight"], stored.scheme
        if qweight.dtype != "I32" or len(qweight.shape) != 2 or scheme.scale_dtype not in FLOATS:
            raise DamagedError(f"{qweight.name} is {qweight.dtype} {list(qweight.shape)}, want I32 [N, K/8]")
        N, K = qweight.shape[0], qweight.shape[1] * NIBBLES_PER_WORD
        G = K // scheme.group_size
        stored.check("scales", scheme.scale_dtype, (G, N))
        if not scheme.symmetric:
            stored.check("qzeros", "I32", (G, N // NIBBLES_PER_WORD))
        if scheme.act_order:
            stored.check("g_idx", "I32", (K,))
        return [Matrix("linear", N, K)]

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        decoded = self._stored_rows(stored, matrix, start, stop).decoded()
        if not stored.scheme.act_order:
            return decoded
        at = source_columns(stored, matrix.K)
        return replace(decoded, codes=np.take(decoded.codes, at, axis=1), col=decoded.col[at])

    def as_packed(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Rows:
        if stored.scheme.act_order:
            return self.decode(stored, matrix, start, stop)
        return self._stored_rows(stored, matrix, start, stop)

    def _stored_rows(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Packed:
        """Rows in stored column order."""
        words = stored.load(rows(stored.tensors["qweight"], start, stop))
        zeros = None if stored.scheme.symmetric else zero_nibbles(stored, start, stop).T
        scale = stored.load(columns(stored.tensors["scales"], start, stop)).T
        col = even_groups(matrix.K, stored.scheme.group_size)
        return Packed("int", word_octets(words), zeros, scale, each_row(stop - start), col)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        return layer_rows(stored, start, stop)
