"""Reader for GPTQ, as written by GPTQModel, AutoGPTQ and AutoRound.

    P.qweight  int32 [ceil(K*b/32), N]   codes packed along K, a little-endian bit stream per column
    P.qzeros   int32 [G, ceil(N*b/32)]   zero points packed along N
    P.scales         [G, N]
    P.g_idx    int32 [K]                 group of each row; absent from most AutoRound files

`W[n, k] = scales[g, n] * (q[k, n] - z[g, n])` with g = g_idx[k]. Two conventions for the zero points: v1 stores
z - 1, v2 stores z; `formats/gptq_zeros.py` tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import Checkpoint, Slice, columns, whole
from xpuquant.formats.decoded import Decoded, subtract_zeros
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.gptq_config import GptqConfig, gptq_config
from xpuquant.formats.gptq_zeros import measure_zeros, true_zeros
from xpuquant.formats.nibbles import transpose_words, unpack_planar, unpack_rows
from xpuquant.formats.reader import Parts, need
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weight import CACHED_CODES, Array, IntWeight, Weight, column_groups, row_blocks

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True, kw_only=True)
class GptqWeight(IntWeight):
    """A GPTQ module.

    plus_one  zero points are stored minus one (v1)
    planar    each 32 columns are stored as bit planes (checkpoint_format `gptq_p`)
    """

    qweight: Tensor
    scale: Tensor
    qzeros: Tensor | None
    plus_one: bool
    planar: bool

    def word_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        codes = columns(self.qweight, start, stop)
        # Zero points are packed along N in fields that may straddle words: they are read whole.
        return (codes, *self.zero_inputs()) if self.widened and not self.symmetric else (codes,)

    def words(self, arrays: Sequence[Array], out: Array, start: int) -> None:
        packed = arrays[0].view(np.uint32)
        if self.bits == 4 and self.order is None:
            transpose_words(packed, out)
            return
        zeros = None if self.symmetric or not self.widened else self.zeros(arrays[1:]).T[start:]
        for first, last in row_blocks(len(out), self.K, limit=CACHED_CODES):
            codes = self._codes(packed[:, first:last])
            out[first:last] = self.pack(codes, None if zeros is None else zeros[first:last])

    def scale_inputs(self) -> tuple[Slice, ...]:
        return (whole(self.scale),)

    def scales(self, arrays: Sequence[Array]) -> Array:
        return arrays[0]

    def zero_inputs(self) -> tuple[Slice, ...]:
        assert self.qzeros is not None, "an asymmetric weight has qzeros"
        return (whole(self.qzeros),)

    def zeros(self, arrays: Sequence[Array]) -> Array:
        return true_zeros(arrays[0], self.bits, self.N, self.plus_one, self.planar)

    def decode_inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        inputs = (columns(self.qweight, start, stop), columns(self.scale, start, stop))
        return inputs if self.symmetric else inputs + self.zero_inputs()

    def decode(self, arrays: Sequence[Array], start: int, stop: int) -> Decoded:
        packed = arrays[0].view(np.uint32)
        if 32 % self.bits:
            codes = self._codes(packed)
        else:
            per_word, mask = 32 // self.bits, np.uint32((1 << self.bits) - 1)
            by_column = np.empty((self.K, stop - start), np.uint8)
            for j in range(per_word):
                rows = by_column[j::per_word]
                rows[...] = ((packed >> np.uint32(j * self.bits)) & mask)[: len(rows)]
            codes = by_column.T
        col = column_groups(self)
        zeros = None if self.symmetric else self.zeros(arrays[2:]).T[start:stop]
        values = subtract_zeros(codes, zeros, self.bits, col)
        return Decoded("int", values, arrays[1].T, np.arange(stop - start), col)

    def _codes(self, packed: Array) -> Array:
        """uint8 `[n, K]` from words `[ceil(K*b/32), n]`."""
        unpack = unpack_planar if self.planar else unpack_rows
        return unpack(np.ascontiguousarray(packed.T), self.bits, self.K)


class Gptq:
    name = "gptq"
    methods = frozenset({"gptq", "gptqmodel", "autogptq", "auto_gptq"})
    suffixes = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def claims(self, parts: Parts) -> bool:
        qweight, scales = parts.get("qweight"), parts.get("scales")
        if qweight is None or len(qweight.shape) != 2:
            return False
        # AWQ packs N, so its qweight is narrower than its scales; GPTQ's is as wide.
        return scales is None or len(scales.shape) != 2 or qweight.shape[1] == scales.shape[1]

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        config = gptq_config(checkpoint, name)
        qweight = need(parts, "qweight", name, dtype="I32", dims=2)
        scales = need(parts, "scales", name, dims=2)
        if scales.dtype not in FLOATS:
            raise DamagedError(f"{scales.name} is {scales.dtype}, want one of {', '.join(FLOATS)}")
        qzeros = need(parts, "qzeros", name, dtype="I32", dims=2) if "qzeros" in parts else None
        g_idx = need(parts, "g_idx", name, dtype="I32", dims=1) if "g_idx" in parts else None
        G, N = scales.shape
        if qweight.shape[1] != N:
            raise DamagedError(f"{qweight.name} has {qweight.shape[1]} columns, {scales.name} has {N}")
        bits = _bits(config, name, N, qzeros)
        K = g_idx.shape[0] if g_idx is not None else qweight.shape[0] * 32 // bits
        if qweight.shape[0] != -(-K * bits // 32):
            raise DamagedError(f"{qweight.name} has {qweight.shape[0]} rows, {bits}-bit codes of K={K} need "
                               f"{-(-K * bits // 32)}")  # fmt: skip
        group_size, order, groups_of, order_fact = _groups(checkpoint, config, name, K, G, g_idx)
        zeros = measure_zeros(checkpoint, config, name, bits, N, G, qzeros)
        return [
            GptqWeight(
                name=name,
                format=self.name,
                N=N,
                K=K,
                tensors=tuple(part for part in (qweight, scales, qzeros, g_idx) if part is not None),
                facts=(f"{bits}-bit, from the shapes", order_fact, zeros.fact),
                bits=bits,
                group_size=group_size,
                symmetric=zeros.symmetric,
                scale_dtype=scales.dtype,
                order=order,
                groups_of=groups_of,
                qweight=qweight,
                scale=scales,
                qzeros=qzeros,
                plus_one=zeros.plus_one,
                planar=config.planar,
            )
        ]


def _bits(config: GptqConfig, name: str, N: int, qzeros: Tensor | None) -> int:
    """Width of a code: from the width of qzeros, which holds N of them; from the config where that is absent
    or says too little (tiny N)."""
    if qzeros is None:
        return config.bits
    width = qzeros.shape[1]
    fits = [bits for bits in WIDTHS if width in (-(-N * bits // 32), N // 32 * bits)]
    if not fits:
        raise DamagedError(f"{qzeros.name} is {width} words wide; no width of code fits N={N}")
    return config.bits if config.bits in fits else fits[0]


def _groups(
    checkpoint: Checkpoint, config: GptqConfig, name: str, K: int, G: int, g_idx: Tensor | None
) -> tuple[int, Array | None, Array | None, str]:
    """(group size, act-order permutation, group of each column, the fact); the middle two None where trivial."""
    size = _group_size(config, name, K, G)
    trivial = np.arange(K) // size
    if g_idx is None:
        if config.desc_act and G > 1:
            raise DamagedError(f"{name}.g_idx is missing, but the config says desc_act (act-order)")
        return size, None, None, "no g_idx: columns in order"
    values = checkpoint.peek(g_idx)
    if values is None:
        if config.desc_act and G > 1:
            raise UnsupportedError(
                f"{g_idx.name} decides the column order and cannot be read from headers alone"
            )
        return size, None, None, "columns in order, as the config says"
    groups = values.astype(np.int64)
    groups = np.where(groups < 0, groups + G, groups)
    if groups.size and not (groups.min() >= 0 and groups.max() < G):
        raise DamagedError(f"{g_idx.name} names group {groups.max()} of {G}")
    if np.array_equal(groups, trivial):
        said = ", although desc_act is true" if config.desc_act else ""
        return size, None, None, f"g_idx is trivial: dropped{said}"
    runs = np.flatnonzero(np.diff(groups))
    if len(runs) < G and np.array_equal(groups, np.sort(groups)):
        # In order, but with another group size than the config and G suggest.
        raise DamagedError(f"{g_idx.name} has unequal groups; K={K}, {G} groups")
    return size, np.argsort(groups, kind="stable"), groups, "act-order, from the values of g_idx"


def _group_size(config: GptqConfig, name: str, K: int, G: int) -> int:
    claimed = config.group_size if 0 < config.group_size <= K else K
    if -(-K // claimed) == G:
        return claimed
    if K % G == 0:
        return K // G
    raise DamagedError(f"{name}.scales has {G} groups, which no group size of K={K} gives")


READER = Gptq()
