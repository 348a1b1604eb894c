"""Layout `int4_linear`: W4A16 (and W4A8) linears, as oneDNN's int4 matmul reads them.

    P.qweight  int32 [N, K/8]    unsigned nibbles, nibble j of word i is column 8i+j
    P.scales         [K/g, N]
    P.qzeros   int32 [K/g, N/8]  asymmetric only: nibbles along N, the true zero point
    P.g_idx    int32 [K]         act-order only: stored column j is source column g_idx[j]

The kernel (`int4_gemm_w4a16`, vllm-xpu-kernels csrc/xpu/onednn) takes `qweight.t()` as u4 [K, N] with strides
{1, K}, scales in groups {g, 1}, and zero point 8 as a scalar where there is no `qzeros`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.architecture import is_embedding
from xpuquant.formats.checkpoint import columns, rows, whole
from xpuquant.formats.dtypes import FLOATS, numpy_dtype
from xpuquant.formats.layouts.base import Array, Conversion, Linear, Matrix, Module, OutTensor, Piece, Stored
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, pack_nibbles, unpack_nibbles
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import ROWS_MULTIPLE, IntWeight, row_blocks
from xpuquant.formats.weights.decoded import Decoded, even_groups, subtract_zeros
from xpuquant.formats.weights.groups import Regrouping, regroup

K_MULTIPLE = 32


@dataclass(frozen=True)
class Words:
    """Fills rows of u4 words, from row `start` on."""

    weight: IntWeight
    start: int

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        words = out.view(np.uint32).reshape(-1, self.weight.K // NIBBLES_PER_WORD)
        self.weight.words(arrays, words, self.start)

    def cut(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """The rows in blocks. Act-order stays whole: each block would derive the order again."""
        weight, row_bytes = self.weight, self.weight.K // 2
        if weight.groups_of is not None:
            yield piece
            return
        for first, last in row_blocks(piece.nbytes // row_bytes, row_bytes, ROWS_MULTIPLE, limit):
            start, stop = self.start + first, self.start + last
            yield Piece(weight.word_inputs(start, stop), (last - first) * row_bytes, replace(self, start=start))


@dataclass(frozen=True)
class Scales:
    """Fills `[K/g, N]` scales (`[N, K/g]` where `transposed`), regrouped and cast."""

    weight: IntWeight
    groups: Regrouping
    dtype: str
    transposed: bool = False

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        scales = self.groups.rows(self.weight.scales(arrays))
        if self.transposed:
            scales = scales.T
        out.view(numpy_dtype(self.dtype)).reshape(scales.shape)[...] = scales


@dataclass(frozen=True)
class Zeros:
    """Fills `[K/g, N/8]` words of true zero points."""

    weight: IntWeight
    groups: Regrouping

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        zeros = self.groups.rows(self.weight.zeros(arrays, 0, self.weight.N))
        out.view(np.uint32).reshape(len(zeros), -1)[...] = pack_nibbles(np.ascontiguousarray(zeros))


@dataclass(frozen=True)
class Order:
    """Fills the act-order permutation."""

    weight: IntWeight

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        order = self.weight.order
        assert order is not None
        out.view(np.int32)[...] = order


def word_pieces(weight: IntWeight) -> tuple[Piece, ...]:
    """`[N, K/8]` u4 words, in blocks of rows; bytes that already are the words are copied."""
    return tuple(
        Piece(
            weight.word_inputs(start, stop),
            (stop - start) * weight.K // 2,
            None if weight.verbatim else Words(weight, start),
        )
        for start, stop in row_blocks(weight.N, weight.K // 2, NIBBLES_PER_WORD)
    )


class Int4Linear:
    name = "int4_linear"
    family = "xpu"

    def takes(self, module: Module) -> bool:
        return isinstance(module, Linear) and isinstance(module.weight, IntWeight)

    def refuses(self, module: Module) -> str | None:
        weight = _weight(module)
        if is_embedding(module.name):
            return "an embedding is looked up, not multiplied: no XPU kernel reads quantized rows"
        if weight.bits > 4:
            return f"{weight.bits}-bit integers have no XPU kernel"
        if weight.K % K_MULTIPLE:
            return f"K={weight.K} is not a multiple of {K_MULTIPLE}"
        if regroup(weight) is None:
            return f"groups of {weight.group_size} in K={weight.K} share no multiple of 32 columns"
        if not _symmetric(weight) and weight.N % NIBBLES_PER_WORD:
            return f"zero points need N to be a multiple of 8, N={weight.N}"
        return None

    def convert(self, module: Module, scale_dtype: str | None) -> Conversion:
        weight = _weight(module)
        groups = regroup(weight)
        assert groups is not None, "convert follows refuses"
        N, K, G = weight.N, weight.K, weight.K // groups.size
        dtype = scale_dtype or weight.scale_dtype
        words = word_pieces(weight)
        scale_bytes = G * N * numpy_dtype(dtype).itemsize
        tensors = [
            OutTensor(f"{module.name}.qweight", "I32", (N, K // NIBBLES_PER_WORD), words),
            OutTensor(
                f"{module.name}.scales",
                dtype,
                (G, N),
                (Piece(weight.scale_inputs(), scale_bytes, Scales(weight, groups, dtype)),),
            ),
        ]
        if not _symmetric(weight):
            zeros = Piece(weight.zero_inputs(), G * N // 2, Zeros(weight, groups))
            tensors.append(OutTensor(f"{module.name}.qzeros", "I32", (G, N // NIBBLES_PER_WORD), (zeros,)))
        if weight.act_order:
            order = Piece((), 4 * K, Order(weight))
            tensors.append(OutTensor(f"{module.name}.g_idx", "I32", (K,), (order,)))
        scheme = Scheme(
            layout=self.name,
            group_size=groups.size,
            scale_dtype=dtype,
            symmetric=_symmetric(weight),
            act_order=weight.act_order,
        )
        return Conversion(module.name, scheme, tuple(tensors), weight.facts)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return ("qweight", "scales", *["qzeros"] * (not scheme.symmetric), *["g_idx"] * scheme.act_order)

    def matrices(self, stored: Stored) -> list[Matrix]:
        qweight, scales = stored.tensors["qweight"], stored.tensors["scales"]
        if qweight.dtype != "I32" or len(qweight.shape) != 2:
            raise DamagedError(f"{qweight.name} is {qweight.dtype} {list(qweight.shape)}, want I32 [N, K/8]")
        N, K = qweight.shape[0], qweight.shape[1] * NIBBLES_PER_WORD
        G = K // stored.scheme.group_size
        wanted = {"scales": (G, N), "qzeros": (G, N // NIBBLES_PER_WORD), "g_idx": (K,)}
        for suffix, tensor in stored.tensors.items():
            if suffix in wanted and tensor.shape != wanted[suffix]:
                raise DamagedError(f"{tensor.name} has shape {list(tensor.shape)}, want {list(wanted[suffix])}")
        if scales.dtype != stored.scheme.scale_dtype or scales.dtype not in FLOATS:
            raise DamagedError(f"{scales.name} is {scales.dtype}, config.json says {stored.scheme.scale_dtype}")
        return [Matrix("linear", N, K)]

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        words = stored.load(rows(stored.tensors["qweight"], start, stop))
        codes = unpack_nibbles(words.view(np.uint8))
        col = even_groups(matrix.K, stored.scheme.group_size)
        zeros = None
        if not stored.scheme.symmetric:
            first, last = start // NIBBLES_PER_WORD, -(-stop // NIBBLES_PER_WORD)
            packed = stored.load(columns(stored.tensors["qzeros"], first, last)).view(np.uint8)
            inside = slice(start - first * NIBBLES_PER_WORD, stop - first * NIBBLES_PER_WORD)
            zeros = unpack_nibbles(packed)[:, inside].T
        values = subtract_zeros(codes, zeros, 4, col)
        if stored.scheme.act_order:
            order = stored.array("g_idx")
            if not np.array_equal(np.sort(order), np.arange(matrix.K)):
                raise DamagedError(f"{stored.name}.g_idx is not a permutation of 0..{matrix.K - 1}")
            inverse = np.argsort(order)
            values, col = np.take(values, inverse, axis=1), col[inverse]
        scale = stored.load(columns(stored.tensors["scales"], start, stop)).T
        return Decoded("int", values, scale, np.arange(stop - start), col)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        first, last = start // NIBBLES_PER_WORD, -(-stop // NIBBLES_PER_WORD)
        parts = {
            "qweight": lambda tensor: rows(tensor, start, stop),
            "scales": lambda tensor: columns(tensor, start, stop),
            "qzeros": lambda tensor: columns(tensor, first, last),
            "g_idx": whole,
        }
        return {suffix: stored.load(parts[suffix](tensor)) for suffix, tensor in stored.tensors.items()}


def _weight(module: Module) -> IntWeight:
    assert isinstance(module, Linear) and isinstance(module.weight, IntWeight)
    return module.weight


def _symmetric(weight: IntWeight) -> bool:
    return weight.symmetric or weight.widened
