"""The kernels vLLM runs on an Intel GPU: `torch.ops._xpu_C` of vllm-xpu-kernels.

Linears are oneDNN matmuls; experts go through the CUTLASS grouped GEMM that `XpuFusedMoe` calls for each of
its two projections (`vllm_xpu_kernels/fused_moe_interface.py`), here with one expert. Every call is made by
`OPS`, whose argument names are checked against the schemas of the released wheel by a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from xpuquant.errors import UnsupportedError
from xpuquant.formats.dtypes import label_of
from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.activations import fp8_terms, mx_terms
from xpuquant.kernels.base import Array, Layer

if TYPE_CHECKING:
    import torch

# Operator → its arguments, in the order of its schema.
OPS = {
    "int4_gemm_w4a16": ("A", "B", "bias", "B_scale", "B_zp", "group_size", "g_idx"),
    "fp8_gemm_w8a16": ("A", "B", "B_scale_", "bias_"),
    "fp8_gemm": ("A", "B", "out_dtype", "A_scale_", "B_scale_", "bias_"),
    "fp4_gemm": ("A", "B", "A_scale", "B_scale", "out_dtype", "bias_"),
    "cutlass_grouped_gemm_interface": (
        "ptr_A",
        "ptr_A_scale",
        "ptr_B",
        "ptr_B_scale",
        "ptr_bias",
        "ptr_D",
        "rows_per_expert",
        "N",
        "K",
        "num_experts",
    ),
}

# Before it the grouped GEMM started from an uninitialised counter.
_OLDEST = (0, 1, 15)
_EXPERT_GROUPS = (32, 64, 128, 256)


@cache
def _missing() -> str | None:
    if find_spec("vllm_xpu_kernels") is None or find_spec("torch") is None:
        return "needs an Intel GPU and vllm-xpu-kernels, which is not installed: pip install vllm-xpu-kernels"
    version = metadata.version("vllm-xpu-kernels")
    if tuple(int(part) for part in version.split(".")[:3]) < _OLDEST:
        return f"vllm-xpu-kernels {version} is older than 0.1.15: pip install -U vllm-xpu-kernels"
    import torch

    if not torch.xpu.is_available():
        return f"torch {torch.__version__} sees no Intel GPU: run where one and an XPU build of torch are"
    try:
        import vllm_xpu_kernels._xpu_C  # noqa: F401
    except ImportError as error:
        return f"vllm-xpu-kernels {version} does not load with torch {torch.__version__}: {error}"
    return None


class VllmXpu:
    """vllm-xpu-kernels on the current XPU."""

    name = "vllm_xpu"
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
        import torch

        from xpuquant.kernels.torch_arrays import widened

        reason = self.refuses(layer.scheme, layer.N, layer.K, label_of(x.dtype))
        if reason is not None:
            raise UnsupportedError(reason)
        calls = _expert(layer, x, self._device) if layer.scheme.experts else _linear(layer, x, self._device)
        result = np.zeros((len(x), layer.N), np.float32)
        for name, arguments in calls:
            operator = getattr(torch.ops._xpu_C, name)
            try:
                out = operator(*(arguments[argument] for argument in OPS[name]))
            except RuntimeError as error:
                raise UnsupportedError(f"{name}: {str(error).splitlines()[0]}") from None
            result += widened(arguments.get("ptr_D", out))
        return result


def _unfit(scheme: Scheme, N: int, K: int, activation: str) -> str | None:
    """Why no operator takes this layer, by the checks in vllm-xpu-kernels and vLLM's XPU kernel classes."""
    layout, g = scheme.layout, scheme.group_size
    if activation == "F32":
        return "the XPU operators take 16-bit activations only"
    if scheme.experts and (N % 8 or (layout == "int4_experts" and g not in _EXPERT_GROUPS)):
        return f"the grouped GEMM needs N % 8 == 0 and groups of 32 to 256, not N={N} and {g}"
    if layout == "fp8_experts" and scheme.granularity == "channel":
        return "the grouped GEMM has no channel scales"
    if layout == "mxfp8_experts" and N == K // 32:
        return "the grouped GEMM cannot tell [N, K/32] scales from [K/32, N] where N == K/32"
    if layout == "int4_linear" and (K % 32 or g % 32 or (N % 8 and not scheme.symmetric)):
        return f"int4_gemm_w4a16 needs K={K} and groups of {g} in multiples of 32, and N={N} of 8 where asymmetric"
    if layout == "mxfp8_linear" and K == 32:
        return "fp8_gemm takes a single column of scales for per-token scales: K must exceed 32"
    if scheme.granularity == "block" and (N % scheme.block_n or K % g):
        return f"blocks of {scheme.block_n} × {g} must divide N={N} and K={K}"
    return None


