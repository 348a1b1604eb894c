"""The Transformers quantizer: `from_pretrained` on a converted repo, every layout, CPU and Intel GPU.

Importing this module registers it; `transformers_autoload` imports it where the user does not.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming

# Not from the package `transformers.quantizers`: this module may be imported while that one still is.
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from xpuquant import layers
from xpuquant.errors import DamagedError, UnsupportedError, one_line
from xpuquant.formats.architecture import ALIASES
from xpuquant.formats.scheme import QUANT_METHOD, Scheme, from_config
from xpuquant.transformers.layers import Quantized, XpuquantExperts, quantized
from xpuquant.xpu_releases import TOP_K

_FIX = "convert again, or download the repo again"


class XpuquantTransformersConfig(QuantizationConfigMixin):
    """`quantization_config` of a converted repo, kept whole for `save_pretrained`."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.stored = {"quant_method": QUANT_METHOD, **kwargs}
        self.modules: dict[str, Scheme] = from_config(self.stored)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> XpuquantTransformersConfig | tuple[XpuquantTransformersConfig, dict[str, Any]]:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        copied: dict[str, Any] = json.loads(json.dumps(self.stored))
        return copied


class XpuquantQuantizer(HfQuantizer):
    """Replaces the modules that the config names; the loader then fills them like any other."""

    requires_calibration = True
    quantization_config: XpuquantTransformersConfig

    def __init__(self, quantization_config: XpuquantTransformersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.own_experts = self.other_experts = False
        self.aliases: dict[str, str] = {}
        self.by_weight: dict[str, str] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Raises UnsupportedError where a module of the config is not in the model, or no XPU kernel computes it."""
        renamings = [r for r in _conversions(model) if isinstance(r, WeightRenaming)]
        found = False
        for stored, scheme in self.quantization_config.modules.items():
            name = self._alias_of(model, self._name_in(model, renamings, stored, scheme), scheme)
            try:
                module = model.get_submodule(name)
            except AttributeError:
                if _unused(model, stored) or _is_beyond_the_last_layer(model, name) or _is_of_another_head(model, name):
                    continue
                raise UnsupportedError(
                    f"{one_line(stored)} is quantized in the repo, but {type(model).__name__} has no such module"
                ) from None
            try:
                model.set_submodule(name, quantized(scheme, module))
            except UnsupportedError as error:
                raise UnsupportedError(f"{one_line(stored)}: {error}") from None
            found = True
            _untie(model, name)
        if self.quantization_config.modules and not found:
            raise UnsupportedError(
                f"{type(model).__name__} has none of the quantized modules of the repo, such as {one_line(stored)}"
            )
        self.other_experts = any(
            not isinstance(m, XpuquantExperts) and any(getattr(p, "ndim", 0) == 3 for p in _first_stacks(m))
            for m in model.modules()
        )
        self.own_experts = any(isinstance(m, XpuquantExperts) for m in model.modules())
        _keep_decays(model)
        self.dtypes = _unquantized_dtypes(model)
        if _is_for_xpu(kwargs.get("device_map")):
            _check_kernels(model)

    def _name_in(self, model: nn.Module, renamings: list[Any], stored: str, scheme: Scheme) -> str:
        """A module's name in this model. Transformers renames tensors: where a pattern ends in `.weight` (Phi-MoE's
        router, DeepSeek-V4's head), those of a quantized module are renamed as that one."""
        name = _found_as(model, _renamed(renamings, stored, _first_tensor(scheme)))
        if not _has(model, name):
            by_weight = _found_as(model, _renamed(renamings, stored, "weight"))
            if _has(model, by_weight):
                self.by_weight[stored] = name = by_weight
        return name

    def _alias_of(self, model: nn.Module, name: str, scheme: Scheme) -> str:
        """The name of a stack of experts in this model, where that has another; its tensors are then renamed so."""
        for pair in ALIASES if scheme.experts and not _has(model, name) else ():
            for old, new in (pair, pair[::-1]):
                if old in name and _has(model, name.replace(old, new)):
                    self.aliases[old] = new
                    return name.replace(old, new)
        return name

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Raises DamagedError, in one line, where a tensor was missing or misshapen: Transformers goes on then."""
        _cast_renamed(model, self.dtypes)
        for name, module in model.named_modules():
            for suffix, stored in module.wanted.items() if isinstance(module, Quantized) else ():
                param: Any = getattr(module, suffix)
                # Set by the loader on what it read; a parameter offloaded to disk is another object, on meta.
                if not (getattr(param, "_is_hf_initialized", False) or param.is_meta):
                    raise DamagedError(f"tensor {one_line(name)}.{suffix} is missing from the repo; {_FIX}")
                if (param.shape, param.dtype) != (stored.shape, stored.dtype):
                    raise DamagedError(
                        f"tensor {one_line(name)}.{suffix} is {param.dtype} {list(param.shape)}, "
                        f"config.json says {stored.dtype} {list(stored.shape)}; {_FIX}"
                    )

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Without those that would take the stacks of experts apart again when the model is saved; with ours."""
        ours = [
            WeightRenaming(source_patterns=re.escape(f"{old}experts."), target_patterns=f"{new}experts.")
            for old, new in self.aliases.items()
        ]
        moved = [
            WeightRenaming(source_patterns=f"^{re.escape(stored)}\\.", target_patterns=f"{name}.")
            for stored, name in self.by_weight.items()
        ]
        if self.other_experts:
            return [*moved, *weight_conversions, *ours]
        stacks = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
        return [*moved, *ours] + [
            c
            for c in weight_conversions
            if not (isinstance(c, WeightConverter) and any(s in t for t in c.target_patterns for s in stacks))
        ]

    def is_serializable(self) -> bool:
        """Not where only some stacks are quantized: Transformers would take either all of them apart, or none."""
        return not (self.own_experts and self.other_experts)

    @property
    def is_trainable(self) -> bool:
        return False


def _renamed(renamings: list[Any], stored: str, suffix: str) -> str:
    """Transformers' name of a module of the repo, by that of one of its tensors: patterns may end in the dot before a
    suffix."""
    name = f"{stored}.{suffix}"
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name.rpartition(".")[0]


def _first_tensor(scheme: Scheme) -> str:
    sizes = (1, 1, 1) if scheme.experts else (1, 1)
    tensors = layers.expert_tensors(scheme, *sizes) if scheme.experts else layers.linear_tensors(scheme, *sizes)
    return next(iter(tensors))


def _conversions(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions: list[Any] = get_model_conversion_mapping(model)
    return conversions


def _first_stacks(module: nn.Module) -> list[Any]:
    """What a module calls as the first matrices of a stack of experts are called."""
    return [module._parameters.get(Scheme("", gated=gated).stacks[0]) for gated in (True, False)]


def _untie(model: Any, name: str) -> None:
    """A head that is stored on its own is not tied to the embeddings, whatever the model's config says."""
    tied = [target for target in model.all_tied_weights_keys if target.rpartition(".")[0] == name]
    for target in tied:
        del model.all_tied_weights_keys[target]
        model.config.get_text_config().tie_word_embeddings = False


def _keep_decays(model: Any) -> None:
    """`A_log` of linear attention and state space layers stays float32, as Qwen3.5 and its like store it.

    Transformers narrows it to the model's dtype in most classes (5.0 to 5.24), although their code computes with it in
    float32, and its exponent is then a decay over the whole context.
    """
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "A_log"}


def _unquantized_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Parameter that is not quantized → the dtype that the model was made with."""
    ours = {f"{name}.{s}" for name, m in model.named_modules() if isinstance(m, Quantized) for s in m.wanted}
    return {name: param.dtype for name, param in model.named_parameters() if name not in ours}


def _cast_renamed(model: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Give parameters the dtype that they have in any other model: Transformers 5.19 leaves those of quantized repos in
    the file's where it renames them, such as Mixtral's router."""
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, param in model.named_parameters():
        wanted = dtypes.get(name, param.dtype)
        is_kept = param.dtype == torch.float32 and any(part in name for part in kept)
        if param.is_floating_point() and param.dtype != wanted and not is_kept and not param.is_meta:
            param.data = param.data.to(wanted)


def _is_for_xpu(device_map: Any) -> bool:
    """Whether some of a model goes to an Intel GPU, by what `from_pretrained` was told: a device, a number or a word of
    Accelerate's for whatever accelerator there is, or a map to such. A model that is moved there later says what is
    wrong at its first forward."""
    for device in device_map.values() if isinstance(device_map, dict) else (device_map,):
        if isinstance(device, int) or device in ("auto", "balanced", "balanced_low_0", "sequential"):
            found = torch.accelerator.current_accelerator()
            if found is not None and found.type == "xpu":
                return True
        elif device is not None and str(device).partition(":")[0] == "xpu":
            return True
    return False


def _check_kernels(model: Any) -> None:
    """Raise EnvironmentFault or UnsupportedError, in one line, for what no kernel of an Intel GPU here computes."""
    from xpuquant.xpu_ops import operators

    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in TOP_K)
    top_k = next((value for value in found if isinstance(value, int)), None)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
    # Experts first: what they lack no installation mends.
    for name, module in modules.items():
        if isinstance(module, XpuquantExperts):
            try:
                module.check_kernel(top_k)
            except UnsupportedError as error:
                raise UnsupportedError(f"{name}: {error}") from None
    if modules:
        operators()


