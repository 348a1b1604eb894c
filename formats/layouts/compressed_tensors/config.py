"""The `quantization_config` of a compressed-tensors checkpoint, as this tool writes it and reads it back.

Only keys that releases 0.13 to 0.20 all know are written, since their parsers reject others. Which modules a group
means is read in two ways: the library (utils/match.py) takes exact names, then regexes, then class names; vLLM
(compressed_tensors/utils.py) the first equal name or regex in the order of the config, asked for `q_proj` as well as
for the fused `qkv_proj`, then class names. So where all modules share a scheme the target is `Linear` and every
unquantized matrix is ignored by its exact name; otherwise targets are exact names, which vLLM also translates to its
own, and for the experts of a layer regexes that match nothing else in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from xpuquant.errors import DamagedError, shown
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.checkpoint import COMPRESSED_TENSORS
from xpuquant.formats.readers.patterns import matches
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import Scheme
from xpuquant.values import frozen

FAMILY = "compressed-tensors"
VERSION = "0.16.0"
"""The oldest release that reads every format below as it is meant: MXFP4 with its bias mended, MXFP8; and before those
(0.17.1 to 0.18) whose producers cut gpt-oss's gate and up rows in halves, which readers tell by this number."""

_INTS = {4: "ct_int4", 8: "ct_int8"}
_FORMATS = {
    "pack-quantized": tuple(_INTS.values()),
    "float-quantized": ("ct_fp8",),
    "naive-quantized": ("ct_fp8",),
    "mxfp4-pack-quantized": ("ct_mxfp4",),
    "mxfp8-quantized": ("ct_mxfp8",),
}
"""The library's names of storage formats → layouts that are stored so."""
_ACTIVATIONS = re.compile(r"(int|float)(\d+) (tensor|token|group)(\d*) (static|dynamic)")


class Shaped(Protocol):
    """A tensor of the source or of the output."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@frozen(order=True)
class CtScheme(Scheme):
    """How one module is stored as compressed-tensors.

    activations  how a serving engine is to quantize them, e.g. `float8 token dynamic`; empty for 16 bits
    """

    activations: str = ""

    @property
    def format(self) -> str:
        """The library's name of the storage format."""
        if self.layout == "ct_fp8":
            return "float-quantized" if self.activations else "naive-quantized"
        return next(name for name, layouts in _FORMATS.items() if self.layout in layouts)

    def label(self) -> str:
        label = super().label().replace(self.layout, f"{self.format} {self.layout.removeprefix('ct_')}", 1)
        return label if not self.activations else f"{label}, activations {self.activations}"


def activation_words(args: Any) -> str:
    """`CtScheme.activations` of an `input_activations` table; empty where there is none or it is not known."""
    if not isinstance(args, Mapping):
        return ""
    size = args.get("group_size")
    words = f"{args.get('type', 'int')}{args.get('num_bits', 8)} {args.get('strategy') or 'tensor'}"
    words += f"{size if isinstance(size, int) and size > 0 else ''} {'dynamic' if args.get('dynamic') else 'static'}"
    return words if _ACTIVATIONS.fullmatch(words) else ""


def to_ct_config(modules: Mapping[str, CtScheme], plain: Iterable[Shaped], source: Mapping[str, Any]) -> dict[str, Any]:
    """The config for `modules` (name → scheme).

    Args:
        plain: the tensors that are not quantized.
        source: the source's own quantization config: a compressed-tensors one may ignore modules under names that no
            tensor has, and describe the KV cache.
    """
    groups: dict[CtScheme, list[str]] = {}
    for name, scheme in modules.items():
        # What no config says: it is read off the tensors.
        groups.setdefault(replace(scheme, scale_dtype="", input_scale=False), []).append(name)
    ours = str(source.get("quant_method") or "").lower() in COMPRESSED_TENSORS
    ignore = _ignored(modules, plain)
    if ours and isinstance(source.get("ignore"), list):
        ignore = list(dict.fromkeys([*ignore, *(str(name) for name in source["ignore"])]))
    kv_cache = source.get("kv_cache_scheme") if ours else None
    tables = {}
    for number, (scheme, names) in enumerate(sorted(groups.items())):
        targets = ["Linear", *_heads(names)] if len(groups) == 1 else _targets(names, modules, ignore)
        tables[f"group_{number}"] = {
            "targets": targets,
            "weights": _weight_args(scheme),
            "input_activations": _activation_args(scheme),
            "output_activations": None,
            "format": scheme.format,
        }
    formats = {scheme.format for scheme in groups} or {"dense"}
    return {
        "quant_method": FAMILY,
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": tables,
        "ignore": ignore,
        "kv_cache_scheme": kv_cache,
        "global_compression_ratio": None,
    }


