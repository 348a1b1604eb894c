"""Layout `nvfp4_linear`: NVFP4 linears as two planes of nibbles, which oneDNN's int4 matmul multiplies exactly.

    P.qweight       int32    [N, 2K/8]   unsigned nibbles; of each group of 16 columns those of one plane, then those of
                                         the other
    P.scales        bfloat16 [K/16, N]   each for the 32 nibbles of a group
    P.global_scale  float32  [1]         multiplies the product; where the scheme says `divides` it is its divisor

Twice an E2M1 number is an integer of -12 to 12, and so the sum of two signed nibbles: itself and 0, or its half twice.
`int4_gemm_w4a16` (see `int4_linear.py`) computes (nibble - 8) * scale with 2K columns in groups of 32, where each group
of 16 of the activations comes twice. The global scale is applied to what it returns, before a bias is added.

Scales are half of the source's, times a power of two that the global scale has given them (`nvfp4_fillers.py`): e4m3
has 4 significant bits and bfloat16 8, so nothing is rounded. Cast to float16 they are exact from 2^-21 on.

The other kernel for such integers is ARK's for experts (int8 in groups of 16), called with one expert: as many bytes,
half the columns, but it needs another library, and nothing that a CPU can run multiplies by it. The grouped GEMM and
`int4_gemm_w4a16` take no groups of 16; `fp4_gemm` takes exponents for scales, which these are not.
"""

from __future__ import annotations

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.architecture import is_embedding
from xpuquant.formats.checkpoint import Array, columns, rows, whole
from xpuquant.formats.layouts.base import NO_EMBEDDINGS, Conversion, Layout, Matrix, OutTensor, Refusal, Stored
from xpuquant.formats.layouts.modules import Linear, Module
from xpuquant.formats.layouts.nvfp4_fillers import FillGlobalScales, FillHalvedScales, FillSums, row_pieces
from xpuquant.formats.layouts.scales import kept
from xpuquant.formats.packing.plain import NIBBLES_PER_WORD, unpack_nibbles
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded, even_groups
from xpuquant.formats.weights.nvfp4 import GROUP, Nvfp4Weight

_WORDS = 2 * GROUP // NIBBLES_PER_WORD
"""Words to a group of columns."""


class Nvfp4Linear(Layout):
    name = "nvfp4_linear"
    family = "xpu"
    kernel = "int4_gemm_w4a16, two planes"

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, Linear) or not isinstance(module.weight, Nvfp4Weight):
            return None
        name, weight = module.name, module.weight
        N, K = weight.N, weight.K
        if is_embedding(name):
            return NO_EMBEDDINGS
        if K % GROUP:
            return Refusal(f"NVFP4 needs K to be a multiple of {GROUP}, K={K}")
        tensors = (
            OutTensor(f"{name}.qweight", "I32", (N, K // GROUP * _WORDS), row_pieces(FillSums, weight)),
            OutTensor(f"{name}.scales", "BF16", (K // GROUP, N), (FillHalvedScales(weight).piece(),)),
            OutTensor(f"{name}.global_scale", "F32", (1,), (FillGlobalScales((weight,)).piece(),)),
        )
        scheme = Scheme(layout=self.name, group_size=GROUP, scale_dtype="BF16", divides=weight.divides)
        return Conversion(name, scheme, tensors, (*weight.facts, *kept("BF16", scale_dtype)))

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return ("qweight", "scales", "global_scale")

    def matrices(self, stored: Stored) -> list[Matrix]:
        qweight = stored.tensors["qweight"]
        if qweight.dtype != "I32" or len(qweight.shape) != 2 or qweight.shape[1] % _WORDS:
            raise DamagedError(f"{qweight.name} is {qweight.dtype} {list(qweight.shape)}, want I32 [N, 2K/8]")
        N, K = qweight.shape[0], qweight.shape[1] // _WORDS * GROUP
        check_scheme(stored)
        stored.check("scales", "BF16", (K // GROUP, N))
        stored.check("global_scale", "F32", (1,))
        return [Matrix("linear", N, K)]

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        words = stored.load(rows(stored.tensors["qweight"], start, stop))
        planes = unpack_nibbles(words.view(np.uint8)).reshape(stop - start, -1, 2, GROUP)
        sums = (planes[:, :, 0] + planes[:, :, 1]).view(np.int8) - np.int8(16)
        scale = stored.load(columns(stored.tensors["scales"], start, stop)).T
        return doubled(sums.reshape(stop - start, -1), scale, stored.array("global_scale"), stored.scheme)

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        return {
            "qweight": stored.load(rows(stored.tensors["qweight"], start, stop)),
            "scales": stored.load(columns(stored.tensors["scales"], start, stop)),
            "global_scale": stored.load(whole(stored.tensors["global_scale"])),
        }


def check_scheme(stored: Stored) -> None:
    """Raises DamagedError where the config gives NVFP4 other groups or scales than it has."""
    scheme = stored.scheme
    if (scheme.granularity, scheme.group_size, scheme.scale_dtype) != ("group", GROUP, "BF16"):
        raise DamagedError(f"config.json stores {stored.name} as {scheme.label()}, {scheme.scale_dtype}: no NVFP4")


def doubled(codes: Array, scale: Array, number: Array, scheme: Scheme) -> Decoded:
    """Rows of stored integers under their scales and the one global scale of their matrix.

    Args:
        codes: int8 `[n, K]`, twice the numbers.
        scale: `[n, K/16]`.
        number: float32, one.
    """
    wide, overall = scale.astype(np.float64), number.astype(np.float64).reshape(())
    with np.errstate(divide="ignore", invalid="ignore"):
        wide = wide / overall if scheme.divides else wide * overall
    return Decoded("2e2m1", codes, wide, np.arange(len(codes)), even_groups(codes.shape[1], GROUP))
