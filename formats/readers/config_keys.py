"""What several formats ask of a quantization config: a number, symmetric or not, what is said of one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xpuquant.errors import UsageError
from xpuquant.formats.readers.autoround import module_overrides
from xpuquant.formats.readers.patterns import matches


def overridden(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The config as it is for one module: GPTQModel's `dynamic` and AutoRound's `extra_config` overrule the rest. Where
    they say nothing of it, the very config."""
    dynamic, extra = _dynamic(config.get("dynamic"), module), module_overrides(config, module)
    return {**config, **dynamic, **extra} if dynamic or extra else config


def integer(config: Mapping[str, Any], keys: tuple[str, ...], default: int) -> int:
    """The value of the first of `keys` that the config has. Raises UsageError where it is no whole number."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"config: '{key}' is {value!r}, want a number")
        return value
    return default


def flag(config: Mapping[str, Any], key: str) -> bool:
    """A value that is true or false, in whatever way it is spelt (`"False"`); false where there is none."""
    value = config.get(key)
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)


def symmetry(config: Mapping[str, Any]) -> bool | None:
    """`sym`, or AWQ's `zero_point` negated; None where the config does not say."""
    if isinstance(config.get("sym"), bool | int):
        return bool(config["sym"])
    if isinstance(config.get("zero_point"), bool):
        return not config["zero_point"]
    return None


def _dynamic(rules: Any, module: str) -> Mapping[str, Any]:
    """What GPTQModel's `dynamic` says of a module: the value of the first `regex` or `+:regex` that matches its name.

    `-:regex` stands for modules that are not quantized. One that has quantized tensors all the same is what they say.
    """
    if not isinstance(rules, Mapping):
        return {}
    for rule, override in rules.items():
        if rule.startswith("-:") or not isinstance(override, Mapping):
            continue
        if matches(rule.removeprefix("+:"), module):
            return override
    return {}
