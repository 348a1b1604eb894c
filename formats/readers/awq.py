"""Reader for AWQ in its `gemm` packing, as written by AutoAWQ, GPTQModel and AutoRound.

    P.qweight  int32 [K, N/8]   codes packed along N
    P.qzeros   int32 [G, N/8]   true zero points, packed alike; all 8 in symmetric files
    P.scales         [G, N]

`W[n, k] = scales[k // g, n] * (q[k, n] - z[k // g, n])`. Nibble i of word j is column 8j + [0,2,4,6,1,3,5,7][i]
(awq/utils/packing_utils.py, AWQ_ORDER). Always 4 bits, columns always in order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import Array, Checkpoint, Slice, columns, whole
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD
from xpuquant.formats.readers.base import Parts, float_scale, need
from xpuquant.formats.readers.config_keys import integer, overridden, symmetry
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import ArrayRecipe, Arrays, DecodedRecipe, FillRecipe, Recipe, RowsRecipe, Weight
from xpuquant.formats.weights.decoded import Decoded, each_row, in_order, subtract_zeros
from xpuquant.formats.weights.integers import SourceInts, column_groups, in_pairs, packs, source_group_size
from xpuquant.formats.weights.packed import FieldColumns, PackedColumns, Rows
from xpuquant.values import frozen

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of nibble i within its word."""

_ALL_EIGHT = 0x88888888
_OTHER_PACKINGS = ("gemv", "gemv_fast", "marlin")


@frozen(kw_only=True)
class AwqWeight(SourceInts):
    """An AWQ module. `qzeros` is None only where the config says symmetric."""

    qweight: Tensor
    scale: Tensor
    qzeros: Tensor | None

    def codes(self, start: int, stop: int) -> FillRecipe:
        def fill(arrays: Arrays, out: Array) -> None:
            from xpuquant.formats.packing.convert_loops import transpose_nibbles

            transpose_nibbles(arrays[0].view(np.uint32), out, ORDER)

        return Recipe((_word_columns(self.qweight, start, stop),), fill)

    def scales(self) -> ArrayRecipe:
        return Recipe((whole(self.scale),), lambda arrays: arrays[0])

    def zeros(self, start: int, stop: int) -> ArrayRecipe:
        assert self.qzeros is not None, "an asymmetric weight has qzeros"
        return Recipe((whole(self.qzeros),), lambda arrays: unpack_awq(arrays[0]).T[:, start:stop])

    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        inputs = [_word_columns(self.qweight, start, stop), columns(self.scale, start, stop)]
        if not self.symmetric:
            assert self.qzeros is not None, "an asymmetric weight has qzeros"
            inputs.append(_word_columns(self.qzeros, start, stop))

        def build(arrays: Arrays) -> Decoded:
            words, scale, *packed_zeros = arrays
            first = start % NIBBLES_PER_WORD
            inside = slice(first, first + stop - start)
            col = column_groups(self)
            zeros = None if self.symmetric else unpack_awq(packed_zeros[0])[inside]
            values = subtract_zeros(unpack_awq(words)[inside], zeros, self.bits, col)
            return Decoded("int", values, scale.T, np.arange(stop - start), col)

        return Recipe(tuple(inputs), build)

    def as_packed(self, start: int, stop: int) -> RowsRecipe:
        # Rows of whole words.
        if not packs(self) or start % NIBBLES_PER_WORD or stop % NIBBLES_PER_WORD:
            return super().as_packed(start, stop)
        return Recipe(self.decoded(start, stop).inputs, lambda arrays: self._field_columns(arrays).upright())

    def as_compared(self, start: int, stop: int) -> Recipe[Callable[[Arrays], Rows | PackedColumns]]:
        if not packs(self) or not in_pairs(self, start, stop, 2 * NIBBLES_PER_WORD):
            return super().as_compared(start, stop)
        return Recipe(self.decoded(start, stop).inputs, self._field_columns)

    def _field_columns(self, arrays: Arrays) -> FieldColumns:
        words, scale, *packed_zeros = arrays
        zeros = None if self.symmetric else unpack_awq(packed_zeros[0])
        rows, columns = each_row(scale.shape[1]), column_groups(self)
        return FieldColumns(words.view(np.uint32), zeros, scale.T, rows, columns, ORDER)


