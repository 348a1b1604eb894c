"""The operators of vllm-xpu-kernels on the CPU, registered under the schemas of a released wheel.

They check what the C++ of that release checks and read the memory as it does, in float64: csrc/xpu/onednn/*.h,
csrc/xpu/grouped_gemm and csrc/quantization of the repository's source of 2026-08-21, for what changed later the wheels'
machine code and strings. What a release gets wrong, its stand-in gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

import support.layers as hand
from xpuquant.xpu_releases import Release

Array = hand.Array
LIBRARY = {
    **dict.fromkeys(("per_token_group_fp8_quant", "per_token_group_quant_mxfp4"), "_C"),
    **dict.fromkeys(("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "swigluoai_and_mul"), "_C"),
    "relu2_no_mul": "_C",
    **dict.fromkeys(("remap_hidden_states", "moe_gather"), "_moe_C"),
}
"""Operator → namespace, where it is not `_xpu_C`."""


def as_stored(tensor: torch.Tensor) -> Array:
    """Raw bytes of a contiguous tensor."""
    assert tensor.is_contiguous()
    return tensor.view(torch.uint8).numpy() if tensor.dtype != torch.uint8 else tensor.numpy()


def nibbles(octets: Array) -> Array:
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1).astype(np.int64)


def e8m0(tensor: torch.Tensor) -> Array:
    return 2.0 ** (as_stored(tensor).astype(np.float64) - 127)


def e2m1(tensor: torch.Tensor) -> Array:
    assert tensor.dtype == torch.float4_e2m1fn_x2
    return np.array(hand.E2M1)[nibbles(as_stored(tensor))]


def wide(tensor: torch.Tensor) -> Array:
    return tensor.to(torch.float32).numpy().astype(np.float64)


def finish(y: Array, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    assert bias is None or bias.dtype == dtype
    return torch.from_numpy(y if bias is None else y + wide(bias)).to(dtype)


def spread(scales: Array, shape: tuple[int, ...]) -> Array:
    """Each scale over its block of `shape`."""
    rows, columns = (size // count for size, count in zip(shape, scales.shape, strict=True))
    assert rows * scales.shape[0] == shape[0] and columns * scales.shape[1] == shape[1]
    return np.kron(scales, np.ones((rows, columns)))


def int4_gemm_w4a16(A: Any, B: Any, bias: Any, B_scale: Any, B_zp: Any, group_size: int, g_idx: Any) -> torch.Tensor:
    assert A.dtype in (torch.float16, torch.bfloat16) and B.dtype == torch.int32 and B.stride(-2) == 1
    assert B_scale.is_contiguous() and (B_zp.dim() == 2 or (B_zp.dtype == torch.int8 and B_zp.numel() == 1))
    x = wide(A if g_idx is None else A.index_select(-1, g_idx))
    codes = nibbles(as_stored(B.t()))
    assert group_size > 0 and B_scale.shape == (codes.shape[1] // group_size, codes.shape[0])
    zeros = np.repeat(nibbles(as_stored(B_zp)), group_size, axis=0).T if B_zp.dim() == 2 else B_zp.item()
    weight = (codes - zeros) * np.repeat(wide(B_scale), group_size, axis=0).T
    return finish(x @ weight.T, bias, A.dtype)


def fp8_gemm_w8a16(A: Any, B: Any, B_scale_: Any, bias_: Any, *, release: Release) -> torch.Tensor:
    assert A.dtype in (torch.float16, torch.bfloat16) and B_scale_.is_contiguous()
    assert B_scale_.dtype == torch.float32 and B.stride(-2) == 1
    (K, N), scales = B.shape, wide(B_scale_)
    if scales.ndim == 2 and (len(scales) > 1 or 1 < scales.size < N):  # blocks; one row of N is a scale per channel
        if not release.takes_rectangular_blocks:
            # One quotient stands for both sides of a block: oneDNN groups N by it.
            side = K // len(scales)
            if N % side:
                raise RuntimeError("could not create a primitive descriptor for the matmul primitive")
            # Fewer groups than there are scales: it reads the first of them.
            scales = scales.reshape(-1)[: K // side * (N // side)].reshape(K // side, -1)
        scales = spread(scales, (K, N))
    else:
        assert scales.size in (1, N)
    return finish(wide(A) @ (wide(B) * scales.reshape(-1, N if scales.size > 1 else 1)), bias_, A.dtype)


def fp8_gemm(A: Any, B: Any, out_dtype: Any, A_scale_: Any, B_scale_: Any, bias_: Any) -> torch.Tensor:
    assert A.dtype == B.dtype and A.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and B.stride(-2) == 1
    assert A_scale_.dtype == B_scale_.dtype and A_scale_.is_contiguous() and B_scale_.is_contiguous()
    assert A_scale_.dim() == 2 and A_scale_.shape[1] > 1, "a single column of scales is one per token"
    assert A_scale_.shape[1] == B_scale_.shape[0], "Mismatch group size in input and weight."
    numbers = e8m0 if A_scale_.dtype == torch.float8_e8m0fnu else wide
    x = wide(A) * spread(numbers(A_scale_), tuple(A.shape))
    return finish(x @ (wide(B) * spread(numbers(B_scale_), tuple(B.shape))), bias_, out_dtype)


def fp4_gemm(A: Any, B: Any, A_scale: Any, B_scale: Any, out_dtype: Any, bias_: Any) -> torch.Tensor:
    assert A_scale.dtype == B_scale.dtype == torch.float8_e8m0fnu and B.stride(-2) == 1
    x = e2m1(A) * np.repeat(e8m0(A_scale), 32, axis=1)
    weight = e2m1(B.t()) * np.repeat(e8m0(B_scale), 32, axis=0).T
    return finish(x @ weight.T, bias_, out_dtype)


def cutlass_grouped_gemm_interface(
    ptr_A: Any,
    ptr_A_scale: Any,
    ptr_B: Any,
    ptr_B_scale: Any,
    ptr_bias: Any,
    ptr_D: Any,
    rows_per_expert: Any,
    N: int,
    K: int,
    num_experts: int,
) -> torch.Tensor:
    assert ptr_A.is_contiguous() and ptr_B.is_contiguous() and ptr_B_scale.is_contiguous() and ptr_A_scale is None
    assert rows_per_expert.dtype == torch.int32 and num_experts == len(ptr_B) == len(rows_per_expert) and N % 8 == 0
    assert ptr_A.shape[1] == K and ptr_D.shape[1] == N
    start = 0
    for expert, rows in enumerate(rows_per_expert.tolist()):
        part = slice(start, start + rows)
        start += rows
        weight = _expert(ptr_B[expert], ptr_B_scale[expert], N, K, ptr_A.dtype)
        ptr_D[part] = finish(wide(ptr_A[part]) @ weight.T, None if ptr_bias is None else ptr_bias[expert], ptr_A.dtype)
    return ptr_D.clone()


def _expert(stored: torch.Tensor, scale: torch.Tensor, N: int, K: int, dtype: torch.dtype) -> Array:
    """One expert of the grouped GEMM, `[N, K]`, by the dtype that says what its bytes are."""
    if stored.dtype in (torch.int8, torch.float4_e2m1fn_x2):
        assert scale.dim() == 2 and len(scale) == N and stored.shape == (N, K // 2)
        if stored.dtype == torch.int8:
            assert scale.dtype == dtype  # its pointer is read as A's
            values, scales = (nibbles(as_stored(stored)) ^ 8) - 8, wide(scale)
        else:
            values, scales = e2m1(stored), e8m0(scale)
        return values * np.repeat(scales, K // scales.shape[1], axis=1)
    assert tuple(stored.shape) == (K, N)
    weight = wide(stored).T
    if scale.dtype == torch.uint8:
        return weight * np.repeat(e8m0(scale), 32, axis=1)
    return weight * (wide(scale) if scale.dim() == 0 else np.kron(wide(scale), np.ones((128, 128))).T)


def remap_hidden_states(
    hidden_states: Any,
    hidden_states_scales: Any,
    remapped_hidden_states: Any,
    remapped_hidden_states_scales: Any,
    expert_map: Any,
    rows_per_expert: Any,
    unpermuted_row_to_permuted_row: Any,
    topk_ids: Any,
    total_experts_num: int,
    local_experts_num: int,
) -> None:
    """Rows by expert; those of experts elsewhere are left out, and a negative expert is taken for the first."""
    ids = topk_ids.clamp(min=0)
    local = ids if expert_map is None else expert_map[ids.long()]
    place = 0
    unpermuted_row_to_permuted_row.fill_(-1)
    for expert in range(local_experts_num):
        for row, slot in (local == expert).nonzero().tolist():
            remapped_hidden_states[place] = hidden_states[row]
            unpermuted_row_to_permuted_row[row, slot] = place
            rows_per_expert[expert] += 1
            place += 1


def moe_gather(
    output: Any,
    moe_output: Any,
    topk_weights: Any,
    unpermuted_row_to_permuted_row: Any,
    num_experts: int,
    *,
    release: Any,
) -> None:
    assert topk_weights.dtype == torch.float32
    if topk_weights.shape[1] not in release.top_k:
        raise RuntimeError(f"error: not support TOPK={topk_weights.shape[1]}")
    output.zero_()
    for row, places in enumerate(unpermuted_row_to_permuted_row.tolist()):
        total = sum(
            moe_output[place].double() * topk_weights[row, slot].double()
            for slot, place in enumerate(places)
            if place >= 0
        )
        output[row] = total


def relu2_no_mul(out: Any, input: Any) -> None:  # noqa: A002 - its name in the schema
    out.copy_(input.double().relu().square())


def _gate(name: str) -> Callable[..., None]:
    def activate(out: Any, gate_up: Any, *_: float) -> None:
        """gate and up as halves; `swigluoai` reads them alternating."""
        x = gate_up.double()
        gate, up = (x[:, ::2], x[:, 1::2]) if name == "swigluoai" else x.chunk(2, dim=-1)
        if name == "swigluoai":
            gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
            out.copy_(gate * torch.sigmoid(1.702 * gate) * up)
        elif name == "silu":
            out.copy_(torch.nn.functional.silu(gate) * up)
        else:
            out.copy_(torch.nn.functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none") * up)

    activate.__name__ = f"{name}_and_mul"
    return activate


def per_token_group_fp8_quant(
    input: Any,  # noqa: A002 - its name in the schema
    output_q: Any,
    output_s: Any,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    *dummies: bool,
) -> None:
    assert input.is_contiguous() and output_q.shape == input.shape and output_s.dtype == torch.float32
    assert fp8_max == -fp8_min == torch.finfo(output_q.dtype).max and not any(dummies)
    groups = input.float().reshape(len(input), -1, group_size)
    assert output_s.shape == groups.shape[:2]
    scale = groups.abs().amax(-1).clamp(min=eps) / fp8_max
    if scale_ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    output_s.copy_(scale)
    output_q.copy_((groups / scale.unsqueeze(-1)).reshape(input.shape).clamp(fp8_min, fp8_max).to(output_q.dtype))


def per_token_group_quant_mxfp4(
    input: Any,  # noqa: A002
    output_q: Any,
    output_s: Any,
    group_size: int,
    eps: float,
) -> None:
    assert input.is_contiguous() and output_q.dtype == torch.uint8 and group_size == 32
    groups = input.float().reshape(len(input), -1, 32)
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1).clamp(min=eps) / 6)))
    output_s.copy_(scale)
    values = (groups / scale.unsqueeze(-1)).reshape(input.shape)
    grid = torch.tensor(hand.E2M1[:8])
    codes = (values.abs().unsqueeze(-1) - grid).abs().argmin(-1) | (values < 0).long() << 3
    output_q.copy_((codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8))


STAND_INS: tuple[Callable[..., Any], ...] = (
    int4_gemm_w4a16,
    fp8_gemm_w8a16,
    fp8_gemm,
    fp4_gemm,
    cutlass_grouped_gemm_interface,
    per_token_group_fp8_quant,
    per_token_group_quant_mxfp4,
    remap_hidden_states,
    moe_gather,
    relu2_no_mul,
    *map(_gate, ("silu", "gelu", "gelu_tanh", "swigluoai")),
)


# What vLLM tells torch of the results of these (`vllm/_xpu_ops.py`, `register_fake`), for a compiler.
FAKES: dict[str, Callable[..., Any]] = {
    "int4_gemm_w4a16": lambda a, b, *_: a.new_empty(a.shape[0], b.shape[1]),
    "fp8_gemm_w8a16": lambda a, b, *_: a.new_empty(a.shape[0], b.shape[1]),
    "fp8_gemm": lambda a, b, dtype, *_: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype),
    "fp4_gemm": lambda a, b, a_scale, scale, dtype, *_: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype),
}


@contextmanager
def registered(release: Release) -> Iterator[None]:
    """The operators of that release, in this process, for tensors on the CPU."""
    libraries = {name: torch.library.Library(name, "FRAGMENT") for name in ("_xpu_C", "_C", "_moe_C")}
    try:
        for stand_in in STAND_INS:
            name = stand_in.__name__
            library = libraries[LIBRARY.get(name, "_xpu_C")]
            library.define(release.operators[name])
            known = partial(stand_in, release=release) if name in ("fp8_gemm_w8a16", "moe_gather") else stand_in
            library.impl(name, known, "CPU")
            if name in FAKES:
                torch.library.register_fake(f"_xpu_C::{name}", FAKES[name], lib=library)
        yield
    finally:
        for library in libraries.values():
            library._destroy()
