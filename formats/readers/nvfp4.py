"""Reader for NVFP4: groups of 16 columns with fp8 scales, and one float32 scale over all.

P.weight_packed        U8 [N, K/2]         as MXFP4's
P.weight_scale         F8_E4M3 [N, K/16]
P.weight_global_scale  F32 [1]             compressed-tensors, AutoRound: a divisor
P.weight_scale_2       F32 [] or [1]       ModelOpt, which calls the codes `weight`: a multiplier
P.input_global_scale, P.input_scale        of W4A4: static scales of the activations, which stay in 16 bits on an XPU
"""

from __future__ import annotations

import math

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.readers.base import Parts, check_static, need
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.floats import view
from xpuquant.formats.weights.nvfp4 import GROUP, Nvfp4Weight

_TILE = (128, 4)
"""Rows and groups of a tile of scales as engines lay them out at load (vllm swizzle_blockscale: padded to whole tiles,
their axes interleaved). Where nothing is padded, shapes do not show it; no known producer publishes such files."""

_ACTIVATION_SUFFIXES = ("input_global_scale", "input_scale")
_ACTIVATIONS_STAY = "activations stay in 16 bits, where the checkpoint quantizes them: their static scales are dropped"


class Nvfp4:
    name = "nvfp4"
    methods = frozenset({"modelopt", "modelopt-fp4", "modelopt-mixed", "nvfp4"})
    suffixes = frozenset(
        {
            "weight_packed",
            "weight_scale",
            "weight_global_scale",
            "weight_scale_2",
            *_ACTIVATION_SUFFIXES,
        }
    )

    def claims(self, parts: Parts) -> bool:
        codes, scale = parts.get("weight_packed") or parts.get("weight"), parts.get("weight_scale")
        if codes is None or codes.dtype != "U8":
            return False
        if scale is not None and scale.dtype in FLOATS:
            return False  # ModelOpt's int4
        numbered = "weight_global_scale" in parts or "weight_scale_2" in parts
        # A file that lost the number over all is known by the scales of its groups (vllm-project/vllm#54444).
        return numbered or (scale is not None and scale.dtype == "F8_E4M3" and _are_of_groups(scale, codes))

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        stored = need(parts, "weight_packed" if "weight_packed" in parts else "weight", name, dims=2)
        scale = need(parts, "weight_scale", name, dtype="F8_E4M3")
        divides = "weight_global_scale" in parts or (stored.name.endswith("_packed") and "weight_scale_2" not in parts)
        overall = need(parts, "weight_global_scale" if divides else "weight_scale_2", name, dtype="F32")
        if math.prod(overall.shape) != 1:
            raise UnsupportedError(f"{overall.name} has shape {list(overall.shape)}; kernels take one number over all")
        of_activations = [parts[suffix] for suffix in _ACTIVATION_SUFFIXES if suffix in parts]
        for tensor in of_activations:
            check_static(tensor)
        N, K = stored.shape[0], 2 * stored.shape[1]
        if _is_swizzled(scale, stored):
            raise UnsupportedError(
                f"{scale.name} has shape {list(scale.shape)}: scales swizzled for Blackwell (tiles of 128x4) have no "
                "XPU kernel; take the file that an engine made them from"
            )
        if not _are_of_groups(scale, stored):
            raise DamagedError(f"{scale.name} has shape {list(scale.shape)}; NVFP4 of {[N, K]} needs {[N, K // GROUP]}")
        return [
            Nvfp4Weight(
                name=name,
                format=self.name,
                N=N,
                K=K,
                tensors=tuple(parts[suffix] for suffix in parts if suffix in self.suffixes or suffix == "weight"),
                facts=("NVFP4, from the dtypes and shapes", *[_ACTIVATIONS_STAY] * bool(of_activations)),
                element="e2m1",
                granularity="group",
                block=(1, GROUP),
                codes=view(stored, "U8", stored.shape),
                scale=scale,
                global_scale=view(overall, overall.dtype, (1,)),
                divides=divides,
            )
        ]


def _is_swizzled(scale: Tensor, codes: Tensor) -> bool:
    """Whether scales are those of whole tiles, more or in other axes than the groups of the weight."""
    if len(codes.shape) != 2 or _are_of_groups(scale, codes):
        return False
    (N, half), (rows, groups) = codes.shape, _TILE
    padded = -(-N // rows) * rows * (-(-2 * half // GROUP // groups) * groups)
    return math.prod(scale.shape) == padded


def _are_of_groups(scale: Tensor, codes: Tensor) -> bool:
    return len(codes.shape) == 2 and scale.shape == (codes.shape[0], -(-2 * codes.shape[1] // GROUP))
