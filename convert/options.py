"""What a conversion was asked to do: builds the plan, is kept in the journal, stands in the card."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from operator import index
from typing import Any, SupportsIndex

from xpuquant.conversion.sizes import LARGEST_SIZE, exact_size, parse_size
from xpuquant.errors import Argument, UsageError
from xpuquant.values import frozen

DEFAULT_SHARD_BYTES = 5_000_000_000
LAYOUT_FAMILIES = ("xpu", "compressed-tensors")
ON_UNSUPPORTED = ("refuse", "dequantize")
ROUNDED_TO = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""What scales can be rounded to: safetensors label → name."""

_KEEP = ("keep", "auto")
_DTYPES = {
    **{name: label for label, name in ROUNDED_TO.items()},
    **{label.lower(): label for label in ROUNDED_TO},
    "fp16": "F16",
    "half": "F16",
    "fp32": "F32",
    "float": "F32",
}
_RECORDED = {"max_shard_size": "max_shard_bytes"}
"""Field → its key in journals and provenance, where that is another."""


@frozen(sealed=True)
class Options:
    """Everything that changes the bytes of the output. Written as people write them, kept in one form.

    layout           `xpu`, or `compressed-tensors`: the same weights for loaders that know nothing of this tool
    scale_dtype      `float16`, `bfloat16` or `float32` to round scales to, kept as safetensors label (`F16`, `BF16`,
                     `F32`); None, `keep` or `auto` keeps the source's, and is None
    on_unsupported   `refuse`, or `dequantize` to bf16, modules that no kernel takes
    max_shard_size   largest shard, in bytes or as text like `5GB` or `512MiB`, kept in bytes (a single larger tensor
                     gets its own)
    fold_act_order   store MLP rows in the order down_proj wants, instead of a permutation (`readers/fold_act_order.py`)

    None stands for the default everywhere.

    Raises:
        UsageError: a value that is none of these.
    """

    layout: str = "xpu"
    scale_dtype: str | None = None
    on_unsupported: str = "refuse"
    max_shard_size: int | str = DEFAULT_SHARD_BYTES
    fold_act_order: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            canonical = field.default if value is None else _CANONICAL[field.name](value)
            object.__setattr__(self, field.name, canonical)

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` as a number."""
        assert isinstance(self.max_shard_size, int)
        return self.max_shard_size

    @classmethod
    def from_dict(cls, data: object) -> Options:
        """The options that `as_dict` made, read from a file, which may be a stranger's.

        Raises:
            UsageError: they are not.
        """
        kinds = {key: type(value) for key, value in cls(scale_dtype="F32").as_dict().items()}
        if not isinstance(data, dict) or not data.keys() <= kinds.keys():
            raise UsageError("the recorded options cannot be read")
        for key, value in data.items():
            if type(value) is not kinds[key] and (key, value) != ("scale_dtype", None):
                raise UsageError(f"the recorded options cannot be read: {key}")
        named = {_RECORDED.get(field.name, field.name): field.name for field in fields(cls)}
        read = cls(**{named[key]: value for key, value in data.items()})
        if any(read.as_dict()[key] != value for key, value in data.items()):
            raise UsageError("the recorded options cannot be read: not as they are written")
        return read

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON has them."""
        return {_RECORDED.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}

    def asked(self) -> list[Argument]:
        """The options as arguments, without those that have their default."""
        return [self.argument(field.name) for field in fields(self) if getattr(self, field.name) != field.default]

    def argument(self, name: str) -> Argument:
        """One option, with its value as people write it."""
        value = getattr(self, name)
        if name == "scale_dtype":
            value = "keep" if value is None else ROUNDED_TO[value]
        if name == "max_shard_size":
            value = exact_size(value)
        return Argument(name, value)

    def differing(self, other: Options) -> list[tuple[Argument, Argument]]:
        """The options that are not the same: (ours, theirs) of each."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]
        return [(self.argument(name), other.argument(name)) for name in names]


def contrast(theirs: Options, ours: Options) -> list[object]:
    """For a message, what one conversion was made with and another is not; empty where that is nothing."""
    pairs = theirs.differing(ours)
    words: list[object] = []
    for before, side in (("with ", 0), (", not with ", 1)):
        for i, pair in enumerate(pairs):
            words += [" and " if i else before, pair[side]]
    return words


def _choice(name: str, choices: Sequence[str]) -> Callable[[object], str]:
    def canonical(value: object) -> str:
        text = value.strip().lower().replace("_", "-") if isinstance(value, str) else None
        if text is None or text not in choices:
            raise UsageError(Argument(name, value), f": want one of {', '.join(choices)}")
        return text

    return canonical


def _dtype(value: object) -> str | None:
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in _KEEP:
        return None
    if text not in _DTYPES:
        names = ", ".join(ROUNDED_TO.values())
        raise UsageError(Argument("scale_dtype", value), f": want {names}, or keep for the source's")
    return _DTYPES[text]


def _shard_size(value: object) -> int:
    if isinstance(value, str):
        nbytes = parse_size(value)
    elif isinstance(value, float) and value.is_integer():
        nbytes = int(value)  # 5e9
    else:
        nbytes = whole_number(value)
    if nbytes is None or not 1 <= nbytes <= LARGEST_SIZE:
        raise UsageError(Argument("max_shard_size", value), ": want a size with its unit, like 5GB, 512MiB or 1000B")
    return nbytes


def whole_number(value: object) -> int | None:
    """A whole number as such, numpy's too; None of anything else. True and False are none."""
    return None if isinstance(value, bool) or not isinstance(value, SupportsIndex) else index(value)


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(Argument("fold_act_order", value), ": want True or False")
    return value


_CANONICAL: Mapping[str, Callable[[object], Any]] = {
    "layout": _choice("layout", LAYOUT_FAMILIES),
    "scale_dtype": _dtype,
    "on_unsupported": _choice("on_unsupported", ON_UNSUPPORTED),
    "max_shard_size": _shard_size,
    "fold_act_order": _switch,
}
"""Field → what makes the one form of a value, or refuses it."""


def cores() -> int:
    """Processors that this process may use; all of the machine where the system does not tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs() -> int:
    """A worker per core; beyond 8 the disk is the limit."""
    return min(8, cores())
