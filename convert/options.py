"""What a conversion was asked to do: builds the plan, is kept in the journal, stands in the card."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from xpuquant.errors import UsageError
from xpuquant.formats.dtypes import FLOATS

DEFAULT_SHARD_BYTES = 5_000_000_000
LAYOUTS = ("xpu", "compressed-tensors")
ON_UNSUPPORTED = ("refuse", "dequantize")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_LARGEST = 2.0**62
_DTYPES = {
    "float16": "F16",
    "fp16": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float32": "F32",
    "fp32": "F32",
}


@dataclass(frozen=True)
class Options:
    """Everything that changes the bytes of the output.

    layout           `xpu`, or `compressed-tensors`: the same weights for loaders that know nothing of this tool
    scale_dtype      safetensors label to round scales to; None keeps the source's
    on_unsupported   `refuse`, or `dequantize` to bf16
    max_shard_bytes  upper size of a shard (a single larger tensor gets its own)
    fold_act_order   store MLP rows in the order down_proj wants, instead of a permutation (`weights/fold_act_order.py`)
    """

    layout: str = "xpu"
    scale_dtype: str | None = None
    on_unsupported: str = "refuse"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    fold_act_order: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UsageError(f"--layout {self.layout}: want one of {', '.join(LAYOUTS)}")
        if self.on_unsupported not in ON_UNSUPPORTED:
            raise UsageError(f"--on-unsupported {self.on_unsupported}: want one of {', '.join(ON_UNSUPPORTED)}")
        if self.scale_dtype is not None and self.scale_dtype not in FLOATS:
            raise UsageError(f"--scale-dtype {self.scale_dtype}: want float16, bfloat16 or float32")
        if self.max_shard_bytes < 1:
            raise UsageError("--max-shard-size must be positive")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_size(text: str) -> int:
    """Bytes of `5GB` (10^9), `512MiB` (2^20), `1000`."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].lower().removesuffix("b") if match else "?"
    size = float(match[1]) * _UNITS[unit] if match is not None and unit in _UNITS else float("inf")
    if size > _LARGEST:
        raise UsageError(f"'{text}' is not a size; write 5GB or 512MiB")
    return int(size)


def parse_dtype(text: str | None) -> str | None:
    """safetensors label of `bfloat16`, `float16`, `float32`; None and `keep` keep the source's."""
    if text is None or text == "keep":
        return None
    if text.lower() not in _DTYPES:
        raise UsageError(f"--scale-dtype {text}: want float16, bfloat16 or float32")
    return _DTYPES[text.lower()]
