"""Every call into vllm-xpu-kernels: the one module that names its operators and `XpuFusedMoe`.

What serves (the vLLM plugin, the modules for Transformers) and what verifies (`kernels/vllm_xpu.py`) call the
functions below, so that a verified call is the call that serves. All of them take the stored bytes as they are.

Sources: vLLM 0.32 `model_executor/kernels/linear/*/xpu.py` for how each operator is called, vllm-xpu-kernels 0.1.16
`csrc/xpu/` for what it checks, and its `fused_moe_interface.py` for the experts. Torch is imported inside functions
only: `kernels` lists its backends without it.

Notation: activations x `[M, K]`, weight `[N, K]`, g = group size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xpuquant.errors import EnvironmentFault
from xpuquant.formats.scheme import Scheme

if TYPE_CHECKING:
    import torch

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


def operators() -> Any:
    """The operators' namespace `torch.ops._xpu_C`, loaded. vLLM has loaded it; Transformers does not.

    Raises:
        EnvironmentFault: vllm-xpu-kernels is missing, too old, or built for another torch.
    """
    import torch

    if not hasattr(torch.ops._xpu_C, "int4_gemm_w4a16"):
        check_kernels()
        try:
            import vllm_xpu_kernels._xpu_C  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault(f"vllm-xpu-kernels does not load with torch {torch.__version__}: {error}") from None
    return torch.ops._xpu_C


def linear(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x · Wᵀ (+ bias)` as it is served, `[M, N]` in the dtype of x.

    Args:
        scheme: how the linear is stored.
        tensors: suffix → stored tensor; int4 scales in the dtype of x.
        x: bfloat16 or float16; where the scheme is act-order, with its columns permuted already. MX layouts
            quantize it to MX blocks of the weight's element type, as stock vLLM does.
        bias: `[N]` in the dtype of x.
    """
    if scheme.layout == "int4_linear":
        return _int4_linear(tensors, x, bias)
    if scheme.layout == "mxfp4_linear":
        from vllm.model_executor.layers.quantization.utils.mxfp4_utils import xpu_mxfp4_quantize

        x4, x_scale = xpu_mxfp4_quantize(x)
        return mx_linear(scheme, tensors, x4, x_scale, x.dtype, bias)
    if scheme.layout == "mxfp8_linear":
        from vllm.model_executor.layers.quantization.utils.mxfp8_utils import xpu_mxfp8_quantize

        x8, x_scale = xpu_mxfp8_quantize(x, tensors["weight"].dtype)
        return mx_linear(scheme, tensors, x8, x_scale, x.dtype, bias)
    return _fp8_linear(scheme, tensors, x, bias)


def _int4_linear(tensors: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    qweight, scales = tensors["qweight"], tensors["scales"]
    # One int8 zero point means the same for all; int32 words [K/g, N/8] are true zero points.
    zeros = tensors.get("qzeros")
    if zeros is None:
        zeros = eight(x.device)
    group = x.shape[1] // scales.shape[0]  # a real number, never the -1 of a configuration
    return operators().int4_gemm_w4a16(x, qweight.t(), bias, scales, zeros, group, None)  # type: ignore[no-any-return]


def _fp8_linear(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    # The operator reads one row of N scales as one per channel, several rows as blocks.
    if scheme.granularity == "block" and scale.shape[0] == 1:
        scale = scale.repeat_interleave(weight.shape[0] // scale.shape[1], dim=1)
    elif scheme.granularity == "channel":
        scale = scale.reshape(1, -1)
    return operators().fp8_gemm_w8a16(x, weight.t(), scale, bias)  # type: ignore[no-any-return]


def mx_linear(
    scheme: Scheme,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    x_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`x · Wᵀ (+ bias)` of an MX layout, `[M, N]`.

    Args:
        scheme: `mxfp4_linear` or `mxfp8_linear`.
        tensors: suffix → stored tensor.
        x: activations in MX blocks: FP8 `[M, K]` of the weight's type, or `float4_e2m1fn_x2` `[M, K/2]`.
        x_scale: their `float8_e8m0fnu` scales `[M, K/32]`.
        dtype: of the result and of bias.
    """
    import torch

    weight, scale = tensors["weight"], tensors["weight_scale"].view(torch.float8_e8m0fnu)
    if scheme.layout == "mxfp4_linear":
        packed = weight.view(torch.float4_e2m1fn_x2).t()
        return operators().fp4_gemm(x, packed, x_scale, scale, dtype, bias)  # type: ignore[no-any-return]
    return operators().fp8_gemm(x, weight.t(), dtype, x_scale, scale, bias)  # type: ignore[no-any-return]


_EIGHTS: dict[torch.device, torch.Tensor] = {}


def eight(device: torch.device) -> torch.Tensor:
    """The zero point of every symmetric layer, one int8 per device."""
    import torch

    if device not in _EIGHTS:
        _EIGHTS[device] = torch.tensor([8], dtype=torch.int8, device=device)
    return _EIGHTS[device]


def expert_linear(
    scheme: Scheme, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """`x · Wᵀ (+ bias)` of one expert, `[M, N]`: the grouped GEMM that `XpuFusedMoe` calls for both projections.

    Args:
        scheme: how the stack is stored.
        weight: the expert's slice of the stack, `[N, K/2]` (four bits) or `[K, N]`.
        scale: its slice of the scales; of int4 in the dtype of x.
        bias: `[N]` in the dtype of x.
        x: bfloat16 or float16.
    """
    import torch

    weight, scale = _kernel_view(scheme, weight[None]), scale[None]
    if scheme.granularity == "tensor":
        scale = scale.reshape(1)
    N = weight.shape[1] if scheme.layout in ("int4_experts", "mxfp4_experts") else weight.shape[2]
    rows = torch.tensor([len(x)], dtype=torch.int32, device=x.device)
    out = torch.empty((len(x), N), dtype=x.dtype, device=x.device)
    stacked = None if bias is None else bias[None]
    operators().cutlass_grouped_gemm_interface(x, None, weight, scale, stacked, out, rows, N, x.shape[1], 1)
    return out


def _kernel_view(scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
    """A stack's bytes under the dtype by which the C++ side tells what they are: int8 means int4."""
    import torch

    four_bit = {"int4_experts": torch.int8, "mxfp4_experts": torch.float4_e2m1fn_x2}
    return weight.view(four_bit[scheme.layout]) if scheme.layout in four_bit else weight


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

    Args:
        tensors: the names of `layers.expert_tensors`.
        top_k: experts per token.
        activation: vLLM's name of the gated activation.
        limit: where gate and up are clamped; None: nowhere.
        ep_rank, ep_size: of expert parallelism.
        expert_map: expert of the model → expert of this rank, -1 where another rank has it.

    Its constructor takes uint8 for "int4, still unsigned" and converts every expert at the first forward;
    its C++ side takes int8 for "int4". The stored nibbles are signed already: the attribute says that the
    conversion was done, and the int8 views are handed over after construction.
    """
    from vllm_xpu_kernels.fused_moe_interface import XpuFusedMoe

    w13, w2 = tensors["gate_up_proj"].data, tensors["down_proj"].data
    if scheme.layout == "int4_experts":
        w13.xpu_fused_moe = True  # type: ignore[attr-defined]
    else:
        w13, w2 = _kernel_view(scheme, w13), _kernel_view(scheme, w2)
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
        moe.w13, moe.w2 = _kernel_view(scheme, w13), _kernel_view(scheme, w2)
    return moe
