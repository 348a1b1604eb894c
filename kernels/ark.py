"""ARK, the CPU and XPU kernels of auto-round (package `auto-round-lib`, module `auto_round_kernel`).

Its `QuantLinear` takes the stored integers (transposed words, true zero points) and repacks them into a
blob of its own, so the reading of the bits and the arithmetic, float32 on a CPU, are both ARK's
(`auto_round_kernel/qlinear.py`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from xpuquant.errors import EnvironmentFault
from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.base import Array, Layer, fault_of
from xpuquant.kernels.integers import finished, integer_scheme, taken, unsigned_int4


@cache
def _qlinear() -> Any:
    """ARK's module of layer classes.

    Raises:
        EnvironmentFault: not installed, or built for another Python or processor.
    """
    try:
        import auto_round_kernel
        from auto_round_kernel import qlinear
    except ImportError as error:
        raise EnvironmentFault(f"{error}: pip install 'xpuquant[ark]'") from None
    if getattr(auto_round_kernel, "cpu_lib", None) is None:
        raise EnvironmentFault("auto-round-lib's CPU library does not load on this machine")
    return qlinear


_BITS = {"int4_linear": 4, "int4_experts": 4, "uint4_experts": 4, "int8_experts": 8}
"""Layouts that it reads, and the width of their codes."""


class Ark:
    """auto-round's CPU kernels for linears, as another reader of the stored integers. Its XPU kernels for experts are
    called by `ark_ops`, and executed by `kernels/shipped/ark.py`."""

    name = "ark"
    concurrent = False

    def unavailable(self) -> str | None:
        return fault_of(_qlinear)

    def refuses(self, scheme: Scheme, N: int, K: int, activation: str = "BF16") -> str | None:
        missing = self.unavailable()
        if missing is not None:
            return missing
        scheme, K = integer_scheme(scheme, K)
        if scheme.layout in _BITS:
            return None
        # Its QuantLinearFP8 accepts FP8 and MXFP8 on a CPU, and leaves the output zero or unwritten.
        return f"ARK's CPU library computes integers only, not {scheme.layout}"

    def is_fast(self, scheme: Scheme, N: int, K: int) -> bool:
        return False

    def linear(self, layer: Layer, x: Array) -> Array:
        """`x · Wᵀ (+ bias)`, float32 `[M, N]`: ARK widens 16-bit activations to float32.

        Raises:
            UnsupportedError: see `refuses`.
        """
        import torch

        from xpuquant.kernels.torch_tensors import from_torch, to_torch

        stored = layer
        layer, x = taken(self, layer, x)
        module = _integers(layer)
        if "bias" in layer.tensors:
            module.bias = to_torch(layer.tensors["bias"].astype(np.float32))
        module.post_init()
        with torch.inference_mode():
            return finished(stored, from_torch(module(to_torch(x.astype(np.float32)))))


def _integers(layer: Layer) -> Any:
    import torch

    from xpuquant.kernels.torch_tensors import to_torch

    tensors, scheme = layer.tensors, layer.scheme
    bits = _BITS[scheme.layout]
    size = (bits, scheme.group_size, scheme.symmetric, layer.K, layer.N, False)
    module = _qlinear().QuantLinear(*size, weight_dtype=torch.float32)
    if bits == 8:
        codes = tensors["weight"].view(np.uint8) ^ np.uint8(0x80 if scheme.symmetric else 0)
        words, scales = np.ascontiguousarray(codes).view(np.int32), tensors["weight_scale"].T
    else:
        words, scales = unsigned_int4(layer)
    module.qweight = to_torch(words.T)
    module.scales = to_torch(scales.astype(np.float32))
    if not scheme.symmetric:
        module.qzeros = to_torch(_zero_words(layer, bits))
    return module


def _zero_words(layer: Layer, bits: int) -> Array:
    """int32 `[K/g, N * bits / 32]`: true zero points, packed along N."""
    if not layer.scheme.experts:
        return layer.tensors["qzeros"]
    zeros = np.ascontiguousarray(layer.tensors["weight_zero_point"].T)
    if bits == 4:
        zeros = np.ascontiguousarray(zeros[:, 0::2] | zeros[:, 1::2] << np.uint8(4))
    return zeros.view(np.int32)
