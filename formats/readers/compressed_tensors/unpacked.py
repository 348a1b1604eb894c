"""Reader for compressed-tensors `int-quantized` and `naive-quantized`: integer weights, one to a byte.

    P.weight             int8 [N, K]   signed codes; 4-bit ones (W4A8) lie in -8 .. 7
    P.weight_scale            [N, G], [N, 1] or [1]
    P.weight_zero_point  int8 [N, G]   signed; absent where symmetric
    P.input_scale, P.input_zero_point  static activation scales of W8A8

W4A8 and W4A16 have the same XPU weights: which arithmetic runs is decided when serving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import COMPRESSED_TENSORS, Array, Checkpoint, Slice, rows
from xpuquant.formats.packing.plain import pack_nibbles
from xpuquant.formats.readers.base import Parts, check_static, float_scale, need
from xpuquant.formats.readers.compressed_tensors.config import check_supported, quantizes_activations, weight_args
from xpuquant.formats.readers.compressed_tensors.packed import ScaledInts, groups_fit, measure_zero_points
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import CACHED_CODES, Arrays, FillRecipe, Recipe, Weight, row_blocks

_ACTIVATION_SUFFIXES = frozenset({"input_scale", "input_zero_point"})


@dataclass(frozen=True, kw_only=True)
class UnpackedWeight(ScaledInts):
    """An integer module stored as bytes."""

    weight: Tensor

    def codes(self, start: int, stop: int) -> FillRecipe:
        return Recipe((self.code_rows(start, stop),), self._fill_codes)

    def wide_codes(self, start: int, stop: int) -> FillRecipe:
        def fill(arrays: Arrays, out: Array) -> None:
            for first, last in row_blocks(len(out), self.K, limit=CACHED_CODES):
                out[first:last] = self.unpacked(arrays[0][first:last])

        return Recipe((self.code_rows(start, stop),), fill)

    def code_rows(self, start: int, stop: int) -> Slice:
        return rows(self.weight, start, stop)

    def unpacked(self, stored: Array) -> Array:
        # Bytes that are no code of this width are damage, not to be wrapped around.
        middle = 1 << (self.bits - 1)
        if stored.size and not (-middle <= int(stored.min()) and int(stored.max()) < middle):
            found = f"{stored.min()} .. {stored.max()}"
            raise DamagedError(f"{self.weight.name} holds {found}, which are no {self.bits}-bit codes")
        return stored.view(np.uint8) + np.uint8(middle)

    def _fill_codes(self, arrays: Arrays, out: Array) -> None:
        for first, last in row_blocks(len(out), self.K, limit=CACHED_CODES):
            out[first:last] = pack_nibbles(self.unpacked(arrays[0][first:last]))


class IntQuantized:
    name = "compressed-tensors int"
    methods = COMPRESSED_TENSORS
    suffixes = frozenset({"weight_scale", "weight_zero_point"}) | _ACTIVATION_SUFFIXES

    def claims(self, parts: Parts) -> bool:
        return "weight_scale" in parts and "weight" in parts and parts["weight"].dtype == "I8"

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        check_supported(checkpoint)
        weight = need(parts, "weight", name, dtype="I8", dims=2)
        scale = float_scale(need(parts, "weight_scale", name))
        N, K = weight.shape
        candidates = weight_args(checkpoint, name)
        if not candidates:
            raise UnsupportedError("no group of the config describes it, so its bits are unknown")
        fits = [args for args in candidates if args.type == "int" and args.bits <= 8 and groups_fit(args, scale, N, K)]
        if not fits:
            raise DamagedError(
                f"{weight.name} {list(weight.shape)} with scales {list(scale.shape)} is not what the "
                f"config describes ({candidates[0]})"
            )
        args = fits[0]
        zero_point = parts.get("weight_zero_point")
        group_size = args.group_size or K
        symmetric, fact = measure_zero_points(checkpoint, args, N, -(-K // group_size), False, zero_point)
        facts = [f"{args.bits}-bit codes stored as bytes, from the config", fact]
        for suffix in _ACTIVATION_SUFFIXES & parts.keys():
            check_static(parts[suffix])
        if args.bits == 8 and quantizes_activations(checkpoint):
            facts.append("activations stay in 16 bits, where the config quantizes them to 8 (W8A8 becomes W8A16)")
        if _ACTIVATION_SUFFIXES & parts.keys():
            facts.append("static activation scales dropped: XPU kernels quantize activations per token")
        return [
            UnpackedWeight(
                name=name,
                format=self.name,
                N=N,
                K=K,
                tensors=tuple(parts[suffix] for suffix in parts if suffix in self.suffixes | {"weight"}),
                facts=tuple(facts),
                bits=args.bits,
                group_size=group_size,
                symmetric=symmetric,
                scale_dtype=scale.dtype,
                weight=weight,
                scale=scale,
                zero_point=zero_point,
                padded=False,
            )
        ]
