"""Reader for compressed-tensors `pack-quantized` (llm-compressor, AutoRound's llm_compressor export).

    P.weight_packed      int32 [N, P(K)]   offset-binary codes (signed + 2^(b-1)), packed along K
    P.weight_scale             [N, G], [N, 1] or [1]
    P.weight_zero_point  int32 [P(N), G]   packed along N; int8 [N, G] signed before 0.9.4; absent where symmetric
    P.weight_shape       int64 [2]         N, K: the only exact source of K
    P.weight_g_idx       int32 [K]         actorder "group", 0.6 to 0.18: columns stay in source order

P(x) is ceil(x*b/32) since 0.18 (a dense bit stream) and ceil(x / (32//b)) before (no value straddles a word); they
differ for 3, 5, 6, 7 bits, and only the shape tells which
(compressed_tensors/compressors/pack_quantized/helpers.py).
"""

from __future__ import annotations

from abc import abstractmethod
from sys import intern

import numpy as np

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import COMPRESSED_TENSORS, Array, Checkpoint, Slice, rows, whole
from xpuquant.formats.packing.plain import pack_nibbles, unpack_nibbles, unpack_rows
from xpuquant.formats.readers.base import Parts, float_scale, need
from xpuquant.formats.readers.compressed_tensors.config import (
    WeightArgs,
    weight_args,
)
from xpuquant.formats.readers.compressed_tensors.shapes import args_of_shapes
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
from xpuquant.formats.weights.decoded import Decoded, subtract_zeros
from xpuquant.formats.weights.integers import (
    SPREADABLE,
    SourceInts,
    column_groups,
    packed_stream,
    packs,
    words_of_rows,
)
from xpuquant.formats.weights.packed import Packed
from xpuquant.values import frozen

_BITS = range(1, 9)
"""Bits of a code."""


