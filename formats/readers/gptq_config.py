"""What the config of a GPTQ checkpoint says about one module. Tensors overrule all of it but the zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xpuquant.errors import UnsupportedError, UsageError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers.patterns import matches

_V1, _V2, _PLANAR = "gptq", "gptq_v2", "gptq_p"
_ROTATIONS = ("rotation", "rotation_config", "spinquant_config")


@dataclass(frozen=True)
class GptqConfig:
    """bits, group_size (-1: one group of K), sym (None: not said), desc_act; zeros_minus_one: the label says v1;
    planar: bit planes; writer: `auto-round`, `gptqmodel`, or empty where the config does not say."""

    bits: int
    group_size: int
    sym: bool | None
    desc_act: bool
    zeros_minus_one: bool
    planar: bool
    writer: str


def gptq_config(checkpoint: Checkpoint, module: str) -> GptqConfig:
    """The config's claims about `module`, `dynamic` overrides applied.

    Raises:
        UnsupportedError: another packing under GPTQ's tensor names.
        UsageError: a value of the wrong type.
    """
    config = checkpoint.quantization
    check_no_rotation(config)
    if _number(config, "pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise UnsupportedError(f"pack_dtype is {config['pack_dtype']!r}; only int32 words are known")
    label = _label(config)
    merged = overridden(config, module)
    return GptqConfig(
        bits=integer(merged, ("bits", "w_bit", "wbits"), 4),
        group_size=integer(merged, ("group_size", "q_group_size"), -1),
        sym=symmetry(merged),
        desc_act=bool(merged.get("desc_act", False)),
        zeros_minus_one=label == _V1,
        planar=label == _PLANAR,
        writer=_writer(config),
    )


def check_no_rotation(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError where the activations would have to be rotated at run time."""
    for key in _ROTATIONS:
        if config.get(key):
            raise UnsupportedError(f"the config asks for an online rotation ('{key}'), which no kernel here applies")


def overridden(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The config with what it says about one module (`dynamic`, AutoRound's `extra_config`) laid over it."""
    from xpuquant.formats.readers.autoround import module_overrides

    return {**config, **_dynamic(config.get("dynamic"), module), **module_overrides(config, module)}


def _writer(config: Mapping[str, Any]) -> str:
    """Who packed the file: writers differ in how they store a zero point of 0 minus one."""
    if "round" in str(config.get("quant_method", "")).lower() or config.get("autoround_version"):
        return "auto-round"
    meta = config.get("meta")
    quantizer = str(meta.get("quantizer") if isinstance(meta, Mapping) else "").lower()
    if "round" in quantizer or "round" in str(config.get("provider", "")).lower():
        return "auto-round"
    return "gptqmodel" if "gptqmodel" in quantizer else ""


def _label(config: Mapping[str, Any]) -> str:
    if config.get("is_marlin_format"):
        raise UnsupportedError("the tensors are in Marlin's tile order (is_marlin_format)")
    if "round" in str(config.get("quant_method", "")).lower():
        from xpuquant.formats.readers.autoround import gptq_label

        return gptq_label(config)
    label = str(config.get("checkpoint_format") or config.get("format") or _V1).lower()
    if label not in (_V1, _V2, _PLANAR):
        raise UnsupportedError(f"checkpoint_format '{label}' is not known; known: gptq, gptq_v2, gptq_p")
    return label


def _dynamic(rules: Any, module: str) -> Mapping[str, Any]:
    """GPTQModel's per-module overrides: `-:regex` (not quantized) first, then the first `+:regex` that matches.
    A module that is quantized after all is what its tensors say, so negative rules override nothing."""
    if not isinstance(rules, Mapping):
        return {}
    for rule, override in rules.items():
        pattern = rule.removeprefix("+:")
        if rule.startswith("-:") or not isinstance(override, Mapping):
            continue
        if matches(pattern, module):
            return override
    return {}


def symmetry(config: Mapping[str, Any]) -> bool | None:
    """`sym`, or AWQ's `zero_point` negated; None where the config does not say."""
    if isinstance(config.get("sym"), bool | int):
        return bool(config["sym"])
    if isinstance(config.get("zero_point"), bool):
        return not config["zero_point"]
    return None


def _number(config: Mapping[str, Any], key: str, default: str) -> str:
    return str(config.get(key) or default)


def integer(config: Mapping[str, Any], keys: tuple[str, ...], default: int) -> int:
    """The first of `keys` that the config has. Raises UsageError where it is no number."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"config: '{key}' is {value!r}, want a number")
        return value
    return default
