"""Every call into ARK (auto-round-lib), and into the operators of vllm-xpu-kernels around it: experts that
`XpuFusedMoe` does not take. What else of the kernels is called stands in `xpu_ops.py`.

Sources: the Python of each wheel for its calls, vLLM 0.33 for those around them, `ark_releases.py` for what differs
between releases. Torch is imported inside functions only.

Notation: activations x `[M, K]`, weight `[N, K]`, g = group size, E = experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xpuquant.ark_releases import ARK_PACKAGE, check_ark
from xpuquant.errors import EnvironmentFault
from xpuquant.formats.scheme import Scheme

if TYPE_CHECKING:
    import torch


def ark() -> Any:
    """ARK's module, with its library for XPU. vLLM on XPU requires it.

    Raises:
        EnvironmentFault: auto-round-lib is missing, too old, or its XPU library does not load.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version(ARK_PACKAGE)
        import auto_round_kernel
    except (PackageNotFoundError, ImportError):
        found = None
    check_ark(found)
    if getattr(auto_round_kernel, "xpu_lib", None) is None:
        raise EnvironmentFault(
            f"the XPU library of auto-round-lib {found} does not load: it needs an XPU build of torch"
        )
    return auto_round_kernel


def ark_gemm(
    scheme: Scheme,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    x: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Each row times the matrix of its expert, `[M, N]`: `moe_gemm_decode` for few rows, `moe_gemm_prefill` for many.

    Args:
        scheme: how the stack is stored.
        weight: `[E, N, K/2]` or `[E, N, K]`.
        scale: `[E, N, K/g]`, or `[E, N]` where it covers a channel, in the dtype of x.
        zeros: likewise; None where the scheme is symmetric.
        x: `[M, K]` bfloat16 or float16, the rows of one expert after those of the one before.
        rows: int32 `[E]`, rows of each expert.
    """
    import torch

    return ark().moe(  # type: ignore[no-any-return]
        x,
        # int8 as uint8: without zero points its bytes are read as signed. FP8 is told by its dtype.
        weight if weight.is_floating_point() else weight.view(torch.uint8),
        rows,
        scales=scale.unsqueeze(-1) if scheme.granularity == "channel" else scale,
        zeros=zeros,
        weight_bits=4 if scheme.layout == "uint4_experts" else 8,
        group_size=scheme.group_size or x.shape[1],
        asym=not scheme.symmetric,
    )


class ArkMoe:
    """Routed experts in ARK's kernels, with the calls around them that `XpuFusedMoe` makes, whose `apply` this has.

    As in vLLM 0.33 `model_executor/layers/quantization/inc/schemes/inc_wna16_moe.py`, which does it for symmetric int4.
    """

    def __init__(
        self,
        scheme: Scheme,
        tensors: Mapping[str, torch.Tensor],
        activation: str,
        limit: float | None,
        expert_map: torch.Tensor | None,
    ) -> None:
        """As `fused_moe`; scales and zero points in the dtype of the activations."""
        import vllm_xpu_kernels.fused_moe_interface  # noqa: F401 - registers the operators below

        self.scheme = scheme
        self.tensors = dict(tensors)
        self.activation = activation
        self.limit = limit
        self.expert_map = expert_map
        self.experts = tensors["down_proj"].shape[0]

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> None:
        """Fill `output [M, H]` with the routed sum over this rank's experts."""
        import torch

        (M, H), top_k = hidden_states.shape, topk_ids.shape[1]
        if not M:
            return
        device = hidden_states.device
        gathered = torch.empty((M * top_k, H), dtype=hidden_states.dtype, device=device)
        rows = torch.zeros(self.experts, dtype=torch.int32, device=device)
        places = torch.empty((M, top_k), dtype=torch.int32, device=device)
        torch.ops._moe_C.remap_hidden_states(
            hidden_states=hidden_states,
            hidden_states_scales=None,
            remapped_hidden_states=gathered,
            remapped_hidden_states_scales=None,
            expert_map=self.expert_map,
            rows_per_expert=rows,
            unpermuted_row_to_permuted_row=places,
            topk_ids=topk_ids,
            total_experts_num=self.experts if self.expert_map is None else self.expert_map.shape[0],
            local_experts_num=self.experts,
        )
        first, second = self.scheme.stacks
        out = self._gemm(second, self._activated(self._gemm(first, gathered, rows)), rows)
        torch.ops._moe_C.moe_gather(output, out, topk_weights, places, self.experts)

    def _gemm(self, name: str, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        tensors = self.tensors
        product = ark_gemm(
            self.scheme, tensors[name], tensors[f"{name}_scale"], tensors.get(f"{name}_zero_point"), x, rows
        )
        numbers = tensors.get(f"{name}_global_scale")
        return product if numbers is None else self._scaled(product, numbers, rows)

    def _scaled(self, product: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`[m, N]` times the global scales of each row's expert, `[E, parts]`: of gate and of up, or of down."""
        import torch

        m, N = product.shape
        # Rows lie by expert. Those of no expert of this rank come last, hold anything, and are read by nobody.
        ends = rows.cumsum(0)
        expert = torch.searchsorted(ends, torch.arange(m, device=ends.device), right=True).clamp_(max=len(rows) - 1)
        parts = product.view(m, numbers.shape[1], -1)
        return with_global_scale(self.scheme, parts, numbers[expert].unsqueeze(-1)).view(m, N)

    def _activated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`[m, 2I]` → `[m, I]`, or `[m, I]` without a gate, by the operators that `XpuFusedMoe` uses."""
        import torch

        if not self.scheme.gated:
            out = torch.empty_like(gate_up)
            getattr(torch.ops._C, self.activation)(out, gate_up)
            return out
        I = gate_up.shape[1] // 2
        if self.limit:
            gate_up[:, :I].clamp_(max=self.limit)
            gate_up[:, I:].clamp_(-self.limit, self.limit)
        out = gate_up.new_empty((len(gate_up), I))
        getattr(torch.ops._C, f"{self.activation}_and_mul")(out, gate_up)
        return out


def with_global_scale(
    scheme: Scheme, product: torch.Tensor, number: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What NVFP4 has beside a kernel's product: its global scale, float32, and then the bias; rounded once more.

    Args:
        product: `[M, N]`.
        number: float32, of shapes that broadcast over it.
        bias: `[N]`.
    """
    wide = product / number if scheme.divides else product * number  # in float32: that of `number`
    return (wide if bias is None else wide + bias).to(product.dtype)
