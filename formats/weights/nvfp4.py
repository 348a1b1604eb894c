"""NVFP4 in normal form: E2M1 codes, an e4m3 scale to 16 columns of a row, and one float32 number over all of a matrix.

    W[n, k] = e2m1(code[n, k]) * scale[n, k // 16] * factor          ModelOpt
    W[n, k] = e2m1(code[n, k]) * scale[n, k // 16] / divisor         compressed-tensors, AutoRound

The reciprocal of a float32 is seldom one, so which of the two a matrix has is kept to the end.

No kernel for XPU reads the codes; twice their value is an integer of -12 to 12, which kernels for integers read.
"""

from __future__ import annotations

import numpy as np

from xpuquant.formats.checkpoint import whole
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Arrays, DecodedRecipe, Recipe, RowsRecipe
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.floats import FloatWeight
from xpuquant.values import frozen

GROUP = 16
"""Columns that share an e4m3 scale."""


@frozen(kw_only=True)
class Nvfp4Weight(FloatWeight):
    """MXFP4's codes under two levels of scales.

    global_scale  F32, one number
    divides       it is a divisor
    """

    global_scale: Tensor
    divides: bool

    @property
    def is_mx(self) -> bool:
        return False

    @property
    def kind(self) -> str:
        return "nvfp4"

    def decoded(self, start: int, stop: int) -> DecodedRecipe:
        recipe = super().decoded(start, stop)

        def build(arrays: Arrays) -> Decoded:
            *below, overall = arrays
            decoded = recipe.build(below)
            number = overall.astype(np.float64).reshape(())
            scale = decoded.scale.astype(np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = scale / number if self.divides else scale * number
            return Decoded("e2m1", decoded.codes, scale, decoded.row, decoded.col)

        return Recipe((*recipe.inputs, whole(self.global_scale)), build)

    def as_packed(self, start: int, stop: int) -> RowsRecipe:
        """As the layouts hold them, one integer to a byte. An integer has no minus zero: it equals zero here."""
        recipe = self.decoded(start, stop)

        def build(arrays: Arrays) -> Decoded:
            decoded = recipe.build(arrays)
            twice = (2 * decoded.elements()).astype(np.int8)
            return Decoded("2e2m1", twice, decoded.scale / 2, decoded.row, decoded.col)

        return Recipe(recipe.inputs, build)
