"""What several formats ask of a quantization config: a number, symmetric or not, what is said of one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xpuquant.errors import UsageError, shown
from xpuquant.formats.readers.autoround import module_overrides
from xpuquant.formats.readers.patterns import matches
from xpuquant.formats.readers.spellings import number_said, truth


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
        number = number_said(value)
        if number is None:
            raise UsageError(f"config: '{key}' is {shown(value)}, want a number")
        return number
    return default


def flag(config: Mapping[str, Any], key: str) -> bool:
    """A value that is true or false, in whatever way it is spelt (`"False"`); false where there is none."""
    return bool(truth(config.get(key)))


def symmetry(config: Mapping[str, Any]) -> bool | None:
    """`sym`, or AWQ's `zero_point` negated; None where the config does not say."""
    symmetric, zero_point = truth(config.get("sym")), truth(config.get("zero_point"))
    return symmetric if symmetric is not None or zero_point is None else not zero_point


def _dynamic(rules: Any, module: str) -> Mapping[str, Any]:
    """What GPTQModel's `dynamic` says of a module: the value of the first `regex` or `+:regex` that matches its name.

    `-:regex` stands for modules that are not quantized. One that has quantized tensors all the same is what they say.
    """
    if not rules or not isinstance(rules, Mapping):
        return {}
    for rule, override in rules.items():
        if rule.startswith("-:") or not isinstance(override, Mapping):
            continue
        if matches(rule.removeprefix("+:"), module):
            return override
    return {}