def unpack_awq(words: Array) -> Array:
    """uint8 `[8w, r]` from int32 words `[r, w]` in AWQ's order, nibble by nibble."""
    from xpuquant.formats.packing.verify_loops import unpack_fields

    upright = in_order(words.view(np.uint32).T)
    codes = np.empty((NIBBLES_PER_WORD * len(upright), len(words)), np.uint8)
    unpack_fields(upright, np.array(ORDER), codes)
    return codes


def _word_columns(tensor: Tensor, start: int, stop: int) -> Slice:
    """The words that hold columns `start:stop`."""
    return columns(tensor, start // NIBBLES_PER_WORD, -(-stop // NIBBLES_PER_WORD))


class Awq:
    name = "awq"
    methods = frozenset({"awq", "autoawq", "auto-awq", "llm-awq"})
    suffixes = frozenset({"qweight", "qzeros", "scales"})

    def claims(self, parts: Parts) -> bool:
        qweight, scales = parts.get("qweight"), parts.get("scales")
        if qweight is None or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
            return False
        # GPTQ's qweight is as wide as its scales. What is neither is some kernel's own order, refused below.
        return qweight.dtype == "I16" or qweight.shape[1] != scales.shape[1]

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        config = checkpoint.quantization
        merged = overridden(config, name)
        qweight, scales = parts["qweight"], parts["scales"]
        qzeros = parts.get("qzeros")
        _check_packing(checkpoint, qweight, scales)
        float_scale(scales)
        (K, width), (G, N) = qweight.shape, scales.shape
        group_size = source_group_size(integer(merged, ("group_size", "q_group_size"), -1), K, G)
        if group_size is None:
            raise DamagedError(f"{scales.name} has {G} groups, which no group size of K={K} gives")
        if qzeros is not None:
            need(parts, "qzeros", name, dtype="I32", dims=2)
            if qzeros.shape != (G, width):
                raise DamagedError(f"{qzeros.name} has shape {list(qzeros.shape)}, want {[G, width]}")
        symmetric, fact = _symmetric(checkpoint, name, qzeros, symmetry(merged))
        return [
            AwqWeight(
                name=name,
                format=self.name,
                N=N,
                K=K,
                tensors=tuple(part for part in (qweight, scales, qzeros) if part is not None),
                facts=("4-bit in AWQ's gemm order, from the shapes", fact),
                bits=4,
                group_size=group_size,
                symmetric=symmetric,
                scale_dtype=scales.dtype,
                qweight=qweight,
                scale=scales,
                qzeros=qzeros,
            )
        ]


def _check_packing(checkpoint: Checkpoint, qweight: Tensor, scales: Tensor) -> None:
    config = checkpoint.quantization
    version = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "").lower()
    if version in _OTHER_PACKINGS:
        raise UnsupportedError(f"AWQ version '{version}' is a packing of its own; only 'gemm' is read")
    if str(config.get("backend") or "").lower() == "llm-awq" or qweight.dtype == "I16":
        raise UnsupportedError("the tensors are in llm-awq's int16 packing (or gemv_fast); only AWQ 'gemm' is read")
    width, N = qweight.shape[1], scales.shape[1]
    if qweight.dtype == "I32" and N % NIBBLES_PER_WORD == 0 and width * NIBBLES_PER_WORD == N:
        return
    shapes = f"qweight {qweight.dtype} {list(qweight.shape)} with scales {list(scales.shape)}"
    if width * 4 == N:
        raise UnsupportedError(f"{shapes} is 8-bit AWQ, whose order no known writer defines")
    raise UnsupportedError(f"{shapes} is neither GPTQ's nor AWQ's packing (a kernel's own order?)")


def _symmetric(checkpoint: Checkpoint, name: str, qzeros: Tensor | None, says: bool | None) -> tuple[bool, str]:
    if qzeros is None:
        if says is not True:
            raise DamagedError(f"{name}.qzeros is missing, but the config does not say symmetric (zero_point: false)")
        return True, "symmetric: no qzeros, the config says so"
    words = checkpoint.peek(qzeros)
    if words is None:
        return says is True, "zero points as the config says"
    if (words.view(np.uint32) == _ALL_EIGHT).all():
        return True, "symmetric, from the words"
    return False, f"asymmetric, from the words{', although the config says symmetric' if says else ''}"
