"""The grouped GEMM of a released vllm-xpu-kernels wheel on the CPU, as a backend: experts only. Of ARK's layouts, the
kernel of auto-round-lib that prefill widens a stack with; the product of what it returns is numpy's.

Linears are left out: in the wheel they are calls of oneDNN, which makes machine code for a GPU when it is called.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.base import Array, Layer
from xpuquant.kernels.integers import finished, integer_scheme, taken
from xpuquant.kernels.shipped import ark, device, operators, wheel

_GROUPS = (32, 64, 128, 256)
# Rows to a call: the host takes its smallest tile for so many, and each tile is a kernel to build.
_ROWS = {"int4_experts": 4, "mxfp4_experts": 4}
_ROWS_OF_FP8 = 8
_BITS = {"uint4_experts": 4, "int8_experts": 8, "fp8_channel_experts": 8}
"""Layouts that ARK's kernels read, and the width of their codes."""


class Shipped:
    """The newest wheel that was downloaded."""

    name = "shipped"
    concurrent = False

    def unavailable(self) -> str | None:
        missing = device.unavailable()
        if missing is None and not wheel.found():
            return wheel.missing("vllm-xpu-kernels<0.1.17")
        return missing

    def refuses(self, scheme: Scheme, N: int, K: int, activation: str = "BF16") -> str | None:
        missing = self.unavailable()
        if missing is not None:
            return missing
        scheme, K = integer_scheme(scheme, K)
        if not scheme.experts:
            return (
                "the wheel's linears are oneDNN's, which makes GPU machine code: only its expert kernels run on a CPU"
            )
        if activation == "F32":
            return "the grouped GEMM takes 16-bit activations only"
        if scheme.layout in _BITS:
            if not wheel.found("auto_round_lib"):
                return wheel.missing("auto-round-lib<0.17")
            if N % 16 or (_BITS[scheme.layout] == 4 and scheme.group_size % 2):
                return f"ARK's expert kernels need N % 16 == 0, not N={N}"
            return None
        if scheme.granularity == "channel":
            return "the grouped GEMM has no channel scales"
        if N % 8 or (scheme.layout == "int4_experts" and scheme.group_size not in _GROUPS):
            return f"the grouped GEMM needs N % 8 == 0 and groups of 32 to 256, not N={N} and {scheme.group_size}"
        if scheme.layout != "fp8_experts" and K % scheme.group_size:
            return f"groups of {scheme.group_size} must divide K={K}"
        if scheme.granularity == "block" and (scheme.group_size != 128 or N % 128 or K % 128):
            return f"the grouped GEMM's fp8 blocks are 128 × 128, and must divide N={N} and K={K}"
        return None

    def is_fast(self, scheme: Scheme, N: int, K: int) -> bool:
        return False

    def linear(self, layer: Layer, x: Array) -> Array:
        """`x · Wᵀ (+ bias)`, float32 `[M, N]`.

        Raises:
            UnsupportedError: see `refuses`.
        """
        stored = layer
        layer, x = taken(self, layer, x)
        scheme, tensors = layer.scheme, layer.tensors
        if scheme.layout in _BITS:
            return finished(stored, x.astype(np.float32) @ _widened(layer, x.dtype))
        released = wheel.found()[-1]
        weight, scale, bias = tensors["weight"][None], tensors["weight_scale"], tensors.get("bias")
        if scheme.layout == "int4_experts":
            scale = scale.astype(x.dtype)  # as the loaders of the serving modules cast them
        scale = scale.reshape(-1) if scheme.granularity == "tensor" else scale[None]
        bias = None if bias is None else bias.astype(x.dtype)[None]
        step = _ROWS.get(scheme.layout, _ROWS_OF_FP8)
        parts = [x[at : at + step] for at in range(0, len(x), step)]
        run = [
            operators.grouped_gemm(released, scheme, part, weight, scale, np.array([len(part)]), bias) for part in parts
        ]
        return np.concatenate(run).astype(np.float32)


def _widened(layer: Layer, dtype: np.dtype[Any]) -> Array:
    """What prefill multiplies activations of this dtype with: float32 `[K, N]`."""
    tensors, released = layer.tensors, wheel.found("auto_round_lib")[-1]
    weight, zeros = tensors["weight"], tensors.get("weight_zero_point")
    stack = ark.widen(
        released,
        weight.view(np.uint8)[None] if weight.dtype.kind in "iu" else weight[None],
        tensors["weight_scale"].astype(dtype).reshape(1, layer.N, -1),
        None if zeros is None else zeros.astype(dtype)[None],
        _BITS[layer.scheme.layout],
    )
    wide: Array = stack[0].astype(np.float32)
    return wide
