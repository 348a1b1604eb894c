"""Linear layers: parameters in the stored layout, filled by vLLM's own sharding or left in the file, never moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import Parameter
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BlockQuantScaleParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)
from vllm.model_executor.utils import set_weight_attrs

from xpuquant import layers
from xpuquant.errors import UnsupportedError
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.splits import columns_step, group_on_rank, has_zero_words, rows_step
from xpuquant.vllm.adoption import SHARDS, MemberLoader, adopt
from xpuquant.xpu_ops import eight


@register_weight_loader_v2_supported_method
class XpuquantLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One method for every linear layout; the scheme says which parameters there are."""

    def __init__(self, scheme: Scheme, prefix: str) -> None:
        self.scheme = scheme
        self.prefix = prefix
        self.zero_words = has_zero_words(scheme)

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
        """Raises UnsupportedError, in one line, where tensor parallelism would cut a group or a block."""
        scheme, K = self.scheme, input_size_per_partition
        sizes, N = output_partition_sizes, sum(output_partition_sizes)
        self.sizes = sizes
        self.gather = scheme.act_order and input_size > K
        group = group_on_rank(scheme, input_size, K)
        whole = group != scheme.group_size
        if K % (step := columns_step(scheme, input_size, K)):
            raise UnsupportedError(
                f"{self.prefix}: {K} input features on each rank are no multiple of "
                f"{'the group of ' * (step == group)}{step}; use a smaller --tensor-parallel-size"
            )
        step = rows_step(scheme)
        if any(size % step for size in sizes):
            raise UnsupportedError(
                f"{self.prefix}: {sizes} output features on each rank are no multiple of {step}; "
                "use a smaller --tensor-parallel-size"
            )
        if scheme.granularity == "block":
            layer.weight_block_size = [scheme.block_n, group]  # vLLM's sharding of block scales reads it
        whole_rows = sizes if (input_size, output_size) == (K, N) else ()
        for suffix, stored in layers.linear_tensors(replace(scheme, group_size=group), N, K).items():
            if suffix == "g_idx":
                self._create_g_idx(layer, len(sizes), K)
                continue
            scalar = stored.shape == (1,)
            dtype = params_dtype if suffix == "scales" else stored.dtype
            if suffix == "weight_scale" and dtype.is_floating_point:
                dtype = torch.float32  # what the fp8 kernels read
            data = torch.empty((len(sizes),) if scalar else stored.shape, dtype=dtype)
            loader = MemberLoader(extra["weight_loader"], whole_rows if suffix in ("qweight", "weight") else ())
            layer.register_parameter(suffix, _parameter(scheme, suffix, data, scalar, whole, loader))

    def _create_g_idx(self, layer: Any, members: int, K: int) -> None:
        """One permutation per fused member; on one rank a slice of it, with indices into the whole K."""

        def load(param: Parameter, loaded: torch.Tensor, shard: str | int | None = None) -> None:
            if loaded.shape[0] != K:
                loaded = loaded.narrow(0, layer.tp_rank * K, K)
            row = SHARDS[shard] if isinstance(shard, str) else shard
            (param.data if row is None else param.data[row]).copy_(loaded)

        g_idx = Parameter(torch.empty(members, K, dtype=torch.int32), requires_grad=False)
        set_weight_attrs(g_idx, {"weight_loader": load})
        layer.register_parameter("g_idx", g_idx)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing moves: parameters lose their loaders, and fused scalars become a scale per row."""
        scheme = self.scheme
        if scheme.layout in ("int4_linear", "nvfp4_linear") and scheme.symmetric:
            # Made before vLLM compiles, which keeps parameters as inputs of what it compiles.
            layer.qzeros = Parameter(eight(layer.qweight.device), requires_grad=False)
        for suffix, param in list(layer.named_parameters(recurse=False)):
            if suffix != "bias":
                layer.register_parameter(suffix, Parameter(param.data, requires_grad=False))
        if scheme.layout == "fp8_linear" and scheme.granularity == "tensor" and len(self.sizes) > 1:
            # Every member has a scale of its own; one scale per row is exact where one for all is not.
            sizes = torch.tensor(self.sizes, device=layer.weight_scale.device)
            layer.weight_scale = Parameter(layer.weight_scale.data.repeat_interleave(sizes), requires_grad=False)
            self.scheme = replace(scheme, granularity="channel")
        if scheme.layout == "nvfp4_linear" and len(self.sizes) > 1:
            sizes = torch.tensor(self.sizes, device=layer.global_scale.device)
            layer.global_scale = Parameter(layer.global_scale.data.repeat_interleave(sizes), requires_grad=False)
        self.parts = self._split(layer) if scheme.act_order else None

    def _split(self, layer: Any) -> list[dict[str, torch.Tensor]] | None:
        """Per-member tensors where fused members are permuted differently; else one shared `g_idx`.

        The weight's rows are views; only the scales and zero points of each member are copied, because the
        kernel wants them contiguous.
        """
        g_idx = layer.g_idx.data
        if bool((g_idx == g_idx[0]).all()):
            layer.g_idx = Parameter(g_idx[0], requires_grad=False)
            return None
        parts, start = [], 0
        for row, size in zip(g_idx, self.sizes, strict=True):
            part = {"qweight": layer.qweight.data[start : start + size], "g_idx": row}
            part["scales"] = layer.scales.data[:, start : start + size].contiguous()
            part["qzeros"] = layer.qzeros
            if self.zero_words:
                part["qzeros"] = layer.qzeros.data[:, start // 8 : (start + size) // 8].contiguous()
            parts.append(part)
            start += size
        return parts

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x [..., K] · Wᵀ (+ bias)`."""
        scheme = self.scheme
        if self.gather:
            # The columns of this rank's weight may belong to any rank's activations.
            x = tensor_model_parallel_all_gather(x)
        if scheme.act_order and self.parts is not None:
            out = torch.cat([layers.linear(scheme, part, x) for part in self.parts], dim=-1)
            return out if bias is None else out + bias
        return layers.linear(scheme, dict(layer.named_parameters(recurse=False)), x, bias)


