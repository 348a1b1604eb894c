"""The modules that the Transformers quantizer puts in: parameters as they are stored, nothing to convert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from xpuquant import layers
from xpuquant.errors import UnsupportedError
from xpuquant.formats.scheme import Scheme


def quantized(scheme: Scheme, module: nn.Module) -> nn.Module:
    """What takes the place of a module of the model.

    Raises:
        UnsupportedError: nothing does.
    """
    if scheme.experts:
        return XpuquantExperts(scheme, module)
    if isinstance(module, nn.Linear | Conv1D):
        return XpuquantLinear(scheme, module)
    weight = module._parameters.get("weight")
    reads_it_stored = "weight" in layers.linear_tensors(scheme, 1, 1)
    if isinstance(module, nn.Embedding) or weight is None or weight.ndim != 2 or reads_it_stored:
        raise UnsupportedError(f"a {type(module).__name__} cannot be loaded as {scheme.label()}: not a linear")
    return XpuquantRouter.take_over(scheme, module)


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
    decoded one. Some producers quantize routers (vLLM's pull request 17829)."""

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


# Class of an activation function of Transformers or torch → vLLM's name of the gate that is made of it.
_KERNEL_NAMES = {
    **dict.fromkeys(("SiLU", "SiLUActivation"), "silu"),
    "GELUActivation": "gelu",
    # Three ways to write the same approximation.
    **dict.fromkeys(("GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation"), "gelu_tanh"),
}


class XpuquantExperts(Quantized):
    """Instead of a model's stack of experts, whose activation it keeps."""

    def __init__(self, scheme: Scheme, experts: Any) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            if not isinstance(getattr(experts, name, None), nn.Parameter):
                raise UnsupportedError(f"{type(experts).__name__} has no stacked {name}: Transformers 5 is needed")
        self.scheme = scheme
        E, first, second = experts.down_proj.shape
        # [E, H, I] in most models; [E, I, H] in gpt-oss, whose gate_up_proj is [E, H, 2I].
        H, I = (first, second) if experts.gate_up_proj.shape[1] == 2 * second else (second, first)
        self.num_experts = E
        self.act_fn = getattr(experts, "act_fn", None)
        # gpt-oss and its like gate in their own way; the rest is the activation of one half times the other.
        self._gate: Callable[[torch.Tensor], torch.Tensor] = getattr(experts, "_apply_gate", self._halves)
        if scheme.interleaved and not hasattr(experts, "_apply_gate"):
            raise UnsupportedError(f"{type(experts).__name__} does not take the alternating rows of {scheme.label()}")
        self._create(layers.expert_tensors(scheme, E, H, I))
        self._kernel: Any = None

    @property
    def activation(self) -> str:
        """The name that the XPU kernel knows; of another function its class, which is then refused by name."""
        if self.scheme.interleaved:
            return "swigluoai"
        name = type(self.act_fn).__name__
        return _KERNEL_NAMES.get(name, name)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[M, H]`, ids `[M, k]` (the number of experts: none), weights `[M, k]` → `[M, H]`."""
        tensors = self._stored()
        ids = torch.where(top_k_index < self.num_experts, top_k_index, -1)
        if hidden_states.device.type != "xpu":
            return layers.experts(self.scheme, tensors, hidden_states, top_k_weights, ids, self._gate)
        from xpuquant.xpu_ops import cast_when_loaded, fused_moe, run_experts

        if self._kernel is None:
            for name, tensor in tensors.items():
                if cast_when_loaded(self.scheme, name):
                    tensor.data = tensor.data.to(hidden_states.dtype)
            self._kernel = fused_moe(self.scheme, tensors, ids.shape[1], self.activation)
        return run_experts(self._kernel, hidden_states, top_k_weights, ids)

    def _halves(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up  # type: ignore[misc, no-any-return]
