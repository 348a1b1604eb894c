"""What a loader must know about one converted module: the `quantization_config` part of the contract.

`config.json` of a converted repo holds

    "quantization_config": {
      "quant_method": "xpuquant", "format_version": 1, "layout": "xpu",
      "schemes": [{"layout": "int4_linear", "group_size": 64, "symmetric": true, ...,
                   "modules": ["model.layers.{0-31}.self_attn.q_proj", ...]}]}

A module not named is not quantized. Names are exact: `{0-31}` and `{0,2,5-7}` stand for decimal
numbers, nothing else is a pattern, so that `mlp.gate` can never hit `mlp.gate_up_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from xpuquant.errors import DamagedError, shown
from xpuquant.values import frozen

QUANT_METHOD = "xpuquant"
FORMAT_VERSIONS = (1, 2)
"""Those that are read. A repo is written in the oldest that has all of its layouts: older releases read what they can,
and refuse the rest in one line."""

_SINCE_2 = frozenset(
    {"int8_linear", "uint4_experts", "int8_experts", "fp8_channel_experts", "nvfp4_linear", "nvfp4_experts"}
)
"""Layouts that version 1 does not have. Nor has it experts without a gate."""

MAX_MODULES = 1_000_000
"""Modules that a config may name."""

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
"""safetensors labels of the fp8 codes that kernels take."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@frozen(order=True)
class Scheme:
    """How one module is stored. Notation: weight `[N, K]` = [out, in].

    layout       the on-disk contract, defined in `formats/layouts/`: `int4_linear`, `int4_experts`, `fp8_linear`,
                 `fp8_experts`, `mxfp4_linear`, `mxfp4_experts`, `mxfp8_linear`, `mxfp8_experts`, `int8_linear`,
                 `uint4_experts`, `int8_experts`, `fp8_channel_experts`, `nvfp4_linear`, `nvfp4_experts`
    granularity  what one scale covers: `group` (along K), `tensor`, `channel` (one per n), `block`
    group_size   elements of K per scale (`group`, and the K side of `block`); 0 otherwise
    block_n      rows of N per scale (`block`); 0 otherwise
    scale_dtype  safetensors label of the stored scales (`U8` holds E8M0 exponents)
    symmetric    False: the true zero points are stored too, in `qzeros` (int4 linear) or, for each stack of experts,
                 in `gate_up_proj_zero_point` and `down_proj_zero_point`. int8 linears have `qzeros` in any case
    act_order    True: a `g_idx` tensor holds the permutation to apply to the activations
    input_scale  True: a static activation scale is stored (fp8 linear only)
    bias         True: experts carry `gate_up_proj_bias` and `down_proj_bias`
    interleaved  True: rows of `gate_up_proj` alternate gate, up (gpt-oss); False: all gate, then all up
    gated        False: experts have no gate, and a stack `up_proj` in the place of `gate_up_proj`; not written where it
                 is True
    weight_dtype safetensors label of the stored codes (fp8 and mxfp8 layouts only); not written where it is
                 F8_E4M3, as nearly every checkpoint has it
    divides      True: the global scale is a divisor, not a factor (NVFP4 layouts only); not written where False
    """

    layout: str
    granularity: str = "group"
    group_size: int = 0
    block_n: int = 0
    scale_dtype: str = "BF16"
    symmetric: bool = True
    act_order: bool = False
    input_scale: bool = False
    bias: bool = False
    interleaved: bool = False
    weight_dtype: str = "F8_E4M3"
    divides: bool = False
    gated: bool = True

    @property
    def stacks(self) -> tuple[str, str]:
        """Of experts: the names of the stack of their first matrices and of their second."""
        return ("gate_up_proj" if self.gated else "up_proj"), "down_proj"

    @property
    def experts(self) -> bool:
        """Whether the module is a stack of experts (3-D tensors) rather than one linear."""
        return self.layout.endswith("_experts")

    def label(self) -> str:
        """A short name for tables: `int4_linear g64 asymmetric act-order`."""
        size = {"group": f"g{self.group_size}", "block": f"{self.block_n}x{self.group_size}"}
        words = [self.layout, size.get(self.granularity, self.granularity)]
        words += ["asymmetric"] * (not self.symmetric) + ["act-order"] * self.act_order
        words += ["no-gate"] * (not self.gated)
        words += ["e5m2"] * (self.weight_dtype == "F8_E5M2") + ["interleaved"] * self.interleaved
        return " ".join(words)


ARK_LAYOUTS = ("uint4_experts", "int8_experts", "fp8_channel_experts", "nvfp4_experts")
"""Experts that ARK computes. The others are those of `XpuFusedMoe`."""

ARK_MULTIPLE = 32
"""What N and K of an expert's matrix are multiples of where it is given to ARK. Its own checks want 16 of N and whole
groups of K (`_validate_moe_quant_args` in auto_round_kernel 0.16); but its products of 16 bits, to which prefill widens
a stack, step through K by 32 (`sycl_tla_moe.hpp`), and what they do with half a step was never executed. Rows of one
matrix are columns of the other."""


