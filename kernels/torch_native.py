"""What PyTorch runs by itself: `_weight_int4pack_mm*` for int4, `_scaled_mm` for FP8.

On an XPU where torch has one, else on CUDA, else on the CPU. On an XPU the int4 op is oneDNN's and takes the
stored words as they are; the CPU and CUDA kernels repack into a layout of their own first. The argument
conventions are those of PyTorch's `aten/src/ATen/native/` (LinearAlgebra.cpp, cuda/int4mm.cu, mkldnn/xpu/).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.activation_terms import fp8_terms
from xpuquant.kernels.base import Array, Layer
from xpuquant.kernels.integers import finished, integer_scheme, taken, unsigned_int4

if TYPE_CHECKING:
    import torch

_INT4_GROUPS = (32, 64, 128, 256)


@cache
def _device() -> str:
    import torch

    if torch.xpu.is_available():
        return "xpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


class TorchNative:
    """PyTorch's own kernels."""

    name = "torch_native"
    concurrent = False

    def unavailable(self) -> str | None:
        return None if find_spec("torch") else "torch is not installed: pip install 'xpuquant[torch]'"

    def refuses(self, scheme: Scheme, N: int, K: int, activation: str = "BF16") -> str | None:
        missing = self.unavailable()
        if missing is not None:
            return missing
        scheme, K = integer_scheme(scheme, K)
        if scheme.layout in ("int4_linear", "int4_experts"):
            return _refuses_int4(scheme, N, K, activation)
        if "fp8" in scheme.layout:
            return _refuses_fp8(scheme, N, K)
        return f"torch on {_device()} has no kernel for {scheme.layout}"

    def is_fast(self, scheme: Scheme, N: int, K: int) -> bool:
        return False  # its int4 kernel takes a minute

    def linear(self, layer: Layer, x: Array) -> Array:
        """`x · Wᵀ (+ bias)`, float32 `[M, N]`; the bias is added in float32.

        Raises:
            UnsupportedError: see `refuses`.
        """
        stored = layer
        layer, x = taken(self, layer, x)
        result = _int4(layer, x) if layer.scheme.layout.startswith("int4") else _fp8(layer, x)
        result = result + layer.tensors["bias"].astype(np.float32) if "bias" in layer.tensors else result
        return finished(stored, result)


@cache
def _scales_by_channel() -> bool:
    """Whether `_scaled_mm` takes a scale for each row and column here. Asked of it: torch 2.8 does not, on a CPU."""
    import torch

    codes = torch.zeros(16, 16, device=_device()).to(torch.float8_e4m3fn)
    scales = torch.ones(16, 1, device=_device())
    try:
        torch._scaled_mm(codes, codes.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def _refuses_int4(scheme: Scheme, N: int, K: int, activation: str) -> str | None:
    op, g = f"torch's int4 matmul on {_device()}", scheme.group_size
    if _device() == "xpu":
        return f"{op}: activations must be 16-bit" if activation == "F32" else None
    if g not in _INT4_GROUPS:
        return f"{op}: group size {g} is not one of 32, 64, 128, 256"
    if _device() == "cuda":
        if activation != "BF16":
            return f"{op}: activations must be BF16"
        return f"{op}: N={N} must be a multiple of 8, K={K} of 128" if N % 8 or K % 128 else None
    return f"{op}: N={N} must be a multiple of 16" if N % 16 else None


def _refuses_fp8(scheme: Scheme, N: int, K: int) -> str | None:
    op, size = f"torch._scaled_mm on {_device()}", scheme.group_size or K
    if not _scales_by_channel():
        return f"{op}: this release takes one scale for a whole matrix: pip install -U torch"
    if K % size:
        return f"{op}: K={K} must be a multiple of the scales' {size}"
    if _device() != "cpu" and (N % 16 or size % 16):
        return f"{op}: N={N} and {size} columns to a scale must be multiples of 16"
    return None


def _nibbles(words: Array) -> torch.Tensor:
    """uint8 `[..., 8·n]` on the CPU: the nibbles of int32 words `[..., n]`, lowest first."""
    import torch

    from xpuquant.kernels.torch_tensors import to_torch

    octets = to_torch(words).view(torch.uint8)
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def _int4(layer: Layer, x: Array) -> Array:
    import torch

    from xpuquant.kernels.torch_tensors import from_torch, to_torch

    device, g = _device(), layer.scheme.group_size
    words, group_scales = unsigned_int4(layer)
    codes, scales = _nibbles(words), to_torch(group_scales, device).to(torch.float64)
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device=device)
    if "qzeros" in layer.tensors:
        zeros = _nibbles(layer.tensors["qzeros"]).to(device)
    activations = to_torch(x, device)
    aten = torch.ops.aten
    if device == "xpu":
        scales, zeros = scales.to(activations.dtype), zeros.to(torch.int8)
        packed = to_torch(words, device)
        multiply = aten._weight_int4pack_mm_with_scales_and_zeros
        return from_torch(multiply(activations, packed, g, scales, zeros))
    # (q − 8)·scale + zero: this kernel's zero is a value, not a code.
    shifts = (8 - zeros.to(torch.float64)) * scales
    both = torch.stack([scales, shifts], dim=-1).to(activations.dtype).contiguous()
    if device == "cuda":
        packed = aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(device), 8)
        return from_torch(aten._weight_int4pack_mm(activations, packed, g, both))
    packed = aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return from_torch(aten._weight_int4pack_mm_for_cpu(activations, packed, g, both))


def _fp8(layer: Layer, x: Array) -> Array:
    """Block and MX scales one K-block at a time: within it they are per channel, which the kernel takes."""
    import torch

    from xpuquant.kernels.torch_tensors import from_torch, to_torch

    device = _device()
    weight = to_torch(layer.tensors["weight"], device)
    upright = not layer.scheme.experts or layer.scheme.layout == "fp8_channel_experts"
    weight = weight.t() if upright else weight  # [K, N] over the stored bytes
    scales = _fp8_scales(layer).to(device)
    size = layer.K // len(scales)
    result = np.zeros((len(x), layer.N), np.float32)
    out = torch.float32 if device == "cpu" else torch.bfloat16
    for block, scale in enumerate(scales):
        columns = slice(block * size, (block + 1) * size)
        part = weight[columns]
        if device == "cuda":  # its kernel wants K contiguous
            part = part.t().contiguous().t()
        for codes, token_scales in fp8_terms(x[:, columns]):
            a, a_scale = to_torch(codes, device), to_torch(token_scales, device)
            result += from_torch(torch._scaled_mm(a, part, a_scale, scale[None], out_dtype=out))
    return result


def _fp8_scales(layer: Layer) -> torch.Tensor:
    """float32 `[blocks of K, N]`."""
    import torch

    from xpuquant.kernels.torch_tensors import to_torch

    scheme, scale = layer.scheme, to_torch(layer.tensors["weight_scale"])
    if scheme.granularity == "block":
        return scale.repeat_interleave(scheme.block_n, dim=1)[:, : layer.N].contiguous()
    if scheme.layout == "fp8_channel_experts":
        return scale.reshape(layer.N, -1).t().float().contiguous()
    if scheme.granularity == "group":
        exponents = scale.t() if scheme.experts else scale
        return exponents.contiguous().view(torch.float8_e8m0fnu).to(torch.float32)
    return scale.reshape(1, -1).expand(1, layer.N).contiguous()
