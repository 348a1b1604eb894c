"""What a compressed-tensors config says, parsed leniently.

The library's own pydantic classes refuse keys of other versions, so files of one version cannot be read by another;
here unknown keys are ignored and every key may be absent (compressed-tensors 0.7 to 0.20).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xpuquant.errors import UsageError, shown
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers.config_keys import overridden
from xpuquant.formats.readers.patterns import check_count, matches
from xpuquant.formats.readers.spellings import number_said, numbers_said, truth
from xpuquant.values import frozen

W8A8_METHODS = frozenset({"w8a8-int8", "blockwise-int8"})
"""SGLang's names of integer weights, one to a byte, whose activations are quantized when serving
(sglang/srt/layers/quantization/w8a8_int8.py, blockwise_int8.py)."""


@frozen
class WeightArgs:
    """`QuantizationArgs` of a group's weights. None: not said.

    group  key of the group that says it in `config_groups`
    """

    bits: int
    type: str
    strategy: str | None
    group_size: int | None
    symmetric: bool
    block: tuple[int, int] | None
    format: str | None
    group: str | None = None

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.type}, {self.groups}"

    @property
    def groups(self) -> str:
        """Columns per scale, in words."""
        return f"groups of {self.group_size}" if self.group_size else "one scale for each row"


def weight_args(checkpoint: Checkpoint, module: str) -> list[WeightArgs]:
    """The groups that may describe `module`, most specific first: exact name, regex, class name.

    Several can match; the reader takes the first that the shapes agree with. AutoRound's own config under
    the same tensors has one flat scheme.
    """
    config, module = checkpoint.quantization, checkpoint.known_as.get(module, module)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        return [_args(overridden(config, module), None)] if "bits" in config else []
    ranked: list[tuple[int, str, WeightArgs]] = []
    patterns = 0
    for name, group in groups.items():
        if isinstance(group, list):
            # {preset: targets}, the short form of a group.
            group = {"weights": _preset(str(name)), "targets": group}
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            continue
        args = replace(_args(group["weights"], group.get("format") or config.get("format")), group=str(name))
        targets = group.get("targets") or ["Linear"]
        if not isinstance(targets, list):
            raise UsageError(f"config: 'targets' is {shown(targets)}, want a list of names")
        patterns += sum(str(target).startswith("re:") for target in targets)
        check_count("targets", patterns)
        for target in targets:
            rank = _rank(str(target), module)
            if rank is not None:
                ranked.append((rank, str(target), args))
    return [args for _, _, args in sorted(ranked, key=lambda entry: entry[:2])]


def stated_block(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(rows, columns) of `weight_block_size`, where the config has it for all modules."""
    sides = numbers_said(checkpoint.quantization.get("weight_block_size"))
    return (sides[0], sides[1]) if sides and len(sides) == 2 and min(sides) > 0 else None


def quantizes_activations(checkpoint: Checkpoint) -> bool:
    """Whether the config has 8-bit integer activations (W8A8): a group, or SGLang's methods by their names."""
    if checkpoint.method in W8A8_METHODS:
        return True
    groups = checkpoint.quantization.get("config_groups")
    listed = groups.values() if isinstance(groups, Mapping) else ()
    activations = [group.get("input_activations") for group in listed if isinstance(group, Mapping)]
    return any(isinstance(a, Mapping) and a.get("num_bits") == 8 and a.get("type", "int") == "int" for a in activations)


def _preset(name: str) -> Mapping[str, Any] | None:
    """Weights of one of the library's named schemes (compressed_tensors/quantization/quant_scheme.py)."""
    upper = name.upper()
    if upper in ("W8A8", "INT8"):
        return {"num_bits": 8, "strategy": "channel"}
    integers = re.fullmatch(r"W([1-8])A(?:FP)?\d+(_ASYM)?", upper)
    if integers:
        return {
            "num_bits": int(integers[1]),
            "group_size": 128,
            "strategy": "group",
            "symmetric": not integers[2],
        }
    strategies = {"FP8": "tensor", "FP8_DYNAMIC": "channel", "FP8_BLOCK": "block"}
    if upper in strategies:
        return {"num_bits": 8, "type": "float", "strategy": strategies[upper], "block_structure": [128, 128]}
    mx = re.fullmatch(r"MXFP([468])(A\d+|XFP8)?", upper)
    if mx:
        return {"num_bits": int(mx[1]), "type": "float", "strategy": "group", "group_size": 32}
    if upper in ("NVFP4", "NVFP4A16"):
        return {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    return None


def _rank(target: str, module: str) -> int | None:
    if target == module:
        return 0
    if target.startswith("re:"):
        return 1 if matches(target[3:], module) else None
    # A class name, which begins with a capital (`lm_head` is a module); attention-only groups describe the KV cache.
    return 2 if target[:1].isupper() and "." not in target and not target.endswith("Attention") else None


def _args(args: Mapping[str, Any], fmt: Any) -> WeightArgs:
    size = number_said(args.get("group_size"))
    block = args.get("block_structure") or args.get("weight_block_size")
    if isinstance(block, str):
        block = [int(side) for side in re.findall(r"[0-9]{1,9}", block)]
    sides = numbers_said(block)
    if block is not None and sides is None:
        raise UsageError(f"config: the block size is {shown(block)}, want two numbers")
    return WeightArgs(
        bits=_number(args, "num_bits", _number(args, "bits", 8)),
        type=str(args.get("type") or args.get("data_type") or "int"),
        strategy=str(args["strategy"]) if args.get("strategy") else None,
        group_size=size if size and size > 0 else None,
        symmetric=bool(truth(args.get("symmetric", args.get("sym", True)))),
        block=(sides[0], sides[1]) if sides and len(sides) == 2 and min(sides) > 0 else None,
        format=str(fmt) if fmt else None,
    )


def _number(args: Mapping[str, Any], key: str, default: int) -> int:
    value = args.get(key)
    if value is None:
        return default
    number = number_said(value)
    if number is None or not 0 < number <= 64:
        raise UsageError(f"config: '{key}' is {shown(value)}, want a number of bits")
    return number