def expand(pattern: str) -> list[str]:
    """All names a compact exact pattern stands for, in order.

    >>> expand("layers.{0-1}.mlp.{7}")
    ['layers.0.mlp.7', 'layers.1.mlp.7']
    """
    names = [""]
    for literal, braced in re.findall(r"([^{}]+)|\{([^{}]*)\}", pattern):
        if literal:
            names = [name + literal for name in names]
            continue
        numbers: list[int] = []
        for part in braced.split(","):
            low, dash, high = part.partition("-")
            if not _NUMBER.fullmatch(low) or (dash and not _NUMBER.fullmatch(high)):
                raise DamagedError(f"'{{{braced}}}' in '{pattern}' is not a list of numbers")
            first, last = int(low), int(high or low)
            if len(names) * (len(numbers) + last - first + 1) > MAX_MODULES:
                raise DamagedError(f"'{pattern}' stands for too many modules")
            numbers += range(first, last + 1)
        names = [f"{name}{number}" for name in names for number in numbers]
    return names


def compact(names: Iterable[str]) -> list[str]:
    """The fewest-lines list of patterns for `names`; `expand` over it gives exactly `names` back.

    Only the first number of a name is folded (the layer): one pattern per kind of module.
    """
    families: dict[tuple[str, str], list[int]] = {}
    patterns: list[str] = []
    for name in names:
        match = re.match(r"(.*?(?:^|\.))(0|[1-9][0-9]{0,8})((?:\.|$).*)", name)
        if match is None:
            patterns.append(name)
        else:
            families.setdefault((match[1], match[3]), []).append(int(match[2]))
    for (head, tail), numbers in families.items():
        if len(set(numbers)) == 1:
            patterns.append(f"{head}{numbers[0]}{tail}")
            continue
        patterns.append(f"{head}{{{_ranges(sorted(set(numbers)))}}}{tail}")
    return sorted(patterns)


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def format_version(schemes: Iterable[Scheme]) -> int:
    """The version that a repo with these schemes is written in."""
    return 2 if any(scheme.layout in _SINCE_2 or not scheme.gated for scheme in schemes) else 1


def to_config(modules: Mapping[str, Scheme], producer: str) -> dict[str, Any]:
    """`quantization_config` for `modules` (output module name → scheme)."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in modules.items():
        by_scheme.setdefault(scheme, []).append(name)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": format_version(by_scheme),
        "layout": "xpu",
        # vLLM reads `producer` of every quantized model and expects a mapping with a name.
        "producer": {"name": producer},
        "schemes": [{**_written(scheme), "modules": compact(names)} for scheme, names in sorted(by_scheme.items())],
    }


def _written(scheme: Scheme) -> dict[str, Any]:
    keys = asdict(scheme)
    # Later keys: readers that do not know one can read every repo that does not need it.
    for later in ("weight_dtype", "gated", "divides"):
        if keys[later] == getattr(Scheme, later):
            del keys[later]
    return keys


def from_config(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """Module name → scheme, from a converted repo's `quantization_config`.

    Raises:
        DamagedError: not ours, written by a newer format, or naming a module twice.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise DamagedError(f"quant_method is {config.get('quant_method')!r}, not {QUANT_METHOD!r}")
    version = config.get("format_version")
    if version not in FORMAT_VERSIONS:
        raise DamagedError(
            f"the repo has format_version {version!r}, this xpuquant reads {FORMAT_VERSIONS[0]} to "
            f"{FORMAT_VERSIONS[-1]}: "
            "pip install -U xpuquant, or convert again"
        )
    modules: dict[str, Scheme] = {}
    for entry in _listed(config, "schemes", dict):
        scheme = _scheme(entry)
        for pattern in _listed(entry, "modules", str):
            for name in expand(pattern):
                if name in modules:
                    raise DamagedError(f"quantization_config names '{name}' twice")
                modules[name] = scheme
            if len(modules) > MAX_MODULES:
                raise DamagedError(f"quantization_config names more than {MAX_MODULES} modules")
    return modules


def _listed(table: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = table.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise DamagedError(f"quantization_config: '{key}' is {shown(values)}, want a list")
    return values


def _scheme(entry: Mapping[str, Any]) -> Scheme:
    known = {field.name: type(field.default) for field in fields(Scheme) if field.name != "layout"} | {"layout": str}
    for key, value in entry.items():
        if key == "modules":
            continue
        if key not in known:
            raise DamagedError(f"quantization_config: unknown scheme key {shown(key)}")
        if type(value) is not known[key] or (type(value) is int and value < 0):
            raise DamagedError(f"quantization_config: '{key}' is {shown(value)}")
    if "layout" not in entry:
        raise DamagedError("quantization_config: a scheme without a layout")
    scheme = Scheme(**{key: value for key, value in entry.items() if key != "modules"})
    if scheme.granularity in ("group", "block") and not scheme.group_size:
        raise DamagedError(f"quantization_config: scheme {shown(scheme.label())} has no group_size")
    if scheme.granularity == "block" and not scheme.block_n:
        raise DamagedError(f"quantization_config: scheme {shown(scheme.label())} has no block_n")
    if scheme.weight_dtype not in FP8_DTYPES:
        raise DamagedError(f"quantization_config: 'weight_dtype' is {shown(scheme.weight_dtype)}")
    return scheme
