"""Layout `ct_int4`: compressed-tensors `pack-quantized` with 4 bits.

    P.weight_packed      I32 [N, K/8]         offset-binary codes, nibble j of word i is column 8i+j
    P.weight_scale           [N, G], channel-wise [N, 1]
    P.weight_zero_point  I32 [ceil(N/8), G]   asymmetric only: nibbles along N, the true zero point
    P.weight_shape       I64 [2]              N, K

(compressed_tensors/compressors/pack_quantized). Codes and zero points are both stored plus 8, so a value is the
unsigned `(nibble - zero nibble) * scale`, the same as in the XPU layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xpuquant.formats.checkpoint import rows
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Array, Conversion, Linear, Matrix, Module, OutTensor, Piece, Stored
from xpuquant.formats.layouts.compressed_tensors.config import CtScheme
from xpuquant.formats.layouts.compressed_tensors.modules import (
    CtLinear,
    bias_tensors,
    groups_of,
    has_zero_points,
    refusal,
)
from xpuquant.formats.layouts.compressed_tensors.stored import CtLayout, weight_of
from xpuquant.formats.layouts.xpu.int4_linear import K_MULTIPLE, Scales, word_pieces
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, pack_nibbles
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import IntWeight
from xpuquant.formats.weights.groups import GROUP_MULTIPLE, Regrouping


@dataclass(frozen=True)
class Zeros:
    """Fills `[ceil(N/8), G]` words of zero points, packed along N. A symmetric weight has 8 everywhere."""

    weight: IntWeight
    groups: Regrouping

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        words = out.view(np.uint32).reshape(-(-self.weight.N // NIBBLES_PER_WORD), -1)
        if not has_zero_points(self.weight):
            words[...] = 0x88888888
            return
        zeros = self.groups.rows(self.weight.zeros(arrays, 0, self.weight.N))
        missing = -zeros.shape[1] % NIBBLES_PER_WORD
        padded = np.pad(zeros, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(zeros)
        words[...] = pack_nibbles(padded).T


@dataclass(frozen=True)
class Shape:
    """Fills `weight_shape`."""

    N: int
    K: int

    def __call__(self, arrays: Sequence[Array], out: Array) -> None:
        out.view(np.int64)[...] = self.N, self.K


class CtInt4(CtLayout):
    name = "ct_int4"

    def takes(self, module: Module) -> bool:
        return isinstance(module, Linear) and isinstance(module.weight, IntWeight)

    def refuses(self, module: Module) -> str | None:
        weight = _weight(module)
        if (reason := refusal(module)) is not None:
            return reason
        if weight.bits > 4:
            return f"{weight.bits}-bit integers are not converted"
        if weight.act_order:
            return (
                "act-order, which compressed-tensors 0.19 and vLLM 0.32 no longer load (actorder group); "
                "--layout xpu takes it"
            )
        if weight.K % K_MULTIPLE:
            return f"K={weight.K} is not a multiple of {K_MULTIPLE}"
        if _groups(module) is None:
            return f"groups of {weight.group_size} in K={weight.K} share no multiple of 32 columns"
        return None

    def convert(self, module: Module, scale_dtype: str | None) -> Conversion:
        weight = _weight(module)
        groups = _groups(module)
        assert groups is not None, "convert follows refuses"
        N, K, G = weight.N, weight.K, weight.K // groups.size
        dtype = scale_dtype or weight.scale_dtype
        words = word_pieces(weight)
        scale_bytes = G * N * numpy_dtype(dtype).itemsize
        scales = Piece(weight.scale_inputs(), scale_bytes, Scales(weight, groups, dtype, transposed=True))
        tensors = [
            OutTensor(f"{module.name}.weight_packed", "I32", (N, K // NIBBLES_PER_WORD), words),
            OutTensor(f"{module.name}.weight_scale", dtype, (N, G), (scales,)),
            OutTensor(f"{module.name}.weight_shape", "I64", (2,), (Piece((), 16, Shape(N, K)),)),
        ]
        zero_points = has_zero_points(weight) or (isinstance(module, CtLinear) and module.zero_points)
        if zero_points:
            height = -(-N // NIBBLES_PER_WORD)
            inputs = weight.zero_inputs() if has_zero_points(weight) else ()
            zeros = Piece(inputs, 4 * height * G, Zeros(weight, groups))
            tensors.append(OutTensor(f"{module.name}.weight_zero_point", "I32", (height, G), (zeros,)))
        scheme = CtScheme(
            layout=self.name,
            granularity="channel" if G == 1 else "group",
            group_size=0 if G == 1 else groups.size,
            scale_dtype=dtype,
            symmetric=not zero_points,
        )
        return Conversion(module.name, scheme, (*tensors, *bias_tensors(module)), weight.facts)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return (
            "weight_packed",
            "weight_scale",
            "weight_shape",
            *["weight_zero_point"] * (not scheme.symmetric),
        )

    def kernel_scheme(self, stored: Stored) -> Scheme | None:
        weight, scheme = weight_of(stored), stored.scheme
        size = scheme.group_size or weight.K
        if size % GROUP_MULTIPLE or (not scheme.symmetric and weight.N % NIBBLES_PER_WORD):
            return None
        return Scheme("int4_linear", group_size=size, scale_dtype=scheme.scale_dtype, symmetric=scheme.symmetric)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        """As vLLM's XPU kernel class takes a loaded checkpoint: scales and zero points transposed."""
        scale = stored.load(rows(stored.tensors["weight_scale"], start, stop))
        arrays = {
            "qweight": stored.load(rows(stored.tensors["weight_packed"], start, stop)),
            "scales": np.ascontiguousarray(scale.T),
        }
        if not stored.scheme.symmetric:
            part = rows(stored.tensors["weight_zero_point"], start // NIBBLES_PER_WORD, -(-stop // NIBBLES_PER_WORD))
            arrays["qzeros"] = np.ascontiguousarray(stored.load(part).T)
        return arrays


def _weight(module: Module) -> IntWeight:
    assert isinstance(module, Linear) and isinstance(module.weight, IntWeight)
    return module.weight


def _groups(module: Module) -> Regrouping | None:
    return groups_of(_weight(module), module.group_size if isinstance(module, CtLinear) else 0)
