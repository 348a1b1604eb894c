"""The modules that the Transformers quantizer puts in: parameters as they are stored, nothing to convert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from xpuquant import layers
from xpuquant.errors import UnsupportedError
from xpuquant.formats.scheme import Scheme
from xpuquant.transformers.contracts import (
    check_experts_class,
    gate_of,
    has_identities,
    kernel_gate,
    normalizes_outputs,
    stack_sizes,
    takes_rows_by_expert,
)


def quantized(scheme: Scheme, module: nn.Module) -> nn.Module:
    """What takes the place of a module of the model.

    Raises:
        UnsupportedError: nothing does.
    """
    if scheme.experts:
        return _kind_of(module)(scheme, module)
    if isinstance(module, nn.Linear | Conv1D) and _multiplies_alone(module):
        return XpuquantLinear(scheme, module)
    weight = module._parameters.get("weight")
    reads_it_stored = "weight" in layers.linear_tensors(scheme, 1, 1)
    if isinstance(module, nn.Embedding) or weight is None or weight.ndim != 2 or reads_it_stored:
        raise UnsupportedError(f"a {type(module).__name__} cannot be loaded as {scheme.label()}: not a linear")
    return XpuquantRouter.take_over(scheme, module)


def _kind_of(experts: nn.Module) -> type[XpuquantExperts]:
    if takes_rows_by_expert(experts):
        return XpuquantRowsByExpert
    if has_identities(experts):
        return XpuquantExpertsOrInput
    return XpuquantNormalizedExperts if normalizes_outputs(experts) else XpuquantExperts


def _multiplies_alone(module: nn.Linear | Conv1D) -> bool:
    """Whether a module computes what its base class does. DeepSeek-V4's `o_a_proj` multiplies group by group, the
    routers of Llama 4 and Phi-MoE return scores: they are linears by their class alone."""
    kind = type(module)
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ in _ALIKE


_ALIKE = ("FalconLinear",)
"""Classes with a `forward` of their own that is a linear's."""


class Quantized(nn.Module):
    """Holds the stored tensors; created on the meta device, filled by the loader."""

    scheme: Scheme
    bias: nn.Parameter | None

    def _create(self, tensors: Mapping[str, layers.Stored]) -> None:
        self.wanted = dict(tensors)
        for name, stored in tensors.items():
            data = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))

    def _stored(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self.wanted}

    def extra_repr(self) -> str:
        return self.scheme.label()


class Decoding(Quantized):
    """A quantized matrix `[N, K]`, whose `weight` is there for code of models that asks for it (GPT-2 does when it
    initializes, T5 for its dtype): decoded anew each time, where it is not stored under that name."""

    def _hold(self, scheme: Scheme, N: int, K: int, dtype: torch.dtype) -> None:
        self.scheme, self.decoded_dtype = scheme, dtype
        self._create(layers.linear_tensors(scheme, N, K))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "weight" or "weight" in self.wanted:
                raise
        stored = self._stored()
        decoded = layers.dequantize(self.scheme, stored, self.decoded_dtype)
        if not self.scheme.act_order:
            return decoded
        columns = torch.empty_like(decoded)
        columns[:, stored["g_idx"].long()] = decoded
        return columns


