"""What a reader is, and how a checkpoint's tensors find theirs.

Tensors are grouped by module (`P.qweight`, `P.scales`, ... belong to P); each group goes to the first reader that
claims it from names, dtypes and shapes alone. The config is consulted by the reader for what tensors cannot say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from xpuquant.errors import DamagedError, UnsupportedError, UsageError, one_line
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.registry import readers
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weight import Weight

Parts = Mapping[str, Tensor]
"""Tensor suffix → tensor, of one module."""


class Reader(Protocol):
    """One file of `formats/` per source format; found by its module attribute `READER`."""

    @property
    def name(self) -> str:
        """The format's name, for reports."""
        ...

    @property
    def methods(self) -> frozenset[str]:
        """Values of `quant_method` that may announce this format."""
        ...

    @property
    def suffixes(self) -> frozenset[str]:
        """Tensor suffixes of the format, `weight` and `bias` excepted."""
        ...

    def claims(self, parts: Parts) -> bool:
        """Whether these tensors are a module of this format. Looks at names, dtypes and shapes only."""
        ...

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        """The weights of one module (several for a stacked expert tensor).

        Raises:
            UnsupportedError: sound, but nothing this tool can convert; the message is the reason.
            DamagedError: tensors missing, or of shapes that contradict each other.
        """
        ...


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
    known = readers()
    _check_method(checkpoint, known)
    suffixes = frozenset[str]().union(*(reader.suffixes for reader in known), {"weight"})
    modules: dict[str, dict[str, Tensor]] = {}
    for tensor in checkpoint.tensors.values():
        prefix, _, suffix = tensor.name.rpartition(".")
        if suffix in suffixes:
            modules.setdefault(prefix, {})[suffix] = tensor
    weights: list[Weight] = []
    refused: dict[str, str] = {}
    for name, parts in modules.items():
        if len(parts) == 1 and "weight" in parts and parts["weight"].dtype in _PLAIN:
            continue
        with guarded(name):
            reader = next((reader for reader in known if reader.claims(parts)), None)
        if reader is None:
            if _looks_quantized(parts):
                shown = ", ".join(f"{s} {t.dtype} {list(t.shape)}" for s, t in sorted(parts.items()))
                refused[name] = f"no known format has these tensors: {shown}"
            continue
        _check_sound(name, parts)
        try:
            with guarded(name):
                weights += reader.read(checkpoint, name, parts)
        except UnsupportedError as error:
            refused[name] = str(error)
    used = {tensor.name for weight in weights for tensor in weight.tensors}
    rest = tuple(tensor for tensor in checkpoint.tensors.values() if tensor.name not in used)
    if not weights and not refused:
        keys = ("packing_format", "checkpoint_format", "format", "version", "quantization_status")
        said = [f"{key} {checkpoint.quantization[key]!r}" for key in keys if checkpoint.quantization.get(key)]
        also = f" ({', '.join(said)})" if said else ""
        raise UsageError(one_line(
            f"nothing is quantized: config.json says '{checkpoint.method}'{also}, but no tensor is packed or scaled"
        ))  # fmt: skip
    return Reading(tuple(weights), refused, rest)


_STUMBLES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError
)  # fmt: skip


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Turns what unforeseen input does to code (a division by 0, a text for a number) into a refusal that names the
    module. The fuzz lane counts its uses, because each deserves a check that says more."""
    try:
        yield
    except _STUMBLES as error:
        said = f"{type(error).__name__}: {error}"
        raise DamagedError(
            one_line(f"{name}: its tensors or what is said of it cannot be ({said})")
        ) from error


def _check_sound(name: str, parts: Parts) -> None:
    """What no reader can make sense of.

    Raises:
        DamagedError: an empty tensor, or a name that cannot stand in a converted config.
    """
    if "{" in name or "}" in name:
        raise DamagedError(one_line(f"{name}: braces in a module's name stand for numbers in our config"))
    for tensor in parts.values():
        if 0 in tensor.shape:
            raise DamagedError(
                f"{tensor.name} has shape {list(tensor.shape)}: a quantized weight is not empty"
            )


_PLAIN = frozenset({"F16", "BF16", "F32", "F64"})

_PLAIN_NAMES = frozenset(
    {"weight", "scale", "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}
)
"""Suffixes that some format uses for quantized tensors, and unquantized models for float ones: fused experts, a
norm's `scale`."""


def _looks_quantized(parts: Parts) -> bool:
    return any(tensor.dtype not in _PLAIN or suffix not in _PLAIN_NAMES for suffix, tensor in parts.items())


def _check_method(checkpoint: Checkpoint, known: tuple[Reader, ...]) -> None:
    if not checkpoint.quantization:
        raise UsageError(
            "no quantization config: config.json has no 'quantization_config' and there is no "
            "quantize_config.json; xpuquant converts quantized checkpoints, it does not quantize"
        )
    methods = frozenset[str]().union(*(reader.methods for reader in known))
    if checkpoint.method == "xpuquant":
        raise UsageError("this repo is already converted; use it as it is, or `xpuquant verify` it")
    if checkpoint.method and checkpoint.method not in methods:
        raise UsageError(
            one_line(
                f"quant_method '{checkpoint.method}' is not supported; known: {', '.join(sorted(methods))}"
            )
        )


def need(
    parts: Parts, suffix: str, name: str, *, dtype: str | None = None, dims: int | None = None
) -> Tensor:
    """A tensor a module must have.

    Raises:
        DamagedError: it is missing, or has another dtype or rank.
    """
    tensor = parts.get(suffix)
    if tensor is None:
        raise DamagedError(f"{name}.{suffix} is missing; is a shard incomplete? Download it again")
    if dtype is not None and tensor.dtype != dtype:
        raise DamagedError(f"{tensor.name} is {tensor.dtype}, want {dtype}")
    if dims is not None and len(tensor.shape) != dims:
        raise DamagedError(f"{tensor.name} has shape {list(tensor.shape)}, want {dims} dimensions")
    return tensor