class XpuquantHeadMethod(XpuquantLinearMethod):
    """A quantized `lm_head`, whose rows vLLM pads and shards its own way."""

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        super().create_weights(layer, *sizes, **extra)
        indices = layer.shard_indices
        start = indices.org_vocab_start_index
        size = indices.org_vocab_end_index - start

        def load(param: Any, loaded: torch.Tensor) -> None:
            if adopt(param, loaded):
                return
            dim = getattr(param, "output_dim", None)
            if dim is None:
                param.data.copy_(loaded)
                return
            # Vocabulary rows per element of that dimension: zero points share words, scales cover blocks.
            factor = param.packed_factor if getattr(param, "packed_dim", None) == dim else 1
            if isinstance(param, BlockQuantScaleParameter):
                factor = self.scheme.block_n
            param.data.zero_()
            param.data.narrow(dim, 0, size // factor).copy_(loaded.narrow(dim, start // factor, size // factor))

        for param in layer.parameters(recurse=False):
            param.weight_loader = load

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """A head that is stored on its own is not tied, whatever the model's config says."""
        return layer


def _parameter(scheme: Scheme, suffix: str, data: torch.Tensor, scalar: bool, whole: bool, loader: Any) -> Any:
    """The vLLM parameter class that shards one stored tensor; dimensions are those of `linear_tensors`."""
    if scalar:
        data.fill_(torch.finfo(torch.float32).min)
        return PerTensorScaleParameter(data=data, weight_loader=loader)
    if suffix == "qweight" or (suffix == "weight" and data.dtype is torch.uint8):
        factor = 8 if suffix == "qweight" else 2
        return PackedvLLMParameter(
            data=data, input_dim=1, output_dim=0, packed_dim=1, packed_factor=factor, weight_loader=loader
        )
    if suffix == "weight":
        return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
    if suffix == "qzeros":
        packed = {"packed_dim": 1, "packed_factor": 8, "output_dim": 1, "data": data, "weight_loader": loader}
        return PackedColumnParameter(**packed) if whole else PackedvLLMParameter(input_dim=0, **packed)
    if scheme.granularity == "channel" and data.ndim == 1:
        return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    if whole:
        return ChannelQuantScaleParameter(data=data, output_dim=1, weight_loader=loader)
    kind = BlockQuantScaleParameter if scheme.granularity == "block" else GroupQuantScaleParameter
    return kind(data=data, input_dim=0, output_dim=1, weight_loader=loader)
