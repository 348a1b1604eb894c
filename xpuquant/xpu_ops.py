"""Every call into vllm-xpu-kernels but those around ARK's, which `ark_ops.py` has. No other module names an operator.

What serves (the vLLM plugin, the modules for Transformers) and what verifies (`kernels/vllm_xpu.py`) call the
functions below, so that a verified call is the call that serves. All of them take the stored bytes as they are.

Sources: vLLM 0.32 and 0.33 `model_executor/kernels/linear/*/xpu.py` and `_xpu_ops.py` for how each operator is called,
vllm-xpu-kernels `csrc/xpu/` for what it checks, the `fused_moe_interface.py` of each wheel for the experts, and
`xpu_releases.py` for what differs between releases. Torch is imported inside functions
only: `kernels` lists its backends without it.

Notation: activations x `[M, K]`, weight `[N, K]`, g = group size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xpuquant import ark_ops
from xpuquant.ark_ops import ArkMoe, with_global_scale
from xpuquant.ark_releases import refusal_of_switches
from xpuquant.errors import EnvironmentFault, UnsupportedError
from xpuquant.formats.scheme import ARK_LAYOUTS, Scheme
from xpuquant.xpu_releases import PACKAGE, Release, check_release, refusal_of_experts, release_of, served

if TYPE_CHECKING:
    import torch


def installed() -> Release:
    """The installed vllm-xpu-kernels.

    Raises:
        EnvironmentFault: in one line, where it is missing or not one that is served with.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        found = None
    check_release(found)
    assert found is not None, "refused above"
    # Of a build from a checkout nothing is on record: it is taken for the newest release.
    return served()[-1] if ".dev" in found else release_of(found)


def operators(library: str = "_xpu_C") -> Any:
    """The namespace `torch.ops._xpu_C` or `torch.ops._C`, loaded. vLLM has loaded both; Transformers does not.

    Raises:
        EnvironmentFault: vllm-xpu-kernels is missing, too old, or built for another torch.
    """
    import torch

    namespace = getattr(torch.ops, library)
    if not hasattr(namespace, _ALWAYS_IN[library]):
        installed()
        try:
            import_module(f"vllm_xpu_kernels.{library}")
        except ImportError as error:
            raise EnvironmentFault(f"vllm-xpu-kernels does not load with torch {torch.__version__}: {error}") from None
    return namespace


_ALWAYS_IN = {"_xpu_C": "int4_gemm_w4a16", "_C": "per_token_group_quant_mxfp4"}


