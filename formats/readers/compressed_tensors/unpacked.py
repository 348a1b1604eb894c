"""Reader for integers, one to a byte: compressed-tensors `int-quantized` and `naive-quantized`, and others' W8A8.

    P.weight             int8 [N, K]   signed codes; 4-bit ones (W4A8) lie in -8 .. 7
    P.weight_scale            [N, G], [N, 1], [N] (Quark, ModelOpt) or [1]
    P.weight_scale_inv        [ceil(N/n), ceil(K/k)]   SGLang's `blockwise_int8`; a multiplier, despite its name
    P.weight_zero_point  int8 [N, G], [N] (Quark)   signed; absent where symmetric
    P.input_scale, P.input_zero_point  static activation scales of W8A8

W4A8 and W4A16 have the same XPU weights: which arithmetic runs is decided when serving.
"""

from __future__ import annotations

import numpy as np

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import COMPRESSED_TENSORS, Array, Checkpoint, Slice, rows, whole
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.packing.plain import pack_nibbles
from xpuquant.formats.readers.base import Parts, check_static, float_scale, need
from xpuquant.formats.readers.compressed_tensors.config import (
    W8A8_METHODS,
    WeightArgs,
    quantizes_activations,
    stated_block,
    weight_args,
)
from xpuquant.formats.readers.compressed_tensors.packed import ScaledInts, groups_fit, measure_zero_points
from xpuquant.formats.readers.compressed_tensors.shapes import args_of_shapes
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import CACHED_CODES, ArrayRecipe, Arrays, Recipe, Weight, row_blocks
from xpuquant.formats.weights.floats import view
from xpuquant.values import frozen

_ACTIVATION_SUFFIXES = frozenset({"input_scale", "input_zero_point"})


@frozen(kw_only=True)
class UnpackedWeight(ScaledInts):
    """An integer module stored as bytes. `rows_per_scale`: where scales cover blocks."""

    weight: Tensor
    rows_per_scale: int = 1

    def scales(self) -> ArrayRecipe:
        if self.rows_per_scale == 1:
            return super().scales()
        rows_of = np.arange(self.N) // self.rows_per_scale
        return Recipe((whole(self.scale),), lambda arrays: arrays[0][rows_of].T)

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
    methods = COMPRESSED_TENSORS | W8A8_METHODS
    suffixes = frozenset({"weight_scale", "weight_scale_inv", "weight_zero_point"}) | _ACTIVATION_SUFFIXES

    def claims(self, parts: Parts) -> bool:
        # Exponents beside bytes are DeepSeek-V4's MXFP4.
        blocks = "weight_scale_inv" in parts and parts["weight_scale_inv"].dtype in FLOATS
        return ("weight_scale" in parts or blocks) and "weight" in parts and parts["weight"].dtype == "I8"

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        weight = need(parts, "weight", name, dtype="I8", dims=2)
        N, K = weight.shape
        rows_per_scale = 1
        if "weight_scale_inv" in parts:
            scale = float_scale(need(parts, "weight_scale_inv", name, dims=2))
            rows_per_scale, args = _in_blocks(checkpoint, weight, scale)
            facts = [
                f"8-bit codes stored as bytes, in blocks of {rows_per_scale}x{args.group_size}, as the config says"
            ]
        else:
            scale = float_scale(need(parts, "weight_scale", name))
            args, facts = _in_groups(checkpoint, name, weight, scale)
        group_size = args.group_size or K
        zero_point = _zero_point(parts, N)
        symmetric, fact = measure_zero_points(checkpoint, args, N, -(-K // group_size), False, zero_point)
        facts.append(fact)
        for suffix in _ACTIVATION_SUFFIXES & parts.keys():
            check_static(parts[suffix])
        if args.bits == 8 and quantizes_activations(checkpoint):
            facts.append("activations stay in 16 bits, where the config quantizes them to 8 (W8A8 becomes W8A16)")
        if _ACTIVATION_SUFFIXES & parts.keys():
            facts.append("static activation scales dropped: XPU kernels quantize activations per token")
        return [
            UnpackedWeight(
                name=name,
                format=_format(checkpoint.method, self.name),
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
                rows_per_scale=rows_per_scale,
            )
        ]


def _format(method: str, otherwise: str) -> str:
    """What reports call integers in bytes: by who writes them so."""
    if method in W8A8_METHODS:
        return "sglang int"
    return next((f"{producer} int" for producer in ("quark", "modelopt") if producer in method), otherwise)


def _in_groups(checkpoint: Checkpoint, name: str, weight: Tensor, scale: Tensor) -> tuple[WeightArgs, list[str]]:
    """(the scheme, the facts) of scales for groups or rows."""
    N, K = weight.shape
    candidates = weight_args(checkpoint, name)
    for args in candidates:
        if args.type == "int" and args.bits <= 8 and groups_fit(args, scale, N, K):
            return args, [f"{args.bits}-bit codes stored as bytes, from the config"]
    # A byte has room for 8 bits; that fewer are used is for a config to say.
    widths = [args.bits for args in candidates if args.bits <= 8] or [8]
    args, told = args_of_shapes(candidates, widths, weight, scale, N, K)
    return args, [f"{args.bits}-bit codes stored as bytes", *told]


def _in_blocks(checkpoint: Checkpoint, weight: Tensor, scale: Tensor) -> tuple[int, WeightArgs]:
    """(rows per scale, the scheme) of scales for blocks. Raises UnsupportedError where these are none."""
    N, K = weight.shape
    rows, columns = stated_block(checkpoint) or (N, K)
    if scale.shape != (-(-N // rows), -(-K // columns)):
        raise UnsupportedError(
            f"{weight.name} I8 {list(weight.shape)} with scales {list(scale.shape)} is no weight of 8-bit integers in "
            f"blocks of {rows}x{columns} (int4 in bytes?)"
        )
    return rows, WeightArgs(8, "int", "block", columns, symmetric=True, block=(rows, columns), format=None)


def _zero_point(parts: Parts, N: int) -> Tensor | None:
    """The zero points as `[N, G]` or `[1]`."""
    tensor = parts.get("weight_zero_point")
    if tensor is None or tensor.shape not in ((), (N,)):
        return tensor
    return view(tensor, tensor.dtype, (N, 1) if tensor.shape else (1,))
