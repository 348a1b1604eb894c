"""Linears that vLLM asks for under another name than their path.

vLLM asks for the method of a layer while it builds it, under a prefix that each model's code hands down. Tensors are
loaded by the path of a module, which exists only when the model is whole; the two differ in some models. Falcon-H1's
attention is `model.layers.0.self_attn` and asked for as `model.layers.0`, its mixer `model.layers.0.mamba.mamba` and
asked for as `model.2.mixer`. So a linear of a name that the repo does not have, while others of its kind are quantized,
waits with a weight that has a shape and no memory. `go_by_path` then says what it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

if TYPE_CHECKING:
    from xpuquant.vllm.config import XpuquantConfig


@register_weight_loader_v2_supported_method
class WaitingMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """Of a linear until its path is known. To the model that is being built it is an unquantized one."""

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
        """A weight on the meta device; what was asked for is kept."""
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
        self.asked = (*sizes, params_dtype)
        self.extra = extra
        with torch.device("meta"):
            super().create_weights(layer, *self.asked, **extra)

    def give_way(self, layer: Any, method: Any) -> None:
        """Let `method` make the layer's parameters. What the model has set on the weight stays, where there is one."""
        waiting = layer.get_parameter("weight")
        delattr(layer, "weight")
        layer.quant_method = method
        method.create_weights(layer, *self.asked, **self.extra)
        if isinstance(method, UnquantizedLinearMethod):
            vars(layer.get_parameter("weight")).update(vars(waiting))
        layer.update_param_tp_status()


def go_by_path(model: torch.nn.Module, config: XpuquantConfig) -> None:
    """Give every waiting linear the method that its path says, and its prefix that path where it is quantized.

    Raises:
        UnsupportedError: in one line, as `create_weights` of the method does.
    """
    paths: dict[torch.nn.Module, list[str]] = {}
    # A module that is shared has several paths, and the repo its tensors under one of them.
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(layer, "quant_method", None), WaitingMethod):
            paths.setdefault(layer, []).append(path)
    for layer, names in paths.items():
        stored = next((name for name in names if any(map(config.scheme_of, config.members(name)))), None)
        waiting: Any = layer.quant_method
        if stored is None:
            waiting.give_way(layer, UnquantizedLinearMethod())
        else:
            layer.prefix = stored  # type: ignore[assignment]
            waiting.give_way(layer, config.linear_method(stored))
    if paths:
        record_metadata_for_reloading(model)
