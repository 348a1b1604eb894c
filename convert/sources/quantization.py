"""Where a checkpoint says how it is quantized: config.json, at whatever depth, or a file beside it.

config.json             quantization_config         Transformers, vLLM, every current producer
                        compression_config          llm-compressor before its name was quantization_config
                        text_config, llm_config, language_config, thinker_config, ...: the same keys inside the part
                        that was quantized (InternVL, Kimi, Qwen-Omni); at any depth
                        quantization                MLX
quantize_config.json    AutoGPTQ, GPTQModel
quant_config.json       AutoAWQ
quantization_config.json  AutoRound
hf_quant_config.json    ModelOpt: {"producer": ..., "quantization": {"quant_algo": ...}}, beside a config.json without a
                        word of it in older exports (vLLM, weight_utils.py, `get_quant_config`)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from xpuquant.errors import DamagedError, UsageError, one_line
from xpuquant.formats.readers.spellings import same

QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
"""Files beside config.json that are read."""

_OTHER_QUANTIZATION_FILE = re.compile(r"[\w.-]*quant[\w.-]*config[\w.-]*\.json", re.I)
_KEYS = ("quantization_config", "compression_config")
_DECISIVE = (
    "quant_method",
    "bits",
    "group_size",
    "sym",
    "zero_point",
    "desc_act",
    "checkpoint_format",
    "packing_format",
    "format",
    "quant_algo",
    "weight_block_size",
)
"""Keys that change what tensors mean: two configs that differ in one describe different checkpoints."""


def describes_quantization(name: str) -> bool:
    """Whether a file of the root tells how the source is quantized: no loader of the output may find it."""
    return name in QUANTIZATION_FILES or _OTHER_QUANTIZATION_FILE.fullmatch(name) is not None


def quantization_config(
    config: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """The quantization config, from the places producers put it, and notes where they disagree.

    config.json first (at the top, then inside its parts), then the files beside it. Files written by GPTQModel keep the
    order of `dynamic` rules, which config.json (sorted keys) does not.

    Args:
        others: file of `QUANTIZATION_FILES` → what it holds.

    Raises:
        DamagedError: a quantization config that is not an object.
        UsageError: two parts of config.json that say different things, and no word of it at the top.
    """
    notes: list[str] = []
    merged = _inside(config, notes)
    for name, content in others.items():
        other = _flattened(content)
        if not _describe_one(merged, other):
            said = merged["quant_method"]
            notes.append(one_line(f"{name} describes another quantization than config.json ({said!r}): ignored"))
            continue
        for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format"):
            if key in merged and key in other and not same(merged[key], other[key]):
                notes.append(one_line(f"config.json says {key}={merged[key]!r}, {name} says {other[key]!r}"))
        if isinstance(other.get("dynamic"), dict):
            merged["dynamic"] = other["dynamic"]
        merged = {**other, **merged}
    if merged and not merged.get("quant_method"):
        method = _implied_method(merged, bool(others))
        if method:
            merged["quant_method"] = method
    return merged, notes


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without a word of the source's quantization, at any depth, nor of the files its weights lie in."""
    bare = _bare(config)
    assert isinstance(bare, dict), "a config is an object"
    bare.pop("transformers_weights", None)
    if _is_mlx(bare.get("quantization")):
        del bare["quantization"]
    return bare


def _bare(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _bare(member) for key, member in value.items() if key not in _KEYS}
    return [_bare(member) for member in value] if isinstance(value, list) else value


def _inside(config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    found = list(_places(config))
    for place, value in found:
        if value and not isinstance(value, Mapping):
            raise DamagedError(f"config.json: {place} is not an object")
    told = [(place, value) for place, value in found if value]
    if not told:
        mlx = config.get("quantization")
        return dict(mlx) if isinstance(mlx, Mapping) and _is_mlx(mlx) else {}
    first, chosen = told[0]
    for place, value in told[1:]:
        key = next((k for k in _DECISIVE if k in chosen and k in value and not same(chosen[k], value[k])), None)
        if key is None:
            continue
        said = one_line(
            f"config.json says {key}={chosen[key]!r} in {first} and {value[key]!r} in {place}",
        )
        if "." in first:
            raise UsageError(f"{said}; keep the one that describes the weights, at the top")
        notes.append(f"{said}: the first is taken, as loaders do")
    return dict(chosen)


def _places(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted place, value) of each quantization config, the outermost first."""
    level: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while level:
        below: list[tuple[str, Mapping[str, Any]]] = []
        for place, table in level:
            for key in _KEYS:
                if key in table:
                    yield f"{place}{key}", table[key]
            for key, member in table.items():
                if key in _KEYS:
                    continue
                members = member if isinstance(member, list) else [member]
                below += [(f"{place}{key}.", inner) for inner in members if isinstance(inner, Mapping)]
        level = below


def _flattened(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, without the object that some producers wrap it in."""
    for key in _KEYS:
        if isinstance(content.get(key), Mapping):
            return dict(content[key])
    inner = content.get("quantization")
    if isinstance(inner, Mapping):
        around = {key: value for key, value in content.items() if key != "quantization"}
        return {**around, "quant_method": "modelopt", **inner}
    return dict(content)


_INTEGERS = ("gptq", "awq", "round")


def _describe_one(merged: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a file beside config.json is of the same quantization: folders are quantized again, and keep old files.
    Files of GPTQ, AWQ and AutoRound are often written by one for another."""
    said = str(merged.get("quant_method") or "").lower()
    if not said or not other:
        return True
    theirs = str(other.get("quant_method") or _implied_method(other, True)).lower()
    families = [[name for name in _INTEGERS if name in method] or [method[:8]] for method in (said, theirs)]
    return families[0] == families[1] or all(family[0] in _INTEGERS for family in families)


def _implied_method(merged: Mapping[str, Any], from_file: bool) -> str:
    if "quant_algo" in merged:
        return "modelopt"
    if "config_groups" in merged:
        return "compressed-tensors"
    if "load_in_4bit" in merged or "load_in_8bit" in merged:
        return "bitsandbytes"  # before quant_method had been thought of (Transformers 4.30 to 4.32)
    if not from_file:
        return ""
    return "awq" if "zero_point" in merged or str(merged.get("version")).lower() == "gemm" else "gptq"


def _is_mlx(value: Any) -> bool:
    return isinstance(value, Mapping) and "bits" in value and "group_size" in value