def linear(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x · Wᵀ (+ bias)` as it is served, `[M, N]` in the dtype of x.

    Args:
        scheme: how the linear is stored.
        tensors: suffix → stored tensor; int4 scales in the dtype of x.
        x: bfloat16 or float16; where the scheme is act-order, with its columns permuted already.
        bias: `[N]` in the dtype of x.
    """
    if scheme.layout == "nvfp4_linear":
        product = _int4_linear(tensors, _twice(x, x.shape[1] // tensors["scales"].shape[0]), None)
        return with_global_scale(scheme, product, tensors["global_scale"], bias)
    if scheme.layout == "int8_linear":
        x = _twice(x, 2 * x.shape[1] // tensors["scales"].shape[0])
    if scheme.layout in ("int4_linear", "int8_linear"):
        return _int4_linear(tensors, x, bias)
    if rounds_activations(scheme, tensors):
        return rounded_linear(scheme, tensors, *_round_activations(scheme, tensors, x), x.dtype, bias)
    return _fp8_linear(tensors, x, bias)


def _twice(x: torch.Tensor, g: int) -> torch.Tensor:
    """`[M, 2K]`: each g columns twice, for the two planes of nibbles that a group of the weight has."""
    return x.reshape(x.shape[0], -1, 1, g).expand(-1, -1, 2, -1).reshape(x.shape[0], 2 * x.shape[1])


def _int4_linear(tensors: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    qweight, scales = tensors["qweight"], tensors["scales"]
    # One int8 zero point means the same for all; int32 words [K/g, N/8] are true zero points.
    zeros = tensors.get("qzeros")
    if zeros is None:
        zeros = eight(x.device)
    group = x.shape[1] // scales.shape[0]  # a real number, never the -1 of a configuration
    return operators().int4_gemm_w4a16(x, qweight.t(), bias, scales, zeros, group, None)  # type: ignore[no-any-return]


def _fp8_linear(tensors: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Scales per tensor or channel, or one row of blocks or groups, which is a scale per channel once it is spread."""
    import torch

    weight, scale = tensors["weight"], tensors["weight_scale"]
    if scale.dtype == torch.uint8:  # exponents: powers of two, exact in float32
        scale = scale.view(torch.float8_e8m0fnu).to(torch.float32)
    if scale.numel() > 1:
        scale = scale.reshape(1, -1)
        scale = scale.repeat_interleave(weight.shape[0] // scale.shape[1], dim=1)
    return operators().fp8_gemm_w8a16(x, weight.t(), scale, bias)  # type: ignore[no-any-return]


def rounds_activations(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a linear's operator takes quantized activations only: MX layouts, and FP8 in blocks.

    Where one row of blocks or of MXFP8 groups covers all of K, `fp8_gemm` would read a single column of activation
    scales as one per token and the weight's as one per channel. It is one per channel: `fp8_gemm_w8a16` has that.

    `fp8_gemm_w8a16` takes blocks too, but square ones only before 0.1.16.1 (others silently wrong), and stock vLLM
    never calls it with any. `fp8_gemm` takes the blocks that the checkpoint has, in every release; it is what stock
    vLLM calls, with activations quantized per token and group of K, as checkpoints with blocks want them.
    """
    if scheme.layout == "mxfp4_linear":
        return True  # `fp4_gemm` groups by 32 however many groups there are
    return (scheme.layout == "mxfp8_linear" or scheme.granularity == "block") and tensors["weight_scale"].shape[0] > 1


def _round_activations(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of x for `rounded_linear`, by the wheel's own quantizers, called as stock vLLM calls them."""
    import torch

    x = x.contiguous()
    M, K = x.shape
    least = 1e-10
    group = K // tensors["weight_scale"].shape[0]
    scale = torch.empty((M, K // group), dtype=torch.float32, device=x.device)
    if scheme.layout == "mxfp4_linear":
        codes = torch.empty((M, K // 2), dtype=torch.uint8, device=x.device)
        operators("_C").per_token_group_quant_mxfp4(x, codes, scale, group, least)
        return codes.view(torch.float4_e2m1fn_x2), scale.to(torch.float8_e8m0fnu)
    powers = scheme.layout == "mxfp8_linear"
    codes = torch.empty((M, K), dtype=tensors["weight"].dtype, device=x.device)
    largest = torch.finfo(codes.dtype).max
    quantize = operators("_C").per_token_group_fp8_quant
    quantize(x, codes, scale, group, least, -largest, largest, powers, False, False)
    return codes, scale.to(torch.float8_e8m0fnu) if powers else scale


def rounded_linear(
    scheme: Scheme,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    x_scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`x · Wᵀ (+ bias)` with activations that are quantized already, `[M, N]`.

    Args:
        scheme: one that `rounds_activations`.
        tensors: suffix → stored tensor.
        x: FP8 `[M, K]` of the weight's type, or `float4_e2m1fn_x2` `[M, K/2]`.
        x_scale: its scales `[M, K/g]`, g as the weight's: `float8_e8m0fnu` in MX layouts, else float32.
        dtype: of the result and of bias.
    """
    import torch

    weight, scale = tensors["weight"], tensors["weight_scale"]
    if scheme.layout == "mxfp4_linear":
        packed, scale = weight.view(torch.float4_e2m1fn_x2).t(), scale.view(torch.float8_e8m0fnu)
        return operators().fp4_gemm(x, packed, x_scale, scale, dtype, bias)  # type: ignore[no-any-return]
    if scheme.layout == "mxfp8_linear":
        scale = scale.view(torch.float8_e8m0fnu)
    return operators().fp8_gemm(x, weight.t(), dtype, x_scale, scale, bias)  # type: ignore[no-any-return]


_EIGHTS: dict[torch.device, torch.Tensor] = {}


def eight(device: torch.device) -> torch.Tensor:
    """The zero point of every symmetric layer, one int8 per device."""
    import torch

    if device not in _EIGHTS:
        _EIGHTS[device] = torch.tensor([8], dtype=torch.int8, device=device)
    return _EIGHTS[device]


def expert_linear(
    scheme: Scheme,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    zeros: torch.Tensor | None = None,
    number: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x · Wᵀ (+ bias)` of one expert, `[M, N]`: the grouped GEMM that `XpuFusedMoe` calls for both projections, or
    ARK's.

    Args:
        scheme: how the stack is stored.
        weight: the expert's slice of the stack, `[N, K/2]` (four bits), `[N, K]` (ARK's) or `[K, N]`.
        scale: its slice of the scales; of integers in the dtype of x.
        bias: `[N]` in the dtype of x.
        x: bfloat16 or float16.
        zeros: its slice of the zero points, in the dtype of x.
        number: its matrix's global scale, float32 (NVFP4).
    """
    import torch

    rows = torch.tensor([len(x)], dtype=torch.int32, device=x.device)
    if scheme.layout in ARK_LAYOUTS:
        product = ark_ops.ark_gemm(scheme, weight[None], scale[None], None if zeros is None else zeros[None], x, rows)
        return product if number is None else with_global_scale(scheme, product, number)
    weight, scale = _kernel_view(scheme, weight[None]), scale[None]
    if scheme.granularity == "tensor":
        scale = scale.reshape(1)
    N = weight.shape[1] if scheme.layout in ("int4_experts", "mxfp4_experts") else weight.shape[2]
    out = torch.empty((len(x), N), dtype=x.dtype, device=x.device)
    stacked = None if bias is None else bias[None]
    operators().cutlass_grouped_gemm_interface(x, None, weight, scale, stacked, out, rows, N, x.shape[1], 1)
    return out


def _kernel_view(scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
    """A stack's bytes under the dtype by which the C++ side tells what they are: int8 means int4."""
    import torch

    four_bit = {"int4_experts": torch.int8, "mxfp4_experts": torch.float4_e2m1fn_x2}
    return weight.view(four_bit[scheme.layout]) if scheme.layout in four_bit else weight


