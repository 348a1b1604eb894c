"""The calls into vllm-xpu-kernels (`torch.ops._xpu_C`, `XpuFusedMoe`), on the stored bytes as they are.

Sources: vLLM 0.32 `model_executor/kernels/linear/*/xpu.py` for how each op is called, vllm-xpu-kernels
0.1.16 `fused_moe_interface.py` for the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xpuquant.errors import EnvironmentFault
from xpuquant.formats.scheme import Scheme

# Before 0.1.15 the grouped GEMM read an uninitialised counter.
OLDEST_KERNELS = (0, 1, 15)


def check_kernels() -> None:
    """Raise EnvironmentFault, in one line, where vllm-xpu-kernels is missing or too old."""
    from importlib.metadata import PackageNotFoundError, version

    wanted = ".".join(map(str, OLDEST_KERNELS))
    try:
        found = version("vllm-xpu-kernels")
    except PackageNotFoundError:
        raise EnvironmentFault(f"vllm-xpu-kernels is not installed: pip install 'vllm-xpu-kernels>={wanted}'") from None
    if tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdecimal()) < OLDEST_KERNELS:
        raise EnvironmentFault(
            f"vllm-xpu-kernels {found} is too old for xpuquant: pip install 'vllm-xpu-kernels>={wanted}'"
        )


def linear(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x [M, K] · Wᵀ (+ bias)`; act-order activations come already permuted."""
    ops = torch.ops._xpu_C
    if scheme.layout == "int4_linear":
        # A one-element int8 zero point means one value for all; g must be a real number, never -1.
        zeros = tensors.get("qzeros")
        if zeros is None:
            zeros = eight(x.device)
        qweight, scales = tensors["qweight"], tensors["scales"]
        group = x.shape[1] // scales.shape[0]
        return ops.int4_gemm_w4a16(x, qweight.t(), bias, scales, zeros, group, None)  # type: ignore[no-any-return]
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if scheme.layout == "mxfp4_linear":
        from vllm.model_executor.layers.quantization.utils.mxfp4_utils import xpu_mxfp4_quantize

        x4, x_scale = xpu_mxfp4_quantize(x)
        weight4 = weight.view(torch.float4_e2m1fn_x2).t()
        return ops.fp4_gemm(x4, weight4, x_scale, scale.view(torch.float8_e8m0fnu), x.dtype, bias)  # type: ignore[no-any-return]
    if scheme.layout == "mxfp8_linear":
        from vllm.model_executor.layers.quantization.utils.mxfp8_utils import xpu_mxfp8_quantize

        x8, x_scale = xpu_mxfp8_quantize(x, weight.dtype)  # the op wants both of one type
        scale8 = scale.view(torch.float8_e8m0fnu)
        return ops.fp8_gemm(x8, weight.t(), x.dtype, x_scale, scale8, bias)  # type: ignore[no-any-return]
    if scheme.granularity == "block" and scale.shape[0] == 1:
        scale = scale.repeat_interleave(weight.shape[0] // scale.shape[1], dim=1)
    elif scheme.granularity == "channel":
        # The op reads one row as a scale per channel, more rows as blocks.
        scale = scale.reshape(1, -1)
    return ops.fp8_gemm_w8a16(x, weight.t(), scale, bias)  # type: ignore[no-any-return]


_EIGHTS: dict[torch.device, torch.Tensor] = {}


def eight(device: torch.device) -> torch.Tensor:
    """The zero point of every symmetric layer, one int8 per device."""
    if device not in _EIGHTS:
        _EIGHTS[device] = torch.tensor([8], dtype=torch.int8, device=device)
    return _EIGHTS[device]


def fused_moe(
    scheme: Scheme,
    tensors: Mapping[str, torch.Tensor],
    top_k: int,
    activation: str,
    limit: float | None = None,
    ep_rank: int = 0,
    ep_size: int = 1,
    expert_map: torch.Tensor | None = None,
) -> Any:
    """An `XpuFusedMoe` over the stored tensors, with nothing converted or copied.

    Its constructor takes uint8 for "int4, still unsigned" and converts every expert at the first forward;
    its C++ side takes int8 for "int4". The stored nibbles are signed already: the attribute says that the
    conversion was done, and the int8 views are handed over after construction.
    """
    from vllm_xpu_kernels.fused_moe_interface import XpuFusedMoe

    w13, w2 = tensors["gate_up_proj"].data, tensors["down_proj"].data
    if scheme.layout == "mxfp4_experts":
        w13, w2 = w13.view(torch.float4_e2m1fn_x2), w2.view(torch.float4_e2m1fn_x2)
    if scheme.layout == "int4_experts":
        w13.xpu_fused_moe = True  # type: ignore[attr-defined]
    moe = XpuFusedMoe(
        w13=w13,
        w13_scales=tensors["gate_up_proj_scale"].data,
        w13_bias=tensors.get("gate_up_proj_bias"),
        w2=w2,
        w2_scales=tensors["down_proj_scale"].data,
        w2_bias=tensors.get("down_proj_bias"),
        n_experts_per_token=top_k,
        activation=activation,
        num_experts=w13.shape[0],
        ep_rank=ep_rank,
        ep_size=ep_size,
        expert_map=expert_map,
        gemm1_clamp_limit=limit,
    )
    if scheme.layout == "int4_experts":
        moe.w13, moe.w2 = w13.view(torch.int8), w2.view(torch.int8)
    return moe
