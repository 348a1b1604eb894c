"""Routed experts: the stored stacks as parameters, filled slice by slice from the file's own tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from xpuquant import layers
from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.scheme import ARK_LAYOUTS, Scheme
from xpuquant.formats.splits import intermediate_step
from xpuquant.xpu_ops import cast_when_loaded, check_experts, fused_moe, run_experts


class XpuquantExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """One method for every expert layout. Parameters have the names of the file's tensors."""

    def __init__(self, scheme: Scheme, prefix: str, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.scheme = scheme
        self.prefix = prefix
        self.kernel: Any = None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Raises UnsupportedError, in one line, for what no XPU kernel takes."""
        scheme, E, H, I = self.scheme, num_experts, hidden_size, intermediate_size_per_partition
        unpadded = extra.get("unpadded_hidden_size") or H
        if unpadded != H:
            raise UnsupportedError(f"{self.prefix}: padded hidden sizes have no kernel")
        if layer.apply_router_weight_on_input and self.moe.experts_per_token > 1:
            raise UnsupportedError(f"{self.prefix}: router weights on the input of several experts have no kernel")
        if current_platform.is_xpu():
            try:
                top_k, activation = self.moe.experts_per_token, layer.activation.value
                check_experts(scheme, top_k, activation, layer.swiglu_limit, self.moe.ep_size)
            except UnsupportedError as error:
                raise UnsupportedError(f"{self.prefix}: {error}") from None
        if I % (step := intermediate_step(scheme)):
            raise UnsupportedError(
                f"{self.prefix}: {I} intermediate features on each rank are no multiple of {step}; "
                "use a smaller --tensor-parallel-size or --enable-expert-parallel"
            )
        for name, stored in layers.expert_tensors(scheme, E, H, I).items():
            dtype = stored.dtype
            if cast_when_loaded(scheme, name):
                dtype = params_dtype
            elif name.endswith("_scale") and dtype.is_floating_point:
                dtype = torch.float32
            param = Parameter(torch.empty(stored.shape, dtype=dtype), requires_grad=False)
            set_weight_attrs(param, {"weight_loader": _only_whole})
            layer.register_parameter(name, param)

    def load(self, layer: Any, name: str, tensor: torch.Tensor) -> None:
        """Copy this rank's part of the stored tensor `name` (all experts, all rows) into its parameter.

        `tensor` may be a view of a mapped file: the bytes of other ranks' experts are then never read.
        """
        param: torch.Tensor = getattr(layer, name).data
        moe = self.moe.moe_parallel_config
        # The model's expert → its place in this rank's stack, negative: another rank's. One transfer from the device.
        places = range(len(param)) if layer.expert_map is None else layer.expert_map.tolist()
        if len(places) != len(tensor):
            raise self._unfit(name, tensor)
        for target, source in self._cuts(name, tensor, param, moe.tp_rank, moe.tp_size):
            if len(target) == len(source):
                target.copy_(source)
                continue
            for expert, place in enumerate(places):
                if place >= 0:
                    target[place].copy_(source[expert])
        if name == f"{self.scheme.stacks[1]}_bias" and moe.tp_rank > 0:
            param.zero_()  # the ranks' outputs are summed

    def _cuts(
        self, name: str, tensor: torch.Tensor, param: torch.Tensor, rank: int, ranks: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(part of the parameter, part of the stored tensor) pairs that this rank copies."""
        dim = self._cut_dim(name)
        if dim is None or ranks == 1:
            pairs = [(param, tensor)]
        elif name.startswith(self.scheme.stacks[1]) or self.scheme.interleaved or not self.scheme.gated:
            size = param.shape[dim]
            pairs = [(param, tensor.narrow(dim, rank * size, size))]
        else:
            # Gate rows, then up rows: a rank takes its share of either.
            size, half = param.shape[dim] // 2, tensor.shape[dim] // 2
            pairs = [
                (param.narrow(dim, i * size, size), tensor.narrow(dim, i * half + rank * size, size)) for i in range(2)
            ]
        if any(target.shape[1:] != source.shape[1:] for target, source in pairs):
            raise self._unfit(name, tensor)
        return pairs

    def _unfit(self, name: str, tensor: torch.Tensor) -> DamagedError:
        return DamagedError(f"{self.prefix}.{name} has shape {list(tensor.shape)}, which does not fit config.json")

    def _cut_dim(self, name: str) -> int | None:
        """The dimension of a stored tensor along which tensor parallelism cuts I; None: nowhere."""
        first = name.startswith(self.scheme.stacks[0])
        if name.endswith("_global_scale"):
            return None
        if name.endswith("_bias"):
            return 1 if first else None
        rows_first = self.scheme.layout in ("int4_experts", "mxfp4_experts", *ARK_LAYOUTS)
        if name.endswith(("_scale", "_zero_point")):
            if self.scheme.granularity == "tensor":
                return None
            if self.scheme.granularity == "channel":
                return 1 if first else None
            rows_first = self.scheme.granularity != "block"
        return 1 if first == rows_first else 2

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing to do: what was loaded is what the kernel reads."""

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[M, H]` → `[M, H]`; this rank's part of the sum."""
        tensors = {name: p for name, p in layer.named_parameters(recurse=False) if name.startswith(self.scheme.stacks)}
        activation, limit = layer.activation.value, layer.swiglu_limit
        if layer.apply_router_weight_on_input:
            # Llama 4, one expert for each token: its input is weighed, its output not.
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if x.device.type != "xpu":
            ids = topk_ids.long()
            if layer.expert_map is not None:
                ids = torch.where(ids < 0, ids, layer.expert_map[ids.clamp(min=0)].long())
            activate = partial(layers.activated, self.scheme, activation, limit=limit)
            return layers.experts(self.scheme, tensors, x, topk_weights, ids, activate)
        moe = self.moe
        if self.kernel is None:
            self.kernel = fused_moe(
                self.scheme,
                tensors,
                topk_ids.shape[1],
                activation,
                limit,
                moe.ep_rank,
                moe.ep_size,
                layer.expert_map,
            )
        if moe.ep_size > 1:
            # -1 (a padding row's route) must become an expert that another rank owns.
            elsewhere = layer.global_num_experts - 1 if moe.ep_rank == 0 else 0
            topk_ids = torch.where(topk_ids < 0, elsewhere, topk_ids)
        return run_experts(self.kernel, x, topk_weights, topk_ids)


def _only_whole(param: Parameter, loaded: torch.Tensor, *_: Any, **__: Any) -> None:
    raise DamagedError("experts of an xpuquant repo are loaded whole; this vLLM model loader offered a part of them")