def check_experts(
    scheme: Scheme, top_k: int | None, activation: str, limit: float | None = None, ep_size: int = 1
) -> Release:
    """The installed release, where this GPU and that release compute the experts; for what is meant see `fused_moe`.

    `top_k` None: not known yet.

    Raises:
        EnvironmentFault: another GPU, or no fitting vllm-xpu-kernels.
        UnsupportedError: in one line, what would fail at the first forward.
    """
    release = installed()
    if not (operators().is_xe2_arch() or operators().is_xe3_arch()):
        raise EnvironmentFault(
            "experts are computed on Intel GPUs of the generations Xe2 and Xe3 only (Arc B-series): "
            "the kernels for others are given no scales"
        )
    reason = refusal_of_experts(release, scheme, top_k, activation, limit, os.environ)
    if scheme.layout in ARK_LAYOUTS:
        ark_ops.ark()
        reason = reason or refusal_of_switches(ep_size, os.environ)
    if reason is not None:
        raise UnsupportedError(reason)
    return release


def cast_when_loaded(scheme: Scheme, name: str) -> bool:
    """Whether the kernel of a stack reads its tensor `name` as the activations' dtype, whatever it is stored in: what
    the grouped GEMM does to biases and int4 scales, and ARK to scales and zero points."""
    if name.endswith("global_scale"):
        return False  # not the kernel's
    if name.endswith(("_bias", "_zero_point")):
        return True
    return name.endswith("_scale") and scheme.layout in ("int4_experts", *ARK_LAYOUTS)


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
    """An `XpuFusedMoe`, or for ARK's layouts an `ArkMoe`, over the stored tensors, with nothing converted or copied.

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

    Raises:
        EnvironmentFault, UnsupportedError: see `check_experts`; or the installed release takes int4 otherwise.
    """
    import torch

    release = check_experts(scheme, top_k, activation, limit, ep_size)
    if scheme.layout in ARK_LAYOUTS:
        return ArkMoe(scheme, tensors, activation, limit, expert_map)
    from vllm_xpu_kernels.fused_moe_interface import XpuFusedMoe

    first, second = scheme.stacks
    w13, w2 = tensors[first].data, tensors[second].data
    if scheme.layout == "int4_experts":
        w13.xpu_fused_moe = True  # type: ignore[attr-defined]
    else:
        w13, w2 = _kernel_view(scheme, w13), _kernel_view(scheme, w2)
    moe = XpuFusedMoe(
        w13=w13,
        w13_scales=tensors[f"{first}_scale"].data,
        w13_bias=tensors.get(f"{first}_bias"),
        w2=w2,
        w2_scales=tensors[f"{second}_scale"].data,
        w2_bias=tensors.get(f"{second}_bias"),
        n_experts_per_token=top_k,
        activation=activation,
        num_experts=w13.shape[0],
        ep_rank=ep_rank,
        ep_size=ep_size,
        expert_map=expert_map,
        gemm1_clamp_limit=limit,
    )
    if scheme.layout == "int4_experts":
        if not (moe.is_int4 and moe.w13 is w13 and moe.w2 is w2 and w13.dtype == torch.uint8):
            raise EnvironmentFault(f"{PACKAGE} {release.version} takes int4 experts otherwise than this xpuquant knows")
        moe.w13, moe.w2 = _kernel_view(scheme, w13), _kernel_view(scheme, w2)
    return moe


def run_experts(moe: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The routed sum `[M, H]` in the dtype of x, by what `fused_moe` made.

    Args:
        x: `[M, H]`, contiguous.
        weights: routing weights, float32 `[M, k]`.
        ids: experts `[M, k]`; negative: none, which the kernel takes for expert 0.
    """
    import torch

    nobody = ids < 0
    # Rows of padding hold whatever was there before; 0.1.16 sets them to zero itself.
    x = x.masked_fill(nobody.all(dim=1, keepdim=True), 0)
    out = torch.empty_like(x)
    moe.apply(output=out, hidden_states=x, topk_weights=weights.masked_fill(nobody, 0), topk_ids=ids)
    return out
