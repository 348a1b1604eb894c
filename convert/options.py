"""What a conversion was asked to do: builds the plan, is kept in the journal, stands in the card."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from xpuquant.conversion.sizes import parse_size
from xpuquant.errors import UsageError
from xpuquant.formats.dtypes import FLOATS

DEFAULT_SHARD_BYTES = 5_000_000_000
LAYOUT_FAMILIES = ("xpu", "compressed-tensors")
ON_UNSUPPORTED = ("refuse", "dequantize")

_DTYPES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
    "fp32": "F32",
}

FLAGS = {
    "layout": "--layout",
    "scale_dtype": "--scale-dtype",
    "on_unsupported": "--on-unsupported",
    "max_shard_bytes": "--max-shard-size",
    "fold_act_order": "--fold-act-order",
}
"""Field of `Options` → its option on the command line."""


@dataclass(frozen=True)
class Options:
    """Everything that changes the bytes of the output.

    layout           `xpu`, or `compressed-tensors`: the same weights for loaders that know nothing of this tool
    scale_dtype      safetensors label (`F16`, `BF16`, `F32`) to round scales to; None keeps the source's
    on_unsupported   `refuse`, or `dequantize` to bf16, modules that no kernel takes
    max_shard_bytes  upper size of a shard (a single larger tensor gets its own)
    fold_act_order   store MLP rows in the order down_proj wants, instead of a permutation (`readers/fold_act_order.py`)

    Raises:
        UsageError: a value that is none of these.
    """

    layout: str = "xpu"
    scale_dtype: str | None = None
    on_unsupported: str = "refuse"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    fold_act_order: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUT_FAMILIES:
            raise UsageError(f"--layout {self.layout}: want one of {', '.join(LAYOUT_FAMILIES)}")
        if self.on_unsupported not in ON_UNSUPPORTED:
            raise UsageError(f"--on-unsupported {self.on_unsupported}: want one of {', '.join(ON_UNSUPPORTED)}")
        if self.scale_dtype is not None and self.scale_dtype not in FLOATS:
            raise UsageError(f"--scale-dtype {self.scale_dtype}: want float16, bfloat16 or float32")
        if self.max_shard_bytes < 1:
            raise UsageError("--max-shard-size must be positive")

    @classmethod
    def parse(
        cls,
        layout: str = "xpu",
        scale_dtype: str | None = None,
        on_unsupported: str = "refuse",
        max_shard_size: str | int = DEFAULT_SHARD_BYTES,
        fold_act_order: bool = False,
    ) -> Options:
        """Options as people write them.

        Args:
            scale_dtype: `float16`, `bfloat16`, `float32`; None or `keep` keeps the source's.
            max_shard_size: bytes, or text like `5GB` or `512MiB`.

        Raises:
            UsageError: a value that is none of these.
        """
        nbytes = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
        return cls(layout, parse_dtype(scale_dtype), on_unsupported, nbytes, fold_act_order)

    @classmethod
    def from_dict(cls, data: object) -> Options:
        """The options that `as_dict` made, read from a file, which may be a stranger's.

        Raises:
            UsageError: they are not.
        """
        kinds = {field: type(value) for field, value in cls(scale_dtype="F32").as_dict().items()}
        if not isinstance(data, dict) or not data.keys() <= kinds.keys():
            raise UsageError("the recorded options cannot be read")
        for field, value in data.items():
            if type(value) is not kinds[field] and (field, value) != ("scale_dtype", None):
                raise UsageError(f"the recorded options cannot be read: {field}")
        return cls(**data)

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON has them."""
        return asdict(self)

    def as_arguments(self) -> list[str]:
        """The options on a command line, without those that have their default."""
        words: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                dtypes = [name for name, label in _DTYPES.items() if label == value]
                words += [FLAGS[field.name], *([] if value is True else [*dtypes, str(value)][:1])]
        return words


def parse_dtype(text: str | None) -> str | None:
    """safetensors label of `bfloat16`, `float16`, `float32`; None and `keep` keep the source's."""
    if text is None or text == "keep":
        return None
    if text.lower() not in _DTYPES:
        raise UsageError(f"--scale-dtype {text}: want float16, bfloat16 or float32")
    return _DTYPES[text.lower()]


def default_jobs() -> int:
    """A worker per core; beyond 8 the disk is the limit."""
    return max(1, min(8, len(os.sched_getaffinity(0))))