def packed_words(count: int, bits: int, padded: bool) -> int:
    """Words that `count` codes take."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


def unpack_offset_binary(words: Array, bits: int, count: int, padded: bool) -> Array:
    """uint8 `[n, count]` from uint32 `[n, P(count)]`, offset-binary as stored."""
    if not padded:
        return unpack_rows(words, bits, count)
    fields = unpack_rows(np.ascontiguousarray(words).reshape(-1, 1), bits, 32 // bits)
    return fields.reshape(len(words), -1)[:, :count]


@frozen(kw_only=True)
class ScaledInts(SourceInts):
    """What the packed and the unpacked form share: scales and zero points. `padded`: no code straddles a word
    (before 0.18)."""

    scale: Tensor
    zero_point: Tensor | None
    padded: bool

    @abstractmethod
    def code_rows(self, start: int, stop: int) -> Slice:
        """The stored codes of rows `start:stop`."""

    @abstractmethod
    def unpacked(self, stored: Array) -> Array:
        """uint8 `[n, K]` offset-binary codes from the array of `code_rows`."""

    @abstractmethod
    def _fill_codes(self, arrays: Arrays, out: Array) -> None:
        """What `codes` does, from the array of `code_rows`."""

    def codes(self, start: int, stop: int) -> FillRecipe:
        return Recipe((self.code_rows(start, stop),), self._fill_codes)

    def wide_codes(self, start: int, stop: int) -> FillRecipe:
        def fill(arrays: Arrays, out: Array) -> None:
            for first, last in row_blocks(len(out), self.K, limit=CACHED_CODES):
                out[first:last] = self.unpacked(arrays[0][first:last])

        return Recipe((self.code_rows(start, stop),), fill)

    def scales(self) -> ArrayRecipe:
        shape = (self.N, self.groups)
        return Recipe((whole(self.scale),), lambda arrays: np.broadcast_to(arrays[0].reshape(-1, self.groups), shape).T)

    def zeros(self, start: int, stop: int) -> ArrayRecipe:
        assert self.zero_point is not None, "an asymmetric weight has zero points"
        name = self.zero_point.name

        def build(arrays: Arrays) -> Array:
            stored = arrays[0]
            words = words_of_rows(self.bits, start, stop)
            if stored.dtype != np.int32 or self.padded or words is None:
                return offset_binary_zeros(stored, self.bits, self.N, self.padded, name)[:, start:stop]
            return offset_binary_zeros(stored[words], self.bits, stop - start, self.padded, name)

        return Recipe((whole(self.zero_point),), build)

    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        scales = self.scales()
        zeros = None if self.symmetric else self.zeros(start, stop)

        def build(arrays: Arrays) -> Decoded:
            col = column_groups(self)
            minus = None if zeros is None else zeros.build(arrays[2:]).T
            values = subtract_zeros(self.unpacked(arrays[0]), minus, self.bits, col)
            return Decoded("int", values, scales.build(arrays[1:2]).T[start:stop], np.arange(stop - start), col)

        inputs = (self.code_rows(start, stop), *scales.inputs)
        return Recipe(inputs if zeros is None else inputs + zeros.inputs, build)


@frozen(kw_only=True)
class PackedWeight(ScaledInts):
    """A `pack-quantized` module."""

    packed: Tensor

    @property
    def verbatim(self) -> bool:
        return self.bits == 4 and self.groups_of is None

    def code_rows(self, start: int, stop: int) -> Slice:
        return rows(self.packed, start, stop)

    def unpacked(self, stored: Array) -> Array:
        if self.bits == 4:
            return unpack_nibbles(stored.view(np.uint8))[:, : self.K]
        return unpack_offset_binary(stored.view(np.uint32), self.bits, self.K, self.padded)

    def as_packed(self, start: int, stop: int) -> RowsRecipe:
        if (self.bits != 4 and (self.bits not in SPREADABLE or self.padded)) or not packs(self):
            return super().as_packed(start, stop)
        scales = self.scales()
        zeros = None if self.symmetric else self.zeros(start, stop)

        def build(arrays: Arrays) -> Packed:
            minus = None if zeros is None else zeros.build(arrays[2:]).T
            return packed_stream(self, arrays[0].view(np.uint32), minus, scales.build(arrays[1:2]).T[start:stop])

        return Recipe(self.decoded(start, stop).inputs, build)

    def _fill_codes(self, arrays: Arrays, out: Array) -> None:
        packed = arrays[0].view(np.uint32)
        if self.bits == 4:
            out[...] = packed
            return
        from xpuquant.formats.packing.convert_loops import spread_words

        for first, last in row_blocks(len(out), self.K, limit=CACHED_CODES):
            if self.bits in (2, 3) and not self.padded:
                spread_words(packed[first:last].T, self.bits, out[first:last].T)
            else:
                out[first:last] = pack_nibbles(unpack_offset_binary(packed[first:last], self.bits, self.K, self.padded))


def offset_binary_zeros(stored: Array, bits: int, N: int, padded: bool, name: str) -> Array:
    """uint8 `[G, N]` offset-binary zero points, from either generation of storage.

    Raises:
        DamagedError: bytes that are no zero point of this width.
    """
    middle = 1 << (bits - 1)
    if stored.dtype != np.int8 and stored.shape != (1,):
        return unpack_offset_binary(np.ascontiguousarray(stored.T).view(np.uint32), bits, N, padded)
    if stored.size and not (-middle <= int(stored.min()) and int(stored.max()) < middle):
        raise DamagedError(f"{name} holds {stored.min()} .. {stored.max()}, which are no {bits}-bit zero points")
    signed = np.broadcast_to(stored.reshape(-1, stored.shape[-1]), (N, stored.shape[-1]))
    return (signed.T.astype(np.int16) + middle).astype(np.uint8)


class PackQuantized:
    name = "compressed-tensors"
    methods = COMPRESSED_TENSORS
    suffixes = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"})

    def claims(self, parts: Parts) -> bool:
        # With scale_packed it is marlin-24's.
        return "weight_packed" in parts and parts["weight_packed"].dtype == "I32" and "scale_packed" not in parts

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        packed = need(parts, "weight_packed", name, dtype="I32", dims=2)
        scale = float_scale(need(parts, "weight_scale", name))
        zero_point, g_idx = parts.get("weight_zero_point"), parts.get("weight_g_idx")
        candidates = weight_args(checkpoint, name)
        N = packed.shape[0]
        stated = _in_features(checkpoint, name, parts, N)
        fits = [
            (args, K)
            for args in candidates
            if args.type == "int"
            and (K := stated or _implied(args, packed, scale))
            and groups_fit(args, scale, N, K)
            and _words_fit(args.bits, packed, K)
        ]
        told: tuple[str, ...] = ()
        if fits:
            args, K = fits[0]
        else:
            K = stated or 0  # without weight_shape, nothing but the config says K
            widths = [bits for bits in _BITS if stated and _words_fit(bits, packed, K)]
            args, told = args_of_shapes(candidates, widths, packed, scale, N, K)
        group_size = args.group_size or K
        groups_of = _act_order(checkpoint, g_idx, K, group_size)
        padded = packed.shape[1] != packed_words(K, args.bits, padded=False)
        symmetric, fact = measure_zero_points(checkpoint, args, N, -(-K // group_size), padded, zero_point)
        return [
            PackedWeight(
                name=name,
                format=self.name,
                N=N,
                K=K,
                tensors=tuple(parts[suffix] for suffix in parts if suffix in self.suffixes),
                facts=(
                    intern(f"{args.bits}-bit, {'padded' if padded else 'dense'} packing, from the shapes"),
                    *told,
                    fact,
                    *["act-order, from the values of weight_g_idx"] * (groups_of is not None),
                ),
                bits=args.bits,
                group_size=group_size,
                symmetric=symmetric,
                scale_dtype=scale.dtype,
                groups_of=groups_of,
                packed=packed,
                scale=scale,
                zero_point=zero_point,
                padded=padded,
            )
        ]


def _in_features(checkpoint: Checkpoint, name: str, parts: Parts, N: int) -> int | None:
    """K from `weight_shape`, or None where it is absent or cannot be read from headers."""
    tensor = parts.get("weight_shape")
    if tensor is not None and (tensor.shape != (2,) or tensor.dtype not in ("I64", "I32")):
        raise DamagedError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, want I64 [2]")
    shape = None if tensor is None else checkpoint.peek(tensor)
    if shape is None:
        return None
    values = [int(value) for value in shape.reshape(-1)]
    if values[0] != N or values[1] <= 0:
        raise DamagedError(f"{name}.weight_shape says {values}, weight_packed has {N} rows")
    return values[1]


def _implied(args: WeightArgs, packed: Tensor, scale: Tensor) -> int | None:
    """K without `weight_shape`: what fills the words, where codes do; else whole groups."""
    if 32 % args.bits == 0:
        return packed.shape[1] * 32 // args.bits
    return args.group_size * scale.shape[1] if args.group_size and len(scale.shape) == 2 else None


def _words_fit(bits: int, packed: Tensor, K: int) -> bool:
    return bits in _BITS and packed.shape[1] in (packed_words(K, bits, padded) for padded in (False, True))


def groups_fit(args: WeightArgs, scale: Tensor, N: int, K: int) -> bool:
    """Whether scales `[N, G]`, `[N, 1]`, `[1, N]` or `[1]` are what the config describes for a weight `[N, K]`."""
    G = -(-K // args.group_size) if args.group_size else 1
    return scale.shape == (N, G) or (G == 1 and scale.shape in ((), (1,), (1, 1), (N,), (1, N)))


def _act_order(checkpoint: Checkpoint, g_idx: Tensor | None, K: int, group_size: int) -> Array | None:
    """Group of each column, or None where they are in order."""
    if g_idx is None:
        return None
    values = checkpoint.peek(g_idx)
    if values is None:
        raise UnsupportedError(f"{g_idx.name} decides the column order and cannot be read from headers alone")
    if values.shape != (K,):
        raise DamagedError(f"{g_idx.name} has shape {list(values.shape)}, want [{K}]")
    groups = values.astype(np.int64)
    # -1 marks "not used"; compressed-tensors itself ignores the tensor then.
    if (groups < 0).any() or np.array_equal(groups, np.arange(K) // group_size):
        return None
    if groups.max() >= -(-K // group_size):
        raise DamagedError(f"{g_idx.name} names group {groups.max()} of {-(-K // group_size)}")
    return groups.astype(np.min_scalar_type(-(-K // group_size)))


def measure_zero_points(
    checkpoint: Checkpoint, args: WeightArgs, N: int, G: int, padded: bool, zero_point: Tensor | None
) -> tuple[bool, str]:
    """(symmetric, how that was decided).

    Raises:
        DamagedError: zero points of another shape than the scales'.
    """
    if zero_point is None:
        # Up to 0.9.2 all-zero zero points were dropped even from asymmetric files: the same thing.
        return True, "symmetric: no weight_zero_point"
    wanted = [(N, G)] if zero_point.dtype == "I8" else [(packed_words(N, args.bits, padded), G)]
    if zero_point.dtype not in ("I8", "I32") or (zero_point.shape not in wanted and zero_point.shape != (1,)):
        raise DamagedError(f"{zero_point.name} is {zero_point.dtype} {list(zero_point.shape)}, want {list(wanted[0])}")
    stored = checkpoint.peek(zero_point)
    if stored is None:
        return args.symmetric, "zero points as the config says"
    zeros = offset_binary_zeros(stored, args.bits, N, padded, zero_point.name)
    if (zeros == 1 << (args.bits - 1)).all():
        return True, "symmetric, from the zero points"
    lie = ", although the config says symmetric" if args.symmetric else ""
    return False, f"asymmetric, from the zero points{lie}"
