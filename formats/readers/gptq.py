"""Reader for GPTQ, as written by GPTQModel, AutoGPTQ and AutoRound.

    P.qweight  int32 [ceil(K*b/32), N]   codes packed along K, a little-endian bit stream per column
    P.qzeros   int32 [G, ceil(N*b/32)]   zero points packed along N
    P.scales         [G, N]
    P.g_idx    int32 [K]                 group of each row; absent from most AutoRound files
    P.bias           [N]                 where the model has one; AutoGPTQ wrote zeros where it has not

`W[n, k] = scales[g, n] * (q[k, n] - z[g, n])` with g = g_idx[k]. Two conventions for the zero points: v1 stores
z - 1, v2 stores z; `formats/readers/gptq_zeros.py` tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from functools import lru_cache, partial
from sys import intern
from typing import TypeVar

import numpy as np

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.architecture import has_bias, in_features, is_embedding
from xpuquant.formats.checkpoint import Array, Checkpoint, Slice, columns, whole
from xpuquant.formats.packing.plain import pack_nibbles, unpack_planar, unpack_rows
from xpuquant.formats.readers.base import Parts, float_scale, need
from xpuquant.formats.readers.gptq_config import GptqConfig, gptq_config_of
from xpuquant.formats.readers.gptq_zeros import measure_zeros, true_zeros
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import (
    CACHED_CODES,
    ArrayRecipe,
    Arrays,
    DecodedRecipe,
    FillRecipe,
    Recipe,
    RowsRecipe,
    Weight,
    row_blocks,
)
from xpuquant.formats.weights.decoded import Decoded, even_groups, in_order, subtract_zeros
from xpuquant.formats.weights.integers import (
    SPREADABLE,
    SourceInts,
    column_groups,
    columns_of_stream,
    in_pairs,
    packed_stream,
    packs,
    source_group_size,
    words_of_rows,
)
from xpuquant.formats.weights.packed import PackedColumns, Rows
from xpuquant.values import frozen

WIDTHS = (2, 3, 4, 5, 6, 7, 8)

R = TypeVar("R")


@frozen(kw_only=True)
class GptqWeight(SourceInts):
    """A GPTQ module.

    plus_one  zero points are stored minus one (v1)
    planar    each 32 columns are stored as bit planes (checkpoint_format `gptq_p`)
    folded    the act-order is met by the layers before, whose rows stand in stored order (`fold_act_order.py`)
    rows      `[N]` source row of each stored row, for such a layer before; None where rows are in order
    """

    qweight: Tensor
    scale: Tensor
    qzeros: Tensor | None
    plus_one: bool
    planar: bool
    folded: bool = False
    rows: Array | None = field(default=None, compare=False)

    @property
    def act_order(self) -> bool:
        return self.groups_of is not None and not self.folded

    def codes(self, start: int, stop: int) -> FillRecipe:
        def fill(arrays: Arrays, out: Array) -> None:
            self._fill_codes(self._pick(arrays[0], start, stop).view(np.uint32), out)

        return Recipe((self._columns(self.qweight, start, stop),), fill)

    def wide_codes(self, start: int, stop: int) -> FillRecipe:
        def fill(arrays: Arrays, out: Array) -> None:
            from xpuquant.formats.packing.convert_loops import transpose_words

            packed = self._pick(arrays[0], start, stop).view(np.uint32)
            if self.bits == 8:
                transpose_words(packed[: self.K // 4], out.view(np.uint32))
                return
            for first, last in row_blocks(len(out), self.K, limit=CACHED_CODES):
                out[first:last] = self._unpacked(packed[:, first:last])

        return Recipe((self._columns(self.qweight, start, stop),), fill)

    def scales(self) -> ArrayRecipe:
        return Recipe((whole(self.scale),), lambda arrays: self._pick(arrays[0], 0, self.N))

    def zeros(self, start: int, stop: int) -> ArrayRecipe:
        assert self.qzeros is not None, "an asymmetric weight has qzeros"

        def build(arrays: Arrays) -> Array:
            words = words_of_rows(self.bits, start, stop)
            if self.rows is not None or words is None:
                zeros = true_zeros(arrays[0], self.bits, self.N, self.plus_one, self.planar)
                return zeros[:, start:stop] if self.rows is None else self._pick(zeros, start, stop)
            return true_zeros(arrays[0][:, words], self.bits, stop - start, self.plus_one, self.planar)

        return Recipe((whole(self.qzeros),), build)

    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        zeros = None if self.symmetric else self.zeros(start, stop)

        def build(arrays: Arrays) -> Decoded:
            packed, scale = (self._pick(array, start, stop) for array in arrays[:2])
            col = column_groups(self)
            minus = None if zeros is None else zeros.build(arrays[2:]).T
            values = subtract_zeros(self._unpacked(packed.view(np.uint32)), minus, self.bits, col)
            if self.folded:
                values, col = values[:, self.order], col[self.order]
            return Decoded("int", values, scale.T, np.arange(stop - start), col)

        inputs = (self._columns(self.qweight, start, stop), self._columns(self.scale, start, stop))
        return Recipe(inputs if zeros is None else inputs + zeros.inputs, build)

    @property
    def _is_stream(self) -> bool:
        """Whether the words are plain streams of codes that can be compared as nibbles."""
        plain = self.bits == 4 or (self.bits in SPREADABLE and not (self.planar and 32 % self.bits))
        return plain and self.rows is None and packs(self)

    def as_packed(self, start: int, stop: int) -> RowsRecipe:
        if not self._is_stream:
            return super().as_packed(start, stop)
        return self._from_stream(start, stop, lambda words, *rest: packed_stream(self, words.T, *rest))

    def as_compared(self, start: int, stop: int) -> Recipe[Callable[[Arrays], Rows | PackedColumns]]:
        if not self._is_stream or not in_pairs(self, start, stop):
            return super().as_compared(start, stop)
        return self._from_stream(start, stop, partial(columns_of_stream, self))

    def _from_stream(
        self, start: int, stop: int, make: Callable[[Array, Array | None, Array], R]
    ) -> Recipe[Callable[[Arrays], R]]:
        """Rows made of words by columns, zero points and scales."""
        zeros = None if self.symmetric else self.zeros(start, stop)

        def build(arrays: Arrays) -> R:
            words = arrays[0].view(np.uint32)[: self.K * self.bits // 32]
            return make(words, None if zeros is None else zeros.build(arrays[2:]).T, arrays[1].T)

        return Recipe(self.decoded(start, stop).inputs, build)

    def _columns(self, tensor: Tensor, start: int, stop: int) -> Slice:
        """What holds output rows `start:stop`: these columns, or all where they are scattered."""
        return columns(tensor, start, stop) if self.rows is None else columns(tensor, 0, self.N)

    def _pick(self, array: Array, start: int, stop: int) -> Array:
        """Output rows `start:stop` out of what `_columns` gives."""
        return array if self.rows is None else array[:, self.rows[start:stop]]

    def _fill_codes(self, packed: Array, out: Array) -> None:
        from xpuquant.formats.packing.convert_loops import transpose_words, widen_words

        # Rows past K are padding (AutoRound, model-free).
        packed = packed[: self.K * self.bits // 32]
        if self.bits == 4:
            transpose_words(packed, out)
        elif self.bits == 2 or (self.bits == 3 and not self.planar):
            widen_words(packed, self.bits, out)
        else:
            for first, last in row_blocks(len(out), self.K, limit=CACHED_CODES):
                out[first:last] = pack_nibbles(self._unpacked(packed[:, first:last]))

    def _unpacked(self, packed: Array) -> Array:
        """uint8 `[n, K]` from words `[ceil(K*b/32), n]`."""
        unpack = unpack_planar if self.planar else unpack_rows
        return unpack(in_order(packed.T), self.bits, self.K)


class Gptq:
    name = "gptq"
    methods = frozenset({"gptq", "gptq-v2", "gptqmodel", "autogptq", "auto-gptq", "marlin", "moe-wna16"})
    suffixes = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def claims(self, parts: Parts) -> bool:
        qweight, scales = parts.get("qweight"), parts.get("scales")
        if qweight is None or len(qweight.shape) != 2 or qweight.dtype == "I16":
            return False
        # AWQ packs N, so its qweight is narrower than its scales; GPTQ's is as wide.
        return scales is None or len(scales.shape) != 2 or qweight.shape[1] == scales.shape[1]

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        config = gptq_config_of(checkpoint, name)
        if is_embedding(name):
            # in_features is the vocabulary (gptqmodel/utils/model.py, create_quant_layer).
            raise UnsupportedError("an embedding, which GPTQModel quantizes transposed: no XPU kernel looks it up")
        if f"{name}.w_bf16_to_fp8_scale" in checkpoint.tensors:
            raise UnsupportedError("int4 inside fp8 (AutoRound's W4A-fp8, w_bf16_to_fp8_scale) has no XPU kernel")
        qweight = need(parts, "qweight", name, dtype="I32", dims=2)
        scales = float_scale(need(parts, "scales", name, dims=2))
        qzeros = need(parts, "qzeros", name, dtype="I32", dims=2) if "qzeros" in parts else None
        g_idx = _index(parts, name)
        G, N = scales.shape
        if qweight.shape[1] != N:
            raise DamagedError(f"{qweight.name} has {qweight.shape[1]} columns, {scales.name} has {N}")
        bits = _bits(config, N, qweight, qzeros, g_idx)
        if config.planar:
            _check_planar(bits, qweight.name, qweight.shape[0])
            _check_planar(bits, f"{name}.qzeros", qzeros.shape[1] if qzeros is not None else 0)
        K, padding = _in_features(checkpoint, config, name, bits, qweight, g_idx)
        group_size, groups_of, order_fact = _groups(checkpoint, config, name, K, G, g_idx)
        zeros = measure_zeros(checkpoint, config, name, bits, N, G, qzeros)
        bias, bias_fact = _dummy_bias(checkpoint, name)
        facts = (f"{bits}-bit, from the shapes", padding, order_fact, zeros.fact, bias_fact)
        return [
            GptqWeight(
                name=name,
                format=self.name,
                N=N,
                K=K,
                tensors=tuple(
                    [part for part in (qweight, scales, qzeros, parts.get("g_idx"), bias) if part is not None]
                ),
                facts=_facts(facts),
                bits=bits,
                group_size=group_size,
                symmetric=zeros.symmetric,
                scale_dtype=scales.dtype,
                groups_of=groups_of,
                qweight=qweight,
                scale=scales,
                qzeros=qzeros,
                plus_one=zeros.plus_one,
                planar=config.planar,
            )
        ]


@lru_cache(256)
def _facts(said: tuple[str, ...]) -> tuple[str, ...]:
    """Without what is empty: for nearly all modules the very same tuple."""
    return tuple(intern(fact) for fact in said if fact)


def _bits(config: GptqConfig, N: int, qweight: Tensor, qzeros: Tensor | None, g_idx: Tensor | None) -> int:
    """Width of a code: qzeros hold N of them in a row, and qweight g_idx's K in a column. The config decides where
    these are absent or N is too small to tell."""
    fits: tuple[int, ...] = WIDTHS
    if qzeros is not None:
        width = qzeros.shape[1]
        fits = _widths_of_row(N, width)
        if not fits:
            raise DamagedError(f"{qzeros.name} is {width} words wide; no width of code fits N={N}")
    if g_idx is not None:
        K, height = g_idx.shape[0], qweight.shape[0]
        in_column = _widths_of_column(K, height)
        fits = fits if fits == in_column else tuple(bits for bits in fits if bits in in_column)
        if not fits:
            raise DamagedError(f"{qweight.name} has {height} rows, which no width of code gives for K={K}")
    return config.bits if config.bits in fits else fits[0]


@lru_cache(256)
def _widths_of_row(N: int, words: int) -> tuple[int, ...]:
    """Widths of which N codes fill so many words. Old packers dropped the fields of a last, partial word."""
    return tuple(bits for bits in WIDTHS if words in (-(-N * bits // 32), N // 32 * bits))


@lru_cache(256)
def _widths_of_column(K: int, words: int) -> tuple[int, ...]:
    """Widths of which K codes fill so many words."""
    return tuple(bits for bits in WIDTHS if words == -(-K * bits // 32))


def _index(parts: Parts, name: str) -> Tensor | None:
    """`g_idx`; None where there is none, or an empty one, which Marlin's loaders leave for "columns in order"."""
    if "g_idx" not in parts or parts["g_idx"].shape == (0,):
        return None
    g_idx = need(parts, "g_idx", name, dims=1)
    if g_idx.dtype not in ("I32", "I64"):
        raise DamagedError(f"{g_idx.name} is {g_idx.dtype}, want I32")
    return g_idx


