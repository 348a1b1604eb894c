"""What the config of a GPTQ checkpoint says about one module. Tensors overrule all of it but the zero points."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from xpuquant.errors import UnsupportedError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers.autoround import Itself, gptq_label
from xpuquant.formats.readers.config_keys import flag, integer, overridden, symmetry
from xpuquant.values import frozen

_V1, _V2, _PLANAR = "gptq", "gptq_v2", "gptq_p"


_ENGINES_NAMES = ("marlin", "moe_wna16", "moe-wna16")
"""Values of `quant_method` that are vLLM's kernels for GPTQ."""


@frozen
class GptqConfig:
    """What the config says of one module.

    group_size       columns of K per scale; -1 for one group of all
    sym              None where the config does not say
    zeros_minus_one  the label is v1: zero points are stored minus one; None where the config is another format's
    planar           the label is GPTQModel's planar packing
    writer           `auto-round`, `gptqmodel`, or empty where the config does not say
    """

    bits: int
    group_size: int
    sym: bool | None
    desc_act: bool
    zeros_minus_one: bool | None
    planar: bool
    writer: str


def gptq_config_of(checkpoint: Checkpoint, module: str) -> GptqConfig:
    """The config's claims about `module`, `dynamic` overrides applied.

    Raises:
        UnsupportedError: another packing under GPTQ's tensor names.
        UsageError: a value of the wrong type.
    """
    config = checkpoint.quantization
    of_module = overridden(config, module)
    return _claims(Itself(config), None if of_module is config else Itself(of_module))


@lru_cache(64)
def _claims(whole: Itself, of_module: Itself | None) -> GptqConfig:
    """What a config says, and what it says of one module: for nearly all modules the same, which is None."""
    config = whole.table
    merged = config if of_module is None else of_module.table
    if str(config.get("pack_dtype") or "int32") not in ("int32", "torch.int32"):
        raise UnsupportedError(f"pack_dtype is {config['pack_dtype']!r}; only int32 words are known")
    label = _label(config)
    return GptqConfig(
        bits=integer(merged, ("bits", "w_bit", "wbits"), 4),
        group_size=integer(merged, ("group_size", "q_group_size"), -1),
        sym=symmetry(merged),
        desc_act=flag(merged, "desc_act"),
        zeros_minus_one=None if label is None else label == _V1,
        planar=label == _PLANAR,
        writer=_writer(config),
    )


def _writer(config: Mapping[str, Any]) -> str:
    """Who packed the file: writers differ in how they store a zero point of 0 minus one."""
    if _is_autoround(config) or config.get("autoround_version"):
        return "auto-round"
    meta = config.get("meta")
    quantizer = str(meta.get("quantizer") if isinstance(meta, Mapping) else "").lower()
    if "round" in quantizer or "round" in str(config.get("provider", "")).lower():
        return "auto-round"
    return "gptqmodel" if "gptqmodel" in quantizer else ""


def _label(config: Mapping[str, Any]) -> str | None:
    """`gptq`, `gptq_v2` or `gptq_p`; None of a config that another format announces and that names none of them."""
    if config.get("is_marlin_format"):
        raise UnsupportedError("the tensors are in Marlin's tile order (is_marlin_format)")
    if _is_autoround(config):
        return gptq_label(config)
    method = str(config.get("quant_method") or "gptq").lower()
    if "gptq" not in method and method not in _ENGINES_NAMES and not config.get("checkpoint_format"):
        return None
    label = str(config.get("checkpoint_format") or config.get("format") or _V1).lower()
    if label not in (_V1, _V2, _PLANAR):
        raise UnsupportedError(f"checkpoint_format '{label}' is not known; known: gptq, gptq_v2, gptq_p")
    return label


def _is_autoround(config: Mapping[str, Any]) -> bool:
    """`inc` is vLLM's name of AutoRound."""
    method = str(config.get("quant_method", "")).lower()
    return "round" in method or method == "inc"