def _linear(layer: Layer, x: Array, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The operator calls whose results add up to the layer's."""
    import torch

    from xpuquant.kernels.torch_arrays import tensor

    scheme, stored = layer.scheme, {role: tensor(array, device) for role, array in layer.tensors.items()}
    a = tensor(x, device)
    bias = stored["bias"].to(a.dtype) if "bias" in stored else None
    if scheme.layout == "int4_linear":
        symmetric = torch.full((1,), 8, dtype=torch.int8, device=device)
        yield (
            "int4_gemm_w4a16",
            {
                "A": a,
                "B": stored["qweight"].t(),
                "bias": bias,
                "B_scale": stored["scales"].to(a.dtype),
                "B_zp": stored.get("qzeros", symmetric),
                "group_size": scheme.group_size,
                "g_idx": stored.get("g_idx"),
            },
        )
        return
    weight, scale = stored["weight"], stored["weight_scale"]
    if scheme.layout == "fp8_linear" and (scheme.granularity != "block" or len(scale) == 1):
        if scheme.granularity == "block":  # fp8_gemm takes one column of blocks for per-token scales
            scale = scale.repeat_interleave(scheme.block_n, dim=1)[0]
        yield "fp8_gemm_w8a16", {"A": a, "B": weight.t(), "B_scale_": scale, "bias_": bias}
        return
    if scheme.layout == "fp8_linear":
        for codes, multipliers in fp8_terms(x, scheme.group_size, scheme.weight_dtype):
            yield (
                "fp8_gemm",
                {
                    "A": tensor(codes, device),
                    "B": weight.t(),
                    "out_dtype": a.dtype,
                    "A_scale_": tensor(multipliers, device),
                    "B_scale_": scale,
                    "bias_": bias,
                },
            )
            bias = None  # once, with the first term
        return
    four_bit = scheme.layout == "mxfp4_linear"
    scale = scale.view(torch.float8_e8m0fnu)
    # A and B of one type, says fp8_gemm.
    for codes, exponents in mx_terms(x, "F4" if four_bit else scheme.weight_dtype):
        term, term_scale = tensor(codes, device), tensor(exponents, device).view(torch.float8_e8m0fnu)
        if four_bit:
            packed = torch.float4_e2m1fn_x2
            yield (
                "fp4_gemm",
                {
                    "A": term.view(packed),
                    "B": weight.view(packed).t(),
                    "A_scale": term_scale,
                    "B_scale": scale,
                    "out_dtype": a.dtype,
                    "bias_": bias,
                },
            )
        else:
            yield (
                "fp8_gemm",
                {
                    "A": term,
                    "B": weight.t(),
                    "out_dtype": a.dtype,
                    "A_scale_": term_scale,
                    "B_scale_": scale,
                    "bias_": bias,
                },
            )
        bias = None


def _expert(layer: Layer, x: Array, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The grouped GEMM over a stack of one expert."""
    import torch

    from xpuquant.kernels.torch_arrays import tensor

    layout, a = layer.scheme.layout, tensor(x, device)
    stored: dict[str, torch.Tensor] = {r: tensor(array, device)[None] for r, array in layer.tensors.items()}
    weight, scale = stored["weight"], stored["weight_scale"]
    if layout == "int4_experts":  # the operator tells int4 by the dtype, and reads scales as A's dtype
        weight, scale = weight.view(torch.int8), scale.to(a.dtype)
    elif layout == "mxfp4_experts":
        weight = weight.view(torch.float4_e2m1fn_x2)
    elif layer.scheme.granularity == "tensor":
        scale = scale.reshape(1)
    yield (
        "cutlass_grouped_gemm_interface",
        {
            "ptr_A": a,
            "ptr_A_scale": None,
            "ptr_B": weight,
            "ptr_B_scale": scale,
            "ptr_bias": stored["bias"].to(a.dtype) if "bias" in stored else None,
            "ptr_D": torch.empty((len(x), layer.N), dtype=a.dtype, device=device),
            "rows_per_expert": torch.tensor([len(x)], dtype=torch.int32, device=device),
            "N": layer.N,
            "K": layer.K,
            "num_experts": 1,
        },
    )
