"""How a checkpoint's tensors find their readers.

Tensors are grouped by module (`P.qweight`, `P.scales`, ... belong to P). Each group goes to the one reader that claims
it from names, dtypes and shapes alone. The config is asked, by that reader, for what tensors cannot say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from xpuquant.errors import DamagedError, UnsupportedError, UsageError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.guard import guarded
from xpuquant.formats.readers import READERS
from xpuquant.formats.readers.base import Parts
from xpuquant.formats.readers.stacked import codes_of_stack, expert_parts, read_stack
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight


@dataclass(frozen=True)
class Reading:
    """What a checkpoint holds.

    weights   every quantized matrix, in file order
    refused   module → reason, for modules that cannot be read into normal form
    rest      tensors that belong to no quantized matrix, in file order: they pass through
    """

    weights: tuple[Weight, ...]
    refused: Mapping[str, str]
    rest: tuple[Tensor, ...]


def read(checkpoint: Checkpoint) -> Reading:
    """Sort every tensor of a checkpoint.

    Raises:
        UsageError: not a quantized checkpoint, or an unknown `quant_method`.
        DamagedError: a tensor is missing or misshapen.
    """
    _check_method(checkpoint)
    weights: list[Weight] = []
    refused: dict[str, str] = {}
    for name, parts in modules(checkpoint).items():
        with guarded(name):
            codes = codes_of_stack(parts)
            asked = parts if codes is None else _first(name, parts, codes)
            reader = next((reader for reader in READERS if reader.claims(asked)), None)
        if reader is None:
            if _looks_quantized(parts):
                shown = ", ".join(f"{s} {t.dtype} {list(t.shape)}" for s, t in sorted(parts.items()))
                refused[name] = f"no known format has these tensors: {shown}"
            continue
        _check_sound(name, parts)
        try:
            with guarded(name):
                weights += (
                    reader.read(checkpoint, name, parts)
                    if codes is None
                    else read_stack(reader, checkpoint, name, parts, codes)
                )
        except UnsupportedError as error:
            refused[name] = str(error)
    used = {tensor.name for weight in weights for tensor in weight.tensors}
    for tensor in _unread(checkpoint, used):
        owner = tensor.name.rpartition(".")[0]
        refused.setdefault(
            owner, f"no known format has these tensors: {tensor.name} {tensor.dtype} {list(tensor.shape)}"
        )
    rest = tuple(tensor for tensor in checkpoint.tensors.values() if tensor.name not in used)
    if not weights and not refused:
        keys = ("packing_format", "checkpoint_format", "format", "version", "quantization_status")
        said = [f"{key} {checkpoint.quantization[key]!r}" for key in keys if checkpoint.quantization.get(key)]
        also = f" ({', '.join(said)})" if said else ""
        raise UsageError(
            f"nothing is quantized: config.json says '{checkpoint.method}'{also}, but no tensor is packed or scaled"
        )
    return Reading(tuple(weights), refused, rest)


def modules(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Module → suffix → tensor, in file order: what readers are asked about.

    Suffixes that no format has are left out, and modules that are but a float `weight`.
    """
    suffixes = frozenset[str]().union(*(reader.suffixes for reader in READERS), {"weight"})
    found: dict[str, dict[str, Tensor]] = {}
    for tensor in checkpoint.tensors.values():
        prefix, _, suffix = tensor.name.rpartition(".")
        if suffix in suffixes:
            found.setdefault(prefix, {})[suffix] = tensor
    return {name: parts for name, parts in found.items() if not _is_plain(parts)}


def _is_plain(parts: Parts) -> bool:
    return len(parts) == 1 and "weight" in parts and parts["weight"].dtype in _PLAIN


def _first(name: str, parts: Parts, codes: Tensor) -> Parts:
    """The first expert's part of a stack, all of whose experts are of one format; the stack where it has none."""
    try:
        return next(iter(expert_parts(name, parts, codes)), (name, parts))[1]
    except UnsupportedError:
        return parts


def _check_sound(name: str, parts: Parts) -> None:
    """What no reader can make sense of.

    Raises:
        DamagedError: an empty tensor, or a name that cannot stand in a converted config.
    """
    if "{" in name or "}" in name:
        raise DamagedError(f"{name}: braces in a module's name stand for numbers in our config")
    for tensor in parts.values():
        if 0 in tensor.shape:
            raise DamagedError(f"{tensor.name} has shape {list(tensor.shape)}: a quantized weight is not empty")


def _unread(checkpoint: Checkpoint, used: Collection[str]) -> Iterator[Tensor]:
    """Tensors that only a quantized module has and no reader took: of a type for nothing else, or packed words with a
    scale that is named after them (`w13_weight`, `w13_weight_scale`)."""
    names = checkpoint.tensors
    for tensor in names.values():
        if tensor.name in used or tensor.dtype in _PLAIN or len(tensor.shape) < 2:
            continue
        scaled = any(f"{tensor.name}{end}" in names for end in ("_scale", "_scales", "_scale_inv"))
        if tensor.dtype.startswith(("F8_E4", "F8_E5", "F4", "F6")) or scaled:
            yield tensor


_PLAIN = frozenset({"F16", "BF16", "F32", "F64"})

_PLAIN_NAMES = frozenset({"weight", "scale", "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"})
"""Suffixes that some format uses for quantized tensors, and unquantized models for float ones: fused experts, a
norm's `scale`."""


def _looks_quantized(parts: Parts) -> bool:
    return any(tensor.dtype not in _PLAIN or suffix not in _PLAIN_NAMES for suffix, tensor in parts.items())


def _check_method(checkpoint: Checkpoint) -> None:
    if not checkpoint.quantization:
        raise UsageError(
            "no quantization config: config.json has no 'quantization_config' and there is no "
            "quantize_config.json; xpuquant converts quantized checkpoints, it does not quantize"
        )
    methods = frozenset[str]().union(*(reader.methods for reader in READERS))
    if checkpoint.method == "xpuquant":
        raise UsageError("this repo is already converted; use it as it is, or verify it")
    if checkpoint.method and checkpoint.method not in methods:
        raise UsageError(f"quant_method '{checkpoint.method}' is not supported; known: {', '.join(sorted(methods))}")