def scheme_of(config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> CtScheme:
    """A module's scheme, from a config that `to_ct_config` wrote and the module's own tensors.

    Raises:
        DamagedError: no group describes it, or one in words that are not ours.
    """
    group = _group(config, name)
    weights = group.get("weights") if group is not None else None
    layouts = _FORMATS.get(str(group.get("format")), ()) if group is not None else ()
    bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
    layout = layouts[0] if len(layouts) == 1 else _INTS.get(bits if type(bits) is int else 0) if layouts else None
    if group is None or not isinstance(weights, Mapping) or layout is None:
        raise DamagedError(f"config.json: no group of quantization_config describes {name}")
    granularity = str(weights.get("strategy"))
    rows, columns = _block(weights.get("block_structure"), name)
    size = weights.get("group_size") or 0
    if type(size) is not int or size < 0:
        raise DamagedError(f"config.json: 'group_size' of {name} is {shown(size)}")
    return CtScheme(
        layout=layout,
        granularity=granularity,
        group_size=columns if granularity == "block" else size,
        block_n=rows,
        scale_dtype=tensors["weight_scale"].dtype,
        symmetric=bool(weights.get("symmetric", True)),
        input_scale="input_scale" in tensors,
        activations=activation_words(group.get("input_activations")),
    )


def _block(value: Any, name: str) -> tuple[int, int]:
    """Rows and columns of a `block_structure`; zeros where there is none."""
    if value is None:
        return 0, 0
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise DamagedError(f"config.json: 'block_structure' of {name} is {shown(value)}, want two sizes")
    return value[0], value[1]


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        return None
    for test in (_is_name, _is_pattern, _is_class):
        for group in groups.values():
            targets = group.get("targets") if isinstance(group, Mapping) else None
            if isinstance(targets, list) and any(test(str(target), name) for target in targets):
                return dict(group)
    return None


def _is_name(target: str, name: str) -> bool:
    return target == name


def _is_pattern(target: str, name: str) -> bool:
    return target.startswith("re:") and matches(target[3:], name)


def _is_class(target: str, name: str) -> bool:
    return target == "Linear"


def _ignored(modules: Mapping[str, CtScheme], plain: Iterable[Shaped]) -> list[str]:
    """Names of everything that may be a Linear and is not quantized."""
    names: list[str] = []
    for tensor in plain:
        parent, _, suffix = tensor.name.rpartition(".")
        is_matrix = len(tensor.shape) == 2 and suffix == "weight"
        if is_matrix or (len(tensor.shape) == 3 and parent.endswith(".experts")):
            names.append(parent)
    # A tied head has no tensor, but is a Linear.
    if "lm_head" not in names and not _heads(modules):
        names.append("lm_head")
    return list(dict.fromkeys(names))


def _heads(names: Iterable[str]) -> list[str]:
    """Heads among the names: vLLM's class of them is no `Linear`."""
    return [name for name in names if name.rpartition(".")[2] == "lm_head"]


def _targets(names: list[str], modules: Mapping[str, CtScheme], ignored: list[str]) -> list[str]:
    """Targets that mean exactly `names`. Transformers looks for the experts' group by regexes that name them."""
    mine, others = set(names), [name for name in modules if name not in set(names)] + ignored
    stacks: dict[str, set[str]] = {}
    for name in names:
        if expert_of(name) is not None:
            stacks.setdefault(_stack_pattern(name), set()).add(name)
    targets: list[str] = []
    covered: set[str] = set()
    for pattern, members in stacks.items():
        if not any(re.match(pattern, name) for name in others):
            targets.append(f"re:{pattern}")
            covered |= members
    return sorted(targets) + [name for name in names if name in mine - covered]


def _stack_pattern(name: str) -> str:
    """A regex of all experts of one layer that have this name's part, whatever stands before the layer's number."""
    stack, _, part = name.rpartition(".")
    parent = stack.rpartition(".")[0]
    numbered = re.search(r"[^.]+\.\d+\..*", parent)
    tail = numbered[0] if numbered else parent
    return rf"(?:.*\.)?{re.escape(tail)}\.\d+\.{re.escape(part)}$"


def _weight_args(scheme: CtScheme) -> dict[str, Any]:
    mx = scheme.layout in ("ct_mxfp4", "ct_mxfp8")
    args: dict[str, Any] = {
        "num_bits": 8 if scheme.layout in ("ct_int8", "ct_fp8", "ct_mxfp8") else 4,
        "type": "int" if scheme.layout in _INTS.values() else "float",
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "block_structure": [scheme.block_n, scheme.group_size] if scheme.granularity == "block" else None,
        "dynamic": False,
    }
    return args | ({"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"} if mx else {})


def _activation_args(scheme: CtScheme) -> dict[str, Any] | None:
    match = _ACTIVATIONS.fullmatch(scheme.activations)
    if match is None:
        return None
    kind, bits, strategy, size, when = match.groups()
    args: dict[str, Any] = {
        "num_bits": int(bits),
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": int(size) if size else None,
        "dynamic": when == "dynamic",
    }
    mx = scheme.layout in ("ct_mxfp4", "ct_mxfp8") and strategy == "group"
    return args | ({"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"} if mx else {})
