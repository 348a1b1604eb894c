"""The kernels vLLM runs on an Intel GPU: the operators of vllm-xpu-kernels and ARK, called as serving calls them.

Linears are oneDNN matmuls; experts go through the CUTLASS grouped GEMM that `XpuFusedMoe` calls for each of its two
projections, or through ARK's, here with one expert. The calls are those of `xpuquant.xpu_ops` and
`xpuquant.ark_ops`, which serve with them. Where a linear's operator takes quantized activations only, this backend adds
up several terms (`kernels/activation_terms.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from xpuquant import ark_ops, xpu_ops
from xpuquant.errors import EnvironmentFault, UnsupportedError
from xpuquant.formats.dtypes import label_of
from xpuquant.formats.scheme import ARK_LAYOUTS, Scheme
from xpuquant.kernels.activation_terms import fp8_terms, mx_terms
from xpuquant.kernels.base import Array, Layer, fault_of
from xpuquant.kernels.integers import integer_scheme

if TYPE_CHECKING:
    import torch

_EXPERT_GROUPS = (32, 64, 128, 256)


@cache
def _missing() -> str | None:
    try:
        xpu_ops.installed()
        if find_spec("torch") is None:
            raise EnvironmentFault("torch is not installed: pip install an XPU build of torch")
        import torch

        if not torch.xpu.is_available():
            raise EnvironmentFault(f"torch {torch.__version__} sees none: run where one and an XPU build of torch are")
        xpu_ops.operators()
    except EnvironmentFault as error:
        return f"needs an Intel GPU and vllm-xpu-kernels: {error}"
    return None


class VllmXpu:
    """vllm-xpu-kernels on the current XPU."""

    name = "vllm_xpu"
    concurrent = False
    _device = "xpu"

    def unavailable(self) -> str | None:
        return _missing()

    def refuses(self, scheme: Scheme, N: int, K: int, activation: str = "BF16") -> str | None:
        missing = self.unavailable()
        return missing if missing is not None else _unfit(scheme, N, K, activation)

    def is_fast(self, scheme: Scheme, N: int, K: int) -> bool:
        return True

    def linear(self, layer: Layer, x: Array) -> Array:
        """`x · Wᵀ (+ bias)`, float32 `[M, N]`.

        Raises:
            UnsupportedError: see `refuses`; or the operator's own message.
        """
        from xpuquant.kernels.torch_tensors import from_torch

        reason = self.refuses(layer.scheme, layer.N, layer.K, label_of(x.dtype))
        if reason is not None:
            raise UnsupportedError(reason)
        result = np.zeros((len(x), layer.N), np.float32)
        try:
            for term in _products(layer, x, self._device):
                result += from_torch(term)
        except RuntimeError as error:  # of the operators' own checks
            raise UnsupportedError(f"vllm-xpu-kernels: {str(error).splitlines()[0]}") from None
        return result


def _unfit(scheme: Scheme, N: int, K: int, activation: str) -> str | None:
    """Why no operator takes this layer, by the checks in vllm-xpu-kernels and vLLM's XPU kernel classes."""
    scheme, K = integer_scheme(scheme, K)
    layout, g = scheme.layout, scheme.group_size
    if activation == "F32":
        return "the XPU operators take 16-bit activations only"
    if layout in ARK_LAYOUTS:
        if (missing := fault_of(ark_ops.ark)) is not None:
            return missing
        return f"ARK's expert kernels need N % 16 == 0, not N={N}" if N % 16 else None
    if scheme.experts and (N % 8 or (layout == "int4_experts" and g not in _EXPERT_GROUPS)):
        return f"the grouped GEMM needs N % 8 == 0 and groups of 32 to 256, not N={N} and {g}"
    if layout == "fp8_experts" and scheme.granularity == "channel":
        return "the grouped GEMM has no channel scales"
    if layout == "mxfp8_experts" and N == K // 32:
        return "the grouped GEMM cannot tell [N, K/32] scales from [K/32, N] where N == K/32"
    if layout == "int4_linear" and (K % 32 or g % 32 or (N % 8 and not scheme.symmetric)):
        return f"int4_gemm_w4a16 needs K={K} and groups of {g} in multiples of 32, and N={N} of 8 where asymmetric"
    if scheme.granularity == "block" and (N % scheme.block_n or K % g):
        return f"blocks of {scheme.block_n} × {g} must divide N={N} and K={K}"
    return None


def _products(layer: Layer, x: Array, device: str) -> Iterator[torch.Tensor]:
    """What adds up to the layer's product: the result of one call, or of one per term of the activations."""
    import torch

    from xpuquant.kernels.torch_tensors import to_torch

    scheme, a = layer.scheme, to_torch(x, device)
    stored = {role: to_torch(array, device) for role, array in layer.tensors.items()}
    for role in stored:
        part = role.removeprefix("weight")  # of a stack's tensors: `_scale`, `_zero_point`
        if role in ("bias", "scales") or (scheme.experts and xpu_ops.cast_when_loaded(scheme, part)):
            stored[role] = stored[role].to(a.dtype)  # as the loaders of the serving modules cast them
    bias = stored.pop("bias", None)
    if scheme.experts:
        zeros = stored.get("weight_zero_point")
        number = stored.get("global_scale")
        yield xpu_ops.expert_linear(scheme, stored["weight"], stored["weight_scale"], bias, a, zeros, number)
    elif xpu_ops.rounds_activations(scheme, stored):
        for codes, scales in _terms(scheme, x):
            term, term_scale = to_torch(codes, device), to_torch(scales, device)
            if scheme.layout == "mxfp4_linear":
                term = term.view(torch.float4_e2m1fn_x2)
            if scheme.layout != "fp8_linear":
                term_scale = term_scale.view(torch.float8_e8m0fnu)
            yield xpu_ops.rounded_linear(scheme, stored, term, term_scale, a.dtype, bias)
            bias = None  # once, with the first term
    else:
        if scheme.act_order:
            a = a.index_select(-1, stored["g_idx"])
        yield xpu_ops.linear(scheme, stored, a, bias)


def _terms(scheme: Scheme, x: Array) -> Iterator[tuple[Array, Array]]:
    """Codes and scales that add up to x, in the groups of the weight."""
    if scheme.layout == "fp8_linear":
        return fp8_terms(x, scheme.group_size, scheme.weight_dtype)
    return mx_terms(x, "F4" if scheme.layout == "mxfp4_linear" else scheme.weight_dtype)
