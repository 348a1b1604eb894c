"""A layer that vLLM fuses from members stored in different schemes, one of which may be unquantized.

Each member keeps its own parameters and kernel call; outputs are joined. This costs a call per member and
no exactness: the other ways out are to requantize or to refuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs

from xpuquant.errors import UnsupportedError
from xpuquant.formats.scheme import Scheme
from xpuquant.vllm.adoption import SHARDS, adopt
from xpuquant.vllm.linear import XpuquantLinearMethod


class XpuquantMembersMethod(LinearMethodBase):  # type: ignore[misc]
    """Scheme by member; None: unquantized."""

    def __init__(self, schemes: dict[str, Scheme | None], prefix: str) -> None:
        self.prefix = prefix
        self.methods: list[Any] = [
            UnquantizedLinearMethod() if scheme is None else XpuquantLinearMethod(scheme, name)
            for name, scheme in schemes.items()
        ]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Raises UnsupportedError, in one line, where vLLM cuts the layer otherwise than the repo does."""
        if len(output_partition_sizes) != len(self.methods):
            raise UnsupportedError(f"{self.prefix}: its members are stored in different schemes, and vLLM splits them")
        self.parts = torch.nn.ModuleList()
        for method, size in zip(self.methods, output_partition_sizes, strict=True):
            part: Any = torch.nn.Module()
            part.tp_rank = layer.tp_rank
            method.create_weights(
                part, input_size_per_partition, [size], input_size, size, params_dtype, weight_loader=_never
            )
            self.parts.append(part)
        layer.add_module(MEMBERS, self.parts)
        # vLLM looks for parameters under the fused layer's own name: empty ones that pass the tensors on.
        for suffix in sorted({suffix for part in self.parts for suffix, _ in part.named_parameters()}):
            door = Parameter(torch.empty(0), requires_grad=False)
            set_weight_attrs(door, {"weight_loader": self._loader(layer, suffix)})
            layer.register_parameter(suffix, door)

    def _loader(self, layer: Any, suffix: str) -> Any:
        def load(door: Parameter, loaded: torch.Tensor, shard: str | int) -> None:
            member = SHARDS[shard] if isinstance(shard, str) else shard
            param: Any = getattr(self.parts[member], suffix)
            if suffix == "g_idx":
                param.weight_loader(param, loaded)
            else:
                # k and v heads that are fewer than the ranks are held by several.
                replicas = layer.num_kv_head_replicas if shard in ("k", "v", "index_q") else 1
                everywhere = shard == "index_k" or (shard == "index_q" and getattr(layer, "replicate_index_q", False))
                param.tp_rank = 0 if everywhere else layer.tp_rank // replicas
                loaded = loaded.reshape(1) if loaded.ndim == 0 else loaded
                if not adopt(param, loaded):
                    param.load_column_parallel_weight(loaded)
            param.filled = True

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Each member's own, which moves nothing."""
        for method, part in zip(self.methods, self.parts, strict=True):
            method.process_weights_after_loading(part)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x [..., K] · Wᵀ (+ bias)`, member after member."""
        joined = zip(self.methods, self.parts, strict=True)
        out = torch.cat([method.apply(part, x, None) for method, part in joined], dim=-1)
        return out if bias is None else out + bias


MEMBERS = "members"


def _never(*_: Any) -> None:
    raise AssertionError("members are filled through the fused layer's parameters")
