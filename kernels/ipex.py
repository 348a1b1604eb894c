"""Intel Extension for PyTorch: `IPEXWeightOnlyQuantizedLinear.from_weight`, on the CPU or an XPU.

It takes GPTQ tensors: qweight `[K/8, N]`, scales `[K/g, N]`, qzeros `[K/g, N/8]` with each zero point minus
one (it adds the one back and lets 16 wrap to 0, so a true zero point of 0 survives as a stored 15). Its last
release, 2.8, needs torch 2.8: it lives in an environment of its own (scripts/lanes/ipex).
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np

from xpuquant.errors import EnvironmentFault
from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.base import Array, Layer, fault_of
from xpuquant.kernels.integers import finished, integer_scheme, taken, unsigned_int4


@cache
def _quantization() -> Any:
    """IPEX's module of quantized layers.

    Raises:
        EnvironmentFault: not installed, or not for this torch.
    """
    own = "it is for torch 2.8, in an environment of its own: pip install 'xpuquant[ipex]'"
    try:
        release = metadata.version("intel-extension-for-pytorch")
        torch_release = metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise EnvironmentFault(f"{error.name} is not installed: {own}") from None
    if release.split(".")[:2] != torch_release.split(".")[:2]:  # its import would end the process
        raise EnvironmentFault(f"intel-extension-for-pytorch {release} is not for torch {torch_release}: {own}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from intel_extension_for_pytorch.llm import quantization
    except (ImportError, OSError) as error:
        raise EnvironmentFault(f"{str(error).splitlines()[0]}: {own}") from None
    return quantization


def _device() -> str:
    import torch

    return "xpu" if torch.xpu.is_available() else "cpu"


class Ipex:
    """IPEX's weight-only int4 linear."""

    name = "ipex"
    concurrent = False

    def unavailable(self) -> str | None:
        return fault_of(_quantization)

    def refuses(self, scheme: Scheme, N: int, K: int, activation: str = "BF16") -> str | None:
        missing = self.unavailable()
        if missing is not None:
            return missing
        scheme, K = integer_scheme(scheme, K)
        if scheme.layout not in ("int4_linear", "int4_experts"):
            return f"IPEX has no weight-only kernel for {scheme.layout}"
        if activation != "BF16":
            return f"IPEX's int4 linear computes in BF16 whatever it is given: {activation} would say no more"
        if N % 32:  # it accepts others and mixes up their rows
            return f"IPEX's int4 linear is right only where N is a multiple of 32, not {N}"
        return None

    def is_fast(self, scheme: Scheme, N: int, K: int) -> bool:
        return True

    def linear(self, layer: Layer, x: Array) -> Array:
        """`x · Wᵀ (+ bias)`, float32 `[M, N]`.

        Raises:
            UnsupportedError: see `refuses`.
        """
        import torch

        from xpuquant.kernels.torch_tensors import from_torch, to_torch

        stored = layer
        layer, x = taken(self, layer, x)
        scheme, tensors = layer.scheme, layer.tensors
        words, scales = unsigned_int4(layer)
        zeros, g = _minus_one(layer), scheme.group_size
        if g == layer.K:  # it drops a dimension of one: halve the group, exactly
            scales, zeros, g = scales.repeat(2, axis=0), zeros.repeat(2, axis=0), g // 2
        device, quantization = _device(), _quantization()
        bias = to_torch(tensors["bias"].astype(x.dtype), device) if "bias" in tensors else None
        module = quantization.IPEXWeightOnlyQuantizedLinear.from_weight(
            to_torch(words.T, device),
            to_torch(scales, device),
            to_torch(zeros, device),
            layer.K,
            layer.N,
            None,
            bias,
            g,
            None,
            quantization.QuantMethod.GPTQ_GEMM,
            quantization.QuantDtype.INT4,
        )
        with torch.inference_mode():
            return finished(stored, from_torch(module(to_torch(x, device))))


def _minus_one(layer: Layer) -> Array:
    """int32 `[K/g, N/8]`: each nibble one less, 0 becoming 15; no borrow from the next."""
    if layer.scheme.symmetric:
        return np.full((layer.K // layer.scheme.group_size, layer.N // 8), 0x77777777, np.int32)
    octets = np.ascontiguousarray(layer.tensors["qzeros"]).view(np.uint8)
    low, high = (octets - 1) & 15, ((octets >> 4) - 1) & 15
    stored: Array = (low | high << 4).astype(np.uint8).view(np.int32)
    return stored
