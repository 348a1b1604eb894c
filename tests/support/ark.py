"""ARK's `moe` for XPU in its stead: no test has an Intel GPU."""

from __future__ import annotations

import torch


def moe(
    x: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    *,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    weight_bits: int,
    group_size: int,
    asym: bool,
) -> torch.Tensor:
    """What `_validate_moe_quant_args` of auto_round_kernel checks, then the sum by its docstring."""
    E, N, K = len(rows), weights.shape[1], x.shape[1]
    fp8 = weights.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    assert (weights.dtype == torch.uint8 or fp8) and weights.shape == (E, N, K * weight_bits // 8) and N % 16 == 0
    assert rows.dtype == torch.int32 and scales.dtype == x.dtype and scales.shape == (E, N, K // group_size)
    codes = weights if weight_bits == 8 else torch.stack([weights & 15, weights >> 4], dim=-1).flatten(2)
    if fp8:
        assert zeros is None and not asym
        values = weights.float()
    elif asym:
        assert zeros is not None and zeros.dtype == x.dtype and zeros.shape == scales.shape
        values = codes.float() - zeros.float().repeat_interleave(group_size, 2)
    else:
        assert zeros is None
        half = 1 << weight_bits - 1
        values = (codes.float() + half) % (2 * half) - half
    wide = (values * scales.float().repeat_interleave(group_size, 2)).to(x.dtype)
    experts = torch.arange(E).repeat_interleave(rows)
    out = torch.full((len(x), N), torch.nan, dtype=x.dtype)
    out[: len(experts)] = torch.einsum("mk,mnk->mn", x[: len(experts)].float(), wide[experts].float()).to(x.dtype)
    return out
