"""What an AutoRound config means. Its tensors are GPTQ's, AWQ's or compressed-tensors'; their readers read them.

The key that names the packing moved and its values changed meaning between releases (auto_round/export/,
auto_round/inference/backend.py, tags v0.2 to v0.16.1):

    0.2            backend         gptq:exllamav2             zero points minus one
    0.3.0          backend         auto_round:exllamav2       true
    0.3.1 - 0.4.7  backend         auto_round:gptq:exllamav2  minus one; asymmetric auto_round:exllamav2, true
    from 0.5       packing_format  auto_round:auto_gptq       minus one
                                   auto_round:gptqmodel       true, with g_idx
                                   auto_round[:...]           true
                                   auto_round:auto_awq        AWQ's tensors
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from xpuquant.errors import UnsupportedError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers.base import Parts
from xpuquant.formats.readers.patterns import check_count, searches
from xpuquant.formats.readers.spellings import number_said, truth
from xpuquant.formats.weights.base import Weight

AUTOROUND_METHODS = frozenset({"auto-round", "autoround", "inc"})

_MODEL_FREE_MENDED = (0, 16)
_UNQUANTIZED_BITS = 16
_METACHARACTERS = re.compile(r"[][\\^$*+?(){}|]")


def packing(config: Mapping[str, Any]) -> str:
    """The packing a config names, lower case, whichever key holds it. `auto_round:auto_gptq` where none does, as
    AutoRound itself assumes.

    Raises:
        UnsupportedError: a packing that is no quantized storage, or another library's.
    """
    named = str(config.get("packing_format") or "").lower()
    if not named:
        # From 0.5 on `backend` is a wish for inference ("auto"); before, it was the packing.
        backend = str(config.get("backend") or "").lower()
        named = backend if "round" in backend or backend.startswith(("gptq", "awq")) else "auto_round:auto_gptq"
    if "fake" in named:
        raise UnsupportedError(f"packing_format '{named}' is fake quantization: rounded weights stored as floats")
    if "mlx" in named:
        raise UnsupportedError(f"packing_format '{named}' is Apple MLX's layout")
    return named


def gptq_label(config: Mapping[str, Any]) -> str:
    """`gptq` (zero points minus one) or `gptq_v2` (true) for GPTQ tensors under an AutoRound config.

    Raises:
        UnsupportedError: the packing is not GPTQ's, or its zero points cannot be told.
    """
    named = packing(config)
    if "gptqmodel" in named:
        return "gptq_v2"
    if "gptq" in named:
        return "gptq"
    if "awq" in named:
        raise UnsupportedError(f"packing_format '{named}' is AWQ's, the tensors are GPTQ's")
    # Model-free exports before 0.16 subtracted one whatever they declared (utils/missing_tensors.py,
    # quantize_weight_rtn); AutoRound's own loader decodes them wrongly.
    if config.get("model_free") and not truth(config.get("sym", True)):
        version = _version(config.get("autoround_version"))
        if version is None:
            raise UnsupportedError(
                "asymmetric model-free AutoRound files have true zero points from 0.16 on and zero points minus "
                "one before; the config has no autoround_version to tell"
            )
        return "gptq" if version < _MODEL_FREE_MENDED else "gptq_v2"
    return "gptq_v2"


def module_overrides(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """`extra_config`'s keys for one module: its exact name, its name without leading parts, then the first key that
    matches anywhere as a regular expression, as AutoRound's loader has it.

    Entries that say 16 bits are skipped: a module that is quantized after all was matched by accident
    (`.*mlp.gate.*`, meant for the router, also matches `mlp.gate_proj`).
    """
    extra = config.get("extra_config")
    if not extra or not isinstance(extra, Mapping):
        return {}
    rest = module
    while rest:
        if _quantizes(extra.get(rest)):
            return dict(extra[rest])
        _, _, rest = rest.partition(".")
    for key in _patterns(Itself(extra)):
        if searches(key, module) and _quantizes(extra[key]):
            return dict(extra[key])
    return {}


def _quantizes(override: Any) -> bool:
    if not isinstance(override, Mapping):
        return False
    bits = number_said(override.get("bits"))
    return bits is None or bits < _UNQUANTIZED_BITS


class Itself:
    """A config or a part of one as a key of caches, equal to itself alone: a mixed-bit MoE lists tens of thousands of
    keys, and is asked for each module."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.table = table

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other.table is self.table

    def __hash__(self) -> int:
        return id(self.table)


@lru_cache(maxsize=8)
def _patterns(keys: Itself) -> tuple[str, ...]:
    """Keys to be searched for. A plain name with a layer number in it is one module's name, and not meant to match
    another."""
    found = tuple(key for key in keys.table if _METACHARACTERS.search(key) or not any(map(str.isdigit, key)))
    check_count("extra_config", len(found))
    return found


def _version(text: Any) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", str(text or ""))
    return (int(match[1]), int(match[2])) if match else None


class AutoRound:
    """Announces AutoRound's `quant_method`s, and claims the one layout that is AutoRound's alone among those it can
    write: MLX's, to refuse it by name."""

    name = "auto-round"
    methods = AUTOROUND_METHODS
    suffixes = frozenset({"scales", "biases"})

    def claims(self, parts: Parts) -> bool:
        return "biases" in parts and "scales" in parts and parts.get("weight", parts["scales"]).dtype == "U32"

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        raise UnsupportedError("weight U32 with scales and biases is Apple MLX's layout")
