"""What a reader may see of a source checkpoint: its config, its headers, and a peek at small tensors.

A reader never opens a file. Whoever makes the `Checkpoint` (a source in `convert/sources/`, a test) decides where
`peek` gets its bytes from, or that it has none (None).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import numpy as np

from xpuquant.formats.dtypes import BITS, nbytes, numpy_dtype
from xpuquant.formats.safetensors import Tensor
from xpuquant.values import frozen

Array = np.ndarray[Any, Any]

COMPRESSED_TENSORS = frozenset({"compressed-tensors", "compressed_tensors", "llm-compressor", "llmcompressor"})
"""Values of `quant_method` that the compressed-tensors library, and those who write for it, have used."""


@frozen(slots=True)
class Slice:
    """A box of one tensor along one axis: the unit in which source bytes are read.

    axis 0 is one run of bytes; axis 1 of a `[R, C]` tensor is R runs of `(stop - start)` elements.
    """

    tensor: Tensor
    start: int
    stop: int
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.tensor.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        return nbytes(self.tensor.dtype, self.shape)

    def of(self, values: Array) -> Array:
        """The box, of the whole tensor's values."""
        return values[(slice(None),) * self.axis + (slice(self.start, self.stop),)]

    def lines(self) -> tuple[int, int, int, int]:
        """Its runs of bytes in the file: (absolute offset of the first, length of each, bytes from the start of one to
        that of the next, how many)."""
        per_element = BITS[self.tensor.dtype]
        if self.axis == 0:
            row_bits = per_element * math.prod(self.tensor.shape[1:])
            length = (self.stop - self.start) * row_bits // 8
            return self.tensor.begin + self.start * row_bits // 8, length, length, 1
        rows, columns = self.tensor.shape
        pitch, length = columns * per_element // 8, (self.stop - self.start) * per_element // 8
        first = self.tensor.begin + self.start * per_element // 8
        return (first, rows * pitch, rows * pitch, 1) if length == pitch else (first, length, pitch, rows)

    def runs(self) -> list[tuple[int, int]]:
        """Byte runs in the file, (absolute offset, length), in order."""
        first, length, pitch, count = self.lines()
        return [(first + line * pitch, length) for line in range(count)]

    def inside(self, outer: Slice, array: Array) -> Array:
        """This slice as a view of `array`, which holds the wider slice `outer` of the same tensor and axis."""
        window = slice(self.start - outer.start, self.stop - outer.start)
        return array[(slice(None),) * self.axis + (window,)]


def whole(tensor: Tensor) -> Slice:
    """The slice that is the whole tensor (a 0-d tensor counts as one element)."""
    return Slice(tensor if tensor.shape else _as_vector(tensor), 0, tensor.shape[0] if tensor.shape else 1)


def rows(tensor: Tensor, start: int, stop: int) -> Slice:
    """Rows `start:stop` of axis 0."""
    return Slice(tensor, start, stop)


def columns(tensor: Tensor, start: int, stop: int) -> Slice:
    """Columns `start:stop` of a 2-D tensor."""
    return Slice(tensor, start, stop, axis=1)


def as_bytes(tensor: Tensor) -> Tensor:
    """The same bytes as a vector of them: of any dtype, some of which have several elements in one byte."""
    return Tensor(tensor.name, "U8", (tensor.nbytes,), tensor.file, tensor.begin, tensor.end)


def _as_vector(tensor: Tensor) -> Tensor:
    return Tensor(tensor.name, tensor.dtype, (1,), tensor.file, tensor.begin, tensor.end)


def as_array(part: Slice, data: bytes | bytearray | memoryview | Array) -> Array:
    """The bytes of a slice as an array of its dtype and shape (no copy)."""
    flat = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    if BITS[part.tensor.dtype] < 8:
        return flat
    return flat.view(numpy_dtype(part.tensor.dtype)).reshape(part.shape)


def _cannot_peek(tensor: Tensor) -> Array | None:
    return None


@frozen
class Checkpoint:
    """Headers and config of a source.

    config        `config.json`
    quantization  the quantization config, wherever it was found; empty when there is none
    tensors       name → tensor, in file order
    peek          a small tensor's values, or None where reading it would cost a download
    notes         what was odd about the files (unindexed shards, config files that disagree)
    known_as      name of a module → the name under which the config knows it, where that is another
    """

    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    peek: Callable[[Tensor], Array | None] = _cannot_peek
    notes: tuple[str, ...] = field(default=())
    known_as: Mapping[str, str] = field(default_factory=dict)

    @property
    def auto_class(self) -> str:
        """Transformers' class that loads the whole model. Of one that takes images too, the class of language models
        would load the text alone, or nothing."""
        architectures = self.config.get("architectures")
        first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
        if isinstance(self.config.get("vision_config"), Mapping) and not first.endswith("ForCausalLM"):
            return "AutoModelForImageTextToText"
        for head in ("SequenceClassification", "TokenClassification", "MaskedLM"):
            if first.endswith(f"For{head}"):
                return f"AutoModelFor{head}"
        return "AutoModel" if first.endswith("Model") else "AutoModelForCausalLM"

    @property
    def method(self) -> str:
        """`quant_method` in lower case, with hyphens, without the engine's kernel in it (`gptq_marlin` is `gptq`,
        `intel/auto-round` is `auto-round`); empty when the config names none."""
        method = self.quantization.get("quant_method") or self.quantization.get("method") or ""
        name = str(method).lower().rpartition("/")[2].replace("_", "-")
        return name.removesuffix("-marlin")

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of a (possibly multimodal) config."""
        text = self.config.get("text_config")
        return text if isinstance(text, dict) else self.config