def _found_as(model: Any, name: str) -> str:
    """A module's name in this model. Repos of a base model (`layers.0...`, as embedding models are published) load into
    classes with a head, which keep it in `model.`, and the other way round: Transformers adds or takes that prefix."""
    prefix = f"{model.base_model_prefix}."
    candidates = (name.removeprefix(prefix), prefix + name)
    return next((other for other in candidates if other != name and _has(model, other)), name)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _is_of_another_head(model: nn.Module, name: str) -> bool:
    """Whether a module is beside what the model's class has: a language model's head, in the class without one.
    Transformers lists its tensors among those that it did not use, as of the unquantized model."""
    top = name.partition(".")[0]
    return top not in dict(model.named_children()) and top != getattr(model, "base_model_prefix", "")


def _is_beyond_the_last_layer(model: Any, name: str) -> bool:
    """A layer after those that the config counts: multi-token prediction, which engines with the code for it use.
    Transformers leaves such layers out."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        parts = candidate.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        stack = None if first is None else ".".join(parts[:first])
        if first is None or not stack or not _has(model, stack):
            continue
        layers: Any = model.get_submodule(stack)
        if isinstance(layers, nn.ModuleList) and len(layers) == model.config.get_text_config().num_hidden_layers:
            return int(parts[first]) >= len(layers)
    return False


def _unused(model: nn.Module, name: str) -> bool:
    """Whether Transformers leaves this part of a checkpoint out on purpose (multi-token prediction layers)."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, f"{name}.weight") for pattern in patterns)


def _register() -> None:
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(XpuquantTransformersConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(XpuquantQuantizer)


_register()