def _check_planar(bits: int, name: str, words: int) -> None:
    if 32 % bits and words % bits:
        raise DamagedError(f"{name} has {words} words, no whole number of planar blocks ({bits} words each)")


def _in_features(
    checkpoint: Checkpoint, config: GptqConfig, name: str, bits: int, qweight: Tensor, g_idx: Tensor | None
) -> tuple[int, str]:
    """(K, fact). AutoRound's model-free export pads K to whole groups, inside qweight; only the architecture knows."""
    if g_idx is not None:
        return g_idx.shape[0], ""
    packed = qweight.shape[0] * 32 // bits
    size = config.group_size
    real = in_features(checkpoint, name) if config.writer == "auto-round" else None
    if real is not None and size > 0 and packed - size < real < packed and packed % size == 0:
        return real, f"K={real} of {packed} packed columns, from the architecture: the rest is padding"
    return packed, ""


def _groups(
    checkpoint: Checkpoint, config: GptqConfig, name: str, K: int, G: int, g_idx: Tensor | None
) -> tuple[int, Array | None, str]:
    """(group size, group of each column or None where they are in order, the fact)."""
    size = source_group_size(config.group_size, K, G)
    if size is None:
        raise DamagedError(f"{name}.scales has {G} groups, which no group size of K={K} gives")
    if g_idx is None:
        if config.desc_act and G > 1:
            raise DamagedError(f"{name}.g_idx is missing, but the config says desc_act (act-order)")
        return size, None, "no g_idx: columns in order"
    values = checkpoint.peek(g_idx)
    if values is None:
        if config.desc_act and G > 1:
            raise UnsupportedError(f"{g_idx.name} decides the column order and cannot be read from headers alone")
        return size, None, "columns in order, as the config says"
    in_order_said = ", although desc_act is true" if config.desc_act and G > 1 else ""
    if values.tobytes() == _trivial(K, size):  # nearly always: nothing else is worked out then
        return size, None, f"g_idx is trivial: dropped{in_order_said}"
    if G > 1 and not values.any():
        # No quantizer gives all columns one of several groups. exllama's and TGI's loaders take it for "none"
        # (exllamav2/ext.py, make_q_matrix; text_generation_server/layers/gptq), vLLM reads no g_idx without desc_act.
        if config.desc_act:
            raise DamagedError(f"{g_idx.name} is all zeros, which is no order of {G} groups; the config says desc_act")
        return size, None, "g_idx is all zeros, which loaders take for none: dropped"
    groups = np.where(values < 0, values + G, values)
    if groups.size and not (groups.min() >= 0 and groups.max() < G):
        raise DamagedError(f"{g_idx.name} names group {values[(groups < 0) | (groups >= G)][0]} of {G}")
    if np.array_equal(groups, even_groups(K, size)):
        return size, None, f"g_idx is trivial: dropped{in_order_said}"
    first = int(np.count_nonzero(groups == 0)) or 1
    if -(-K // first) == G and np.array_equal(groups, np.arange(K) // first):
        return (
            first,
            None,
            f"g_idx is trivial: dropped; groups of {first}, the config says {config.group_size}",
        )
    said = "" if config.desc_act else ", although the config does not say desc_act"
    return size, groups.astype(np.min_scalar_type(G)), f"act-order, from the values of g_idx{said}"


@lru_cache(64)
def _trivial(K: int, size: int) -> bytes:
    """The bytes of a g_idx of columns that are in order."""
    return even_groups(K, size).astype(np.int32).tobytes()


def _dummy_bias(checkpoint: Checkpoint, name: str) -> tuple[Tensor | None, str]:
    """A bias to drop: all zeros, on a linear whose architecture has none. Loaders do not know such a tensor."""
    bias = checkpoint.tensors.get(f"{name}.bias")
    if bias is None or has_bias(checkpoint, name) is not False:
        return None, ""
    values = checkpoint.peek(bias)
    if values is None:
        return None, "the architecture has no bias here: passed through unseen"
    if values.any():
        return None, "the architecture has no bias here, but it is not zero: kept"
    return bias, "a bias of zeros the architecture does not have: dropped"
