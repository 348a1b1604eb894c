"""How a checkpoint's tensors find their readers.

Tensors are grouped by module (`P.qweight`, `P.scales`, ... belong to P). Each group goes to the one reader that claims
it from names, dtypes and shapes alone. The config is asked, by that reader, for what tensors cannot say. What is
left over is sorted out by `leftovers.py`: nothing is dropped or kept without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xpuquant.errors import DamagedError, UnsupportedError, UsageError, shown
from xpuquant.formats.architecture import is_router
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.guard import guarded
from xpuquant.formats.readers import READERS
from xpuquant.formats.readers.base import Parts, Reader
from xpuquant.formats.readers.leftovers import PLAIN, factor_reason, is_plain, sort_leftovers, unknown_beside
from xpuquant.formats.readers.stacked import codes_of_stack, expert_parts, read_stack
from xpuquant.formats.readers.transforms import online_transform, unknown_keys
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight
from xpuquant.values import frozen


@frozen
class Reading:
    """What a checkpoint holds.

    weights   every quantized matrix, in file order
    refused   module → reason, for modules that cannot be read into normal form
    rest      tensors that belong to no quantized matrix, in file order: they pass through
    notes     what was dropped, and what the config says that nobody here knows
    """

    weights: tuple[Weight, ...]
    refused: Mapping[str, str]
    rest: tuple[Tensor, ...]
    notes: tuple[str, ...] = ()


def read(checkpoint: Checkpoint) -> Reading:
    """Sort every tensor of a checkpoint.

    Raises:
        UsageError: not a quantized checkpoint, or an unknown `quant_method`.
        DamagedError: a tensor is missing or misshapen.
    """
    _check_method(checkpoint)
    transform = online_transform(checkpoint)
    quantized: dict[str, list[Weight]] = {}
    refused: dict[str, str] = {}
    for name, parts in modules(checkpoint).items():
        with guarded(name):
            codes = codes_of_stack(parts)
            asked = parts if codes is None else _first(name, parts, codes)
            reader = _claimant(asked)
        if reader is None:
            if not is_plain(parts) and _looks_quantized(parts):
                refused[name] = _unknown(name, parts)
            continue
        _check_sound(name, parts)
        if transform is not None:
            refused[name] = transform
            continue
        try:
            with guarded(name):
                quantized[name] = (
                    reader.read(checkpoint, name, parts)
                    if codes is None
                    else list(read_stack(reader, checkpoint, name, parts, codes))
                )
        except UnsupportedError as error:
            refused[name] = str(error)
        except DamagedError:
            # What a format misses may be there under a name that it does not have.
            other = unknown_beside(name, parts, checkpoint.tensors)
            if other is None:
                raise
            refused[name] = f"no known format has these tensors: {other.name} {other.dtype} {list(other.shape)}"
    weights = [weight for found in quantized.values() for weight in found]
    used = {tensor.name for weight in weights for tensor in weight.tensors}
    unused = (tensor for tensor in checkpoint.tensors.values() if tensor.name not in used)
    left = sort_leftovers(str(checkpoint.config.get("model_type")), unused, quantized, refused)
    refused = {**left.refused, **refused}
    weights = [weight for name, found in quantized.items() if name not in left.refused for weight in found]
    if not weights and not refused:
        keys = ("packing_format", "checkpoint_format", "format", "version", "quantization_status")
        said = [f"{key} {checkpoint.quantization[key]!r}" for key in keys if checkpoint.quantization.get(key)]
        also = f" ({', '.join(said)})" if said else ""
        raise UsageError(
            f"nothing is quantized: config.json says '{checkpoint.method}'{also}, but no tensor is packed or scaled"
            + "".join(f"; {note}" for note in checkpoint.notes[:3])
        )
    notes = (*left.notes, *unknown_keys(checkpoint), *_quantized_routers(weights))
    return Reading(tuple(weights), refused, tuple(left.passed), notes)


def _quantized_routers(weights: Sequence[Weight]) -> list[str]:
    """A remark on routers that a producer packed, as AutoRound's model-free export (0.16.1) does those of Llama 4,
    gpt-oss, Gemma 4 and Granite."""
    routers = [weight.name for weight in weights if is_router(weight.name)]
    if not routers:
        return []
    named = f"{routers[0]} and {len(routers) - 1} more routers are" if len(routers) > 1 else f"{routers[0]} is"
    return [
        f"{named} quantized, as AutoRound's model-free export does unasked; the plugin of vLLM refuses that where vLLM "
        "has the model's router unquantized: quantize the model again, routers left out"
    ]


def modules(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Module → suffix → tensor, in file order: what readers are asked about.

    Suffixes that no format has are left out, and modules that are but a float `weight`.
    """
    suffixes = frozenset[str]().union(*(reader.suffixes for reader in READERS), {"weight"})
    found: dict[str, dict[str, Tensor]] = {}
    module: str | None = None
    parts: dict[str, Tensor] = {}
    for tensor in checkpoint.tensors.values():
        prefix, _, suffix = tensor.name.rpartition(".")
        if suffix in suffixes:
            if prefix != module:  # those of a module mostly follow each other
                module, parts = prefix, found.setdefault(prefix, {})
            parts[suffix] = tensor
    return {name: parts for name, parts in found.items() if not _is_plain(parts)}


def _claimant(parts: Parts) -> Reader | None:
    for reader in READERS:
        if reader.claims(parts):
            return reader
    return None


def _is_plain(parts: Parts) -> bool:
    return len(parts) == 1 and "weight" in parts and parts["weight"].dtype in PLAIN


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
    for suffix, tensor in parts.items():
        if 0 in tensor.shape and suffix not in _EMPTY_MEANS_NONE:
            raise DamagedError(f"{tensor.name} has shape {list(tensor.shape)}: a quantized weight is not empty")


_EMPTY_MEANS_NONE = frozenset({"g_idx"})
"""Suffixes whose empty tensor says that there is none: of Marlin's loaders, which save what they run with."""

_PLAIN_NAMES = frozenset({"weight", "scale", "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"})
"""Suffixes that some format uses for quantized tensors, and unquantized models for float ones: fused experts, a
norm's `scale`."""


def _looks_quantized(parts: Parts) -> bool:
    return any(tensor.dtype not in PLAIN or suffix not in _PLAIN_NAMES for suffix, tensor in parts.items())


def _unknown(name: str, parts: Parts) -> str:
    if name.endswith(".act") and parts.keys() == {"scales"}:
        return factor_reason(parts["scales"])
    listed = ", ".join(f"{s} {t.dtype} {list(t.shape)}" for s, t in sorted(parts.items()))
    if all("scale" in suffix or "zero" in suffix for suffix in parts):
        return f"scales without a weight, of which nothing else is there: {listed}"
    return f"no known format has these tensors: {listed}"


def _check_method(checkpoint: Checkpoint) -> None:
    if not checkpoint.quantization:
        raise UsageError(
            "no quantization config: config.json and its parts have no 'quantization_config', and there is no "
            "quantize_config.json or hf_quant_config.json; xpuquant converts quantized checkpoints and quantizes none"
        )
    methods = frozenset[str]().union(*(reader.methods for reader in READERS))
    if checkpoint.method == "xpuquant":
        raise UsageError("this repo is already converted; use it as it is, or verify it")
    if checkpoint.method and checkpoint.method not in methods:
        said = checkpoint.quantization.get("quant_method") or checkpoint.method
        raise UsageError(f"quant_method {shown(said)} is not supported; known: {', '.join(sorted(methods))}")
