"""`quantization_config` with `quant_method: xpuquant`, as vLLM asks for it: which method for which layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from xpuquant.formats.architecture import ALIASES, members_of
from xpuquant.formats.scheme import QUANT_METHOD, Scheme, from_config
from xpuquant.vllm import versions


class XpuquantConfig(QuantizationConfig):  # type: ignore[misc]
    """Exact module names → scheme, in the names of the repo and in vLLM's."""

    def __init__(self, stored: dict[str, Scheme]) -> None:
        super().__init__()
        self.stored = stored
        # vLLM's module name → the repo's; models with other names than the repo's add theirs.
        self.names = {name: name for name in stored}
        self.kinds = _last_parts(self.names)
        self.mapper = WeightsMapper()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> XpuquantConfig:
        """Raises one line for a wrong version of vLLM, of the kernels, or of the format."""
        versions.check()
        return cls(from_config(config))

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        # The default drops every `g_idx`; here it is a permutation that the layer needs.
        return WeightsMapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.mapper = hf_to_vllm_mapper
        self.names |= {theirs: name for name in self.stored if (theirs := self.mapped(name)) is not None}
        self.kinds = _last_parts(self.names)

    def mapped(self, module: str) -> str | None:
        """vLLM's name of a module of the repo, before layers are fused. It renames tensors: patterns may end in
        `.weight`, as Zamba 2's for adapters do."""
        mapped: str | None = self.mapper.map_name(f"{module}.weight")
        if mapped is None or not mapped.endswith(".weight"):
            mapped = self.mapper.map_name(module)
        return None if mapped is None else mapped.removesuffix(".weight")

    def offered(self, name: str) -> str:
        """The name under which vLLM's model loader, which maps it, finds a stored tensor of the repo."""
        module, _, suffix = name.rpartition(".")
        theirs = self.mapped(module)
        found: str | None = self.mapper.map_name(name)
        return name if theirs is None or found == f"{theirs}.{suffix}" else f"{theirs}.{suffix}"

    def stack_of(self, prefix: str) -> str | None:
        """The repo's name of a stack of experts, by vLLM's; None where it is not quantized."""
        other = (prefix.replace(a, b) for pair in ALIASES for a, b in (pair, pair[::-1]))
        return next((self.names[name] for name in (prefix, *other) if name in self.names), None)

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of an unfused linear, by vLLM's name; None where it is not quantized."""
        return self.stored[self.names[name]] if name in self.names else None

    def members(self, prefix: str) -> list[str]:
        """The layers of the repo that vLLM fuses into `prefix`; itself where it fuses nothing."""
        parent, _, last = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(last) or members_of(last)
        if self.scheme_of(prefix) is not None or not fused:
            return [prefix]
        return [f"{parent}.{member}" if parent else member for member in fused]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """None: vLLM's own, unquantized, for a layer that is no linear."""
        if isinstance(layer, RoutedExperts):
            from xpuquant.vllm.experts import XpuquantExpertsMethod

            name = self.stack_of(prefix)
            return None if name is None else XpuquantExpertsMethod(self.stored[name], prefix, layer.moe_config)
        if isinstance(layer, ParallelLMHead):
            from xpuquant.vllm.linear import XpuquantHeadMethod

            scheme = self.scheme_of(prefix)
            return None if scheme is None else XpuquantHeadMethod(scheme, prefix)
        return self.linear_method(prefix) if isinstance(layer, LinearBase) else None

    def linear_method(self, prefix: str) -> QuantizeMethodBase:
        """The method of a linear by the name that it is asked for under, or its path."""
        schemes = {name: self.scheme_of(name) for name in self.members(prefix)}
        # The dtype of stored scales does not matter: they are cast to the serving dtype while copied.
        kinds = {scheme and replace(scheme, scale_dtype="") for scheme in schemes.values()}
        if len(kinds) > 1:
            from xpuquant.vllm.members import XpuquantMembersMethod

            return XpuquantMembersMethod(schemes, prefix)
        scheme = next(iter(schemes.values()))
        if scheme is None:
            if prefix and self.kinds.isdisjoint(_last_parts([prefix, *schemes])):
                return UnquantizedLinearMethod()
            from xpuquant.vllm.by_path import WaitingMethod

            return WaitingMethod()
        from xpuquant.vllm.linear import XpuquantLinearMethod

        return XpuquantLinearMethod(scheme, prefix)


def _last_parts(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def register() -> None:
    """Idempotent: vLLM calls plugins more than once in one process."""
    from vllm.model_executor.layers import quantization

    if QUANT_METHOD not in quantization.QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(XpuquantConfig)