class XpuquantLinear(Decoding):
    """Instead of an `nn.Linear`, or of GPT-2's `Conv1D`, which is one with its weight turned."""

    def __init__(self, scheme: Scheme, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        turned = isinstance(linear, Conv1D)
        K, N = (linear.nx, linear.nf) if turned else (linear.in_features, linear.out_features)
        self.in_features, self.out_features = int(K), int(N)  # type: ignore[arg-type]
        self._hold(scheme, self.out_features, self.in_features, linear.weight.dtype)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layers.linear(self.scheme, self._stored(), x, self.bias)

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, {super().extra_repr()}"


class XpuquantRouter(Decoding):
    """Instead of a module that multiplies with its `weight` `[N, K]` in its own way: it goes on doing so, with the
    decoded one. Some producers quantize routers (vLLM's pull request 17829), or linears that are none
    (`_multiplies_alone`)."""

    @classmethod
    def take_over(cls, scheme: Scheme, module: nn.Module) -> nn.Module:
        """The module itself, as a class of its own, with the stored tensors in the place of its weight."""
        weight = module._parameters.pop("weight")
        assert weight is not None, "`quantized` has looked"
        module.__class__ = type(type(module).__name__, (cls, type(module)), {})
        assert isinstance(module, XpuquantRouter)
        N, K = weight.shape
        module._hold(scheme, N, K, weight.dtype)
        return module


class XpuquantExperts(Quantized):
    """Instead of a model's stack of experts, which it keeps for its gate."""

    def __init__(self, scheme: Scheme, experts: Any) -> None:
        super().__init__()
        check_experts_class(experts, scheme)
        self.scheme = scheme
        E, H, I = stack_sizes(experts)
        self.num_experts = E
        # In a tuple, so that it is no submodule: its own parameters, never filled, are not the model's any more.
        self._replaced = (experts,)
        self._create(layers.expert_tensors(scheme, E, H, I))
        self._kernel: Any = None

    def check_kernel(self, top_k: int | None) -> None:
        """Say before the weights are loaded what would fail at the first forward on an Intel GPU.

        Args:
            top_k: experts per token; None where the model's config does not say it under a known name.

        Raises:
            EnvironmentFault, UnsupportedError: in one line, see `kernel_gate` and `xpu_ops.check_experts`.
        """
        from xpuquant.xpu_ops import check_experts

        # Computed on the CPU: while a model is made, tensors are on the meta device unless told otherwise.
        with torch.device("cpu"):
            activation, limit = kernel_gate(self._replaced[0], self.scheme, torch.device("cpu"))
        check_experts(self.scheme, top_k, activation, limit)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[M, H]`, ids `[M, k]` (the number of experts: none), weights `[M, k]` → `[M, H]`."""
        tensors = self._stored()
        ids = torch.where(top_k_index < self.num_experts, top_k_index, -1)
        if hidden_states.device.type != "xpu":
            gate = gate_of(self._replaced[0])
            return layers.experts(self.scheme, tensors, hidden_states, top_k_weights, ids, gate)
        from xpuquant.xpu_ops import cast_when_loaded, fused_moe, run_experts

        if self._kernel is None:
            for name, tensor in tensors.items():
                if cast_when_loaded(self.scheme, name):
                    tensor.data = tensor.data.to(hidden_states.dtype)
            activation, limit = kernel_gate(self._replaced[0], self.scheme, hidden_states.device)
            self._kernel = fused_moe(self.scheme, tensors, ids.shape[1], activation, limit)
        return run_experts(self._kernel, hidden_states, top_k_weights, ids)


class XpuquantRowsByExpert(XpuquantExperts):
    """Instead of Llama 4's, which is given every token for every expert, times a router weight that may be 0."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """`[E * m, H]`, m rows for each expert → `[E * m, H]`."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts = torch.arange(self.num_experts, device=rows.device)
        ids = experts.repeat_interleave(len(rows) // self.num_experts).unsqueeze(-1)
        return super().forward(rows, ids, torch.ones_like(ids, dtype=rows.dtype))


class XpuquantExpertsOrInput(XpuquantExperts):
    """Instead of Longcat-Flash's, where a route beyond the stack leads to an expert that returns its input."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As of `XpuquantExperts`, plus each row times the weights of its routes beyond the stack."""
        beyond = torch.where(top_k_index >= self.num_experts, top_k_weights, 0).sum(-1, keepdim=True)
        computed = super().forward(hidden_states, top_k_index, top_k_weights)
        return computed + (hidden_states * beyond).to(computed.dtype)


class XpuquantNormalizedExperts(XpuquantExperts):
    """Instead of Muse Spark's, which normalize the output of each expert before they weigh it: a row for each route."""

    def __init__(self, scheme: Scheme, experts: Any) -> None:
        super().__init__(scheme, experts)
        self.post_expert_norm = experts.post_expert_norm

    def check_kernel(self, top_k: int | None) -> None:
        """As of `XpuquantExperts`, for one expert to a row."""
        super().check_kernel(1)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[M, H]`, ids `[M, k]` (the number of experts: none), weights `[M, k]` → `[M, H]`."""
        rows = hidden_states.repeat_interleave(top_k_index.shape[1], dim=0)
        ids = top_k_index.reshape(-1, 1)
        outputs = super().forward(rows, ids, torch.ones_like(ids, dtype=rows.dtype))
        weights = torch.where(top_k_index < self.num_experts, top_k_weights, 0).unsqueeze(-1)
        normalized = self.post_expert_norm(outputs).reshape(*top_k_index.shape, -1)
        summed: torch.Tensor = (normalized * weights).sum(1)
        return summed.to(hidden_states.dtype)
