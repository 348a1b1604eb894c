"""Reader for MXFP8 (OCP Microscaling Formats v1.0): compressed-tensors `mxfp8-quantized`, AutoRound, ModelOpt.

P.weight        F8_E4M3 (F8_E5M2) [N, K]
P.weight_scale  U8 or F8_E8M0 [N, ceil(K/32)]   one exponent per 32 columns: 2^(byte - 127), 255 is NaN
"""

from __future__ import annotations

from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers.base import Parts
from xpuquant.formats.readers.fp8 import SCALES, fp8_weight, is_mxfp8, scale_of
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.floats import E8M0, ELEMENTS, MX_GROUP, FloatWeight, view


class Mxfp8:
    name = "mxfp8"
    methods = frozenset({"mxfp8", "modelopt-mxfp8"})
    suffixes = frozenset(SCALES)

    def claims(self, parts: Parts) -> bool:
        return is_mxfp8(parts)

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        weight, scale = fp8_weight(parts, name), scale_of(parts, name)
        N, K = weight.shape
        return [
            FloatWeight(
                name=name,
                format=self.name,
                N=N,
                K=K,
                tensors=(weight, scale),
                facts=("MXFP8, from the dtypes and shapes",),
                element=ELEMENTS[weight.dtype],
                granularity="group",
                block=(1, MX_GROUP),
                codes=weight,
                scale=view(scale, E8M0, scale.shape),
            )
        ]
