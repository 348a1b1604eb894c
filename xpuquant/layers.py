"""The XPU layouts as torch tensors: what a module holds, what it means, and how it is computed.

Shared by the vLLM plugin and the Transformers quantizer. On an Intel GPU a layer runs in the kernels of
vllm-xpu-kernels, on the stored bytes as they are. Elsewhere its weight is decoded (never kept) and
multiplied: slow, and good enough to try a converted repo on any machine.

Notation: weight `[N, K]` = [out, in], g = group size, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

try:
    import torch
except ModuleNotFoundError:
    raise ModuleNotFoundError("torch is not installed: pip install 'xpuquant[torch]'", name="torch") from None
import torch.nn.functional as F

from xpuquant.formats.scheme import Scheme

# E2M1 by code, OCP Microscaling Formats (MX) v1.0, section 5.3.3. This table and `_nibbles` are not shared with
# kernels/reference.py and formats/weights/decoded.py, so that a mistake in one is found by the others.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class Stored(NamedTuple):
    """One tensor of a module as it lies in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def scale_dtype(scheme: Scheme) -> torch.dtype:
    """The dtype of the stored scales (uint8 carries E8M0 exponents)."""
    return _FLOATS.get(scheme.scale_dtype, torch.uint8)


def linear_tensors(scheme: Scheme, N: int, K: int) -> dict[str, Stored]:
    """Suffix → tensor of one quantized linear (the bias, which stays as it was, is not listed)."""
    scale = scale_dtype(scheme)
    if scheme.layout in ("int4_linear", "int8_linear"):
        planes = 2 if scheme.layout == "int8_linear" else 1
        groups = planes * (K // scheme.group_size)
        tensors = {"qweight": Stored((N, planes * K // 8), torch.int32), "scales": Stored((groups, N), scale)}
        if planes == 2 or not scheme.symmetric:
            tensors["qzeros"] = Stored((groups, N // 8), torch.int32)
        if scheme.act_order:
            tensors["g_idx"] = Stored((K,), torch.int32)
        return tensors
    if scheme.layout == "nvfp4_linear":
        return {
            "qweight": Stored((N, 2 * K // 8), torch.int32),
            "scales": Stored((K // scheme.group_size, N), scale),
            "global_scale": Stored((1,), torch.float32),
        }
    if scheme.layout == "mxfp4_linear":
        return {
            "weight": Stored((N, K // 2), torch.uint8),
            "weight_scale": Stored((K // scheme.group_size, N), torch.uint8),
        }
    if scheme.layout == "mxfp8_linear":
        shape: tuple[int, ...] = (K // scheme.group_size, N)
    elif scheme.granularity == "block":
        shape = (K // scheme.group_size, N // scheme.block_n)
    else:
        shape = (N,) if scheme.granularity == "channel" else (1,)
    tensors = {"weight": Stored((N, K), _FP8[scheme.weight_dtype]), "weight_scale": Stored(shape, scale)}
    if scheme.input_scale:
        tensors["input_scale"] = Stored((1,), torch.float32)
    return tensors


def expert_tensors(scheme: Scheme, E: int, H: int, I: int) -> dict[str, Stored]:
    """Name → tensor of a stack of experts."""
    packed = scheme.layout in ("int4_experts", "uint4_experts", "mxfp4_experts")
    tensors: dict[str, Stored] = {}
    first, second = scheme.stacks
    for name, N, K in ((first, I * (1 + scheme.gated), H), (second, H, I)):
        if packed:
            tensors[name] = Stored((E, N, K // 2), torch.uint8)
        elif scheme.layout in ("int8_experts", "nvfp4_experts"):
            tensors[name] = Stored((E, N, K), torch.int8 if scheme.symmetric else torch.uint8)
        elif scheme.layout == "fp8_channel_experts":
            tensors[name] = Stored((E, N, K), _FP8[scheme.weight_dtype])
        else:
            tensors[name] = Stored((E, K, N), _FP8[scheme.weight_dtype])
        shape: tuple[int, ...] = (E, N, K // scheme.group_size) if scheme.group_size else (E,)
        if scheme.granularity == "block":
            shape = (E, K // scheme.group_size, N // scheme.block_n)
        elif scheme.granularity == "channel":
            shape = (E, N)
        tensors[f"{name}_scale"] = Stored(shape, scale_dtype(scheme))
        if not scheme.symmetric:
            tensors[f"{name}_zero_point"] = Stored(shape, torch.uint8)
        if scheme.layout == "nvfp4_experts":  # of gate and of up, or of down
            tensors[f"{name}_global_scale"] = Stored((E, N // I if name == "gate_up_proj" else 1), torch.float32)
        if scheme.bias:
            tensors[f"{name}_bias"] = Stored((E, N), torch.bfloat16)
    return tensors


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Nibbles along the last dimension, lowest first: `[..., n]` bytes → uint8 `[..., 2n]`."""
    octets = words.view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def _grouped(values: torch.Tensor, scale: torch.Tensor, block_n: int = 1) -> torch.Tensor:
    """`values [N, K]` times `scale [K/g, N/block_n]`, spread over its groups; float32."""
    N, K = values.shape
    groups = scale.shape[0]
    spread = scale.t().float().reshape(-1, 1, groups, 1)
    return (values.float().view(N // block_n, block_n, groups, K // groups) * spread).view(N, K)


def _with_global_scale(scheme: Scheme, values: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """`values [N, K]` under NVFP4's global scale: one number, or one for each of as many equal parts of the rows."""
    rows = number.repeat_interleave(len(values) // len(number)).unsqueeze(-1)
    return values / rows if scheme.divides else values * rows


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    return exponents.view(torch.float8_e8m0fnu).float()


def dequantize(scheme: Scheme, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weight `[N, K]` of a linear, or of one expert, in the column order it is stored in.

    Args:
        scheme: how it is stored.
        tensors: suffix → stored tensor; for an expert `weight`, `weight_scale`, `weight_zero_point` and
            `global_scale`, its slices of the stacked tensors.
        dtype: of the result; computed in float32 and rounded once.
    """
    layout = scheme.layout
    if layout in ("int4_linear", "int8_linear"):
        codes = _nibbles(tensors["qweight"]).to(torch.int8)
        groups = tensors["scales"].shape[0]
        N, K = codes.shape
        zeros: torch.Tensor | int = 8
        if layout == "int8_linear" or not scheme.symmetric:
            zeros = _nibbles(tensors["qzeros"]).to(torch.int8).t().unsqueeze(-1)
        wide = _grouped((codes.view(N, groups, K // groups) - zeros).view(N, K), tensors["scales"])
        if layout == "int8_linear":  # of each group the high nibbles, then the low ones
            wide = wide.view(N, groups // 2, 2, K // groups).sum(2).view(N, K // 2)
        return wide.to(dtype)
    if layout == "nvfp4_linear":
        planes = _nibbles(tensors["qweight"]).view(-1, tensors["scales"].shape[0], 2, scheme.group_size).to(torch.int8)
        twice = (planes.sum(2, dtype=torch.int8) - 16).flatten(1)
        return _with_global_scale(scheme, _grouped(twice, tensors["scales"]), tensors["global_scale"]).to(dtype)
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if layout == "nvfp4_experts":
        return _with_global_scale(scheme, _grouped(weight, scale.t()), tensors["global_scale"]).to(dtype)
    if layout == "int4_experts":
        signed = (_nibbles(weight) ^ 8).to(torch.int8) - 8
        return _grouped(signed, scale.t()).to(dtype)
    if layout in ("uint4_experts", "int8_experts"):
        values = (_nibbles(weight) if layout == "uint4_experts" else weight).float()
        if not scheme.symmetric:
            N, groups = scale.shape
            values = (values.view(N, groups, -1) - tensors["weight_zero_point"].float().unsqueeze(-1)).view(N, -1)
        return _grouped(values, scale.t()).to(dtype)
    if layout in ("mxfp4_linear", "mxfp4_experts"):
        values = torch.tensor(_E2M1, device=weight.device)[_nibbles(weight).int()]
        return _grouped(values, _powers(scale if layout == "mxfp4_linear" else scale.t())).to(dtype)
    if layout == "fp8_channel_experts":
        return _grouped(weight, scale.reshape(len(weight), -1).t()).to(dtype)
    if scheme.experts:
        weight = weight.t()
    if layout.startswith("mxfp8"):
        return _grouped(weight, _powers(scale if layout == "mxfp8_linear" else scale.t())).to(dtype)
    if scheme.granularity == "block":
        return _grouped(weight, scale, weight.shape[0] // scale.shape[1]).to(dtype)
    return (weight.float() * scale.float().reshape(-1, 1)).to(dtype)


def linear(
    scheme: Scheme,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x · Wᵀ (+ bias)`, `x` `[..., K]` in the order of the model's features; dtype of `x`."""
    if scheme.act_order:
        x = x.index_select(-1, tensors["g_idx"])
    if x.device.type == "xpu":
        from xpuquant.xpu_ops import linear as run

        return run(scheme, tensors, x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], -1)
    return F.linear(x, dequantize(scheme, tensors, x.dtype), bias)


def activated(scheme: Scheme, name: str, upper: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """What lies between the two matrices of an expert: `gated`, or without a gate the activation of vLLM's name that
    ends in `_no_mul`, `[M, I]` → `[M, I]`."""
    if scheme.gated:
        return gated(name, upper, scheme.interleaved, limit)
    if name not in ("relu2_no_mul", "relu2"):
        raise NotImplementedError(f"xpuquant computes no '{name}' experts without a gate: relu2")
    return F.relu(upper.float()).square().to(upper.dtype)


def gated(name: str, gate_up: torch.Tensor, interleaved: bool, limit: float | None = None) -> torch.Tensor:
    """The gated activation between the two matrices of an expert: `[M, 2I]` → `[M, I]`.

    Computed in float32 and rounded once, as vLLM's fused activations do. `swigluoai` is gpt-oss's, with
    its constants 1.702 and 7.
    """
    wide = gate_up.float()
    gate, up = (wide[:, 0::2], wide[:, 1::2]) if interleaved else wide.chunk(2, dim=-1)
    if name.startswith("swigluoai"):
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)).to(gate_up.dtype)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if name == "silu":
        return (F.silu(gate) * up).to(gate_up.dtype)
    if name in ("gelu", "gelu_tanh", "gelu_pytorch_tanh"):
        return (F.gelu(gate, approximate="none" if name == "gelu" else "tanh") * up).to(gate_up.dtype)
    raise NotImplementedError(f"xpuquant computes no '{name}' experts: silu, gelu, gelu_tanh or swigluoai")


def experts(
    scheme: Scheme,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The routed sum over experts, one expert decoded at a time.

    Args:
        tensors: the names of `expert_tensors`.
        x: `[M, H]`.
        weights: routing weights `[M, k]`.
        ids: the chosen experts `[M, k]`, as indices into the stack; negative: not on this rank.
        activate: the activation, `[m, 2I]` → `[m, I]`, or `[m, I]` → `[m, I]` without a gate.

    Returns:
        `[M, H]` in the dtype of `x`, summed in float32.
    """
    first, second = scheme.stacks
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(ids.flatten().tolist()) - {-1}):
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        upper = _expert_linear(scheme, tensors, first, expert, x[rows])
        out = _expert_linear(scheme, tensors, second, expert, activate(upper))
        total.index_add_(0, rows, out.float() * weights[rows, slots].float().unsqueeze(-1))
    return total.to(x.dtype)


def _expert_linear(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], name: str, expert: int, x: torch.Tensor
) -> torch.Tensor:
    parts = {"weight": "", "weight_scale": "_scale", "weight_zero_point": "_zero_point"}
    parts["global_scale"] = "_global_scale"
    stored = {role: tensors[name + part][expert] for role, part in parts.items() if name + part in tensors}
    bias = tensors.get(f"{name}_bias")
    return F.linear(x, dequantize(scheme, stored, x.dtype), None if bias is None else bias[expert].to(x.dtype))
