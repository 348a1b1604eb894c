"""The answers of `explain` and of `formats`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from xpuquant.conversion.cli.output import Answer
from xpuquant.conversion.cli.tables import TextTable
from xpuquant.conversion.sizes import size

if TYPE_CHECKING:
    from xpuquant.conversion.explanation import Explanation
    from xpuquant.conversion.results import TensorInfo
    from xpuquant.formats.layouts.base import Layout
    from xpuquant.formats.readers.base import Reader

_MAX_TENSORS = 20


def explained(found: Explanation) -> Answer:
    """The end of `explain`."""
    facts = [("module", found.name)]
    if found.outcome is None:
        facts.append(("refused", found.refused or ""))
        brief = f"{found.name} is refused: {found.refused}"
    else:
        stored = found.outcome.scheme or "bf16 (dequantized)"
        facts += [
            ("is", found.outcome.source),
            ("stored as", f"{stored}, {size(found.outcome.nbytes)}"),
            ("XPU kernel", found.outcome.kernel or "bf16 matmul"),
            ("vllm-xpu-kernels", found.outcome.releases or "any"),
        ]
        brief = f"{found.name}: {found.outcome.source} → {stored}"
    parts: list[str | TextTable] = [TextTable("", ("", ""), facts)]
    if found.outcome is not None:
        parts.append(TextTable("decided from its tensors", ("",), [(fact,) for fact in found.outcome.decisions]))
    parts.append(_table("made of", found.tensors))
    if found.written:
        parts.append(_table("written as", found.written))
    return Answer(parts, asdict(found), brief)


def _table(title: str, tensors: Sequence[TensorInfo]) -> TextTable:
    rows = [(tensor.name, tensor.dtype, str(list(tensor.shape)), size(tensor.nbytes)) for tensor in tensors]
    return TextTable(title, ("tensor", "dtype", "shape", "size"), rows, most=_MAX_TENSORS)


def _by_format(readers: Sequence[Reader]) -> list[tuple[str, str, str]]:
    """A row for each format, however many readers it has."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for reader in readers:
        methods, suffixes = found.setdefault(reader.name, (set(), set()))
        methods.update(reader.methods)
        suffixes.update(reader.suffixes)
    return [
        (name, ", ".join(sorted(methods)), ", ".join(sorted(suffixes))) for name, (methods, suffixes) in found.items()
    ]


def formats_known(readers: Sequence[Reader], layouts: Sequence[Layout]) -> Answer:
    """The end of `formats`: what is read and what is written, as the registries list it."""
    read = [(one.name, ", ".join(sorted(one.methods)), ", ".join(sorted(one.suffixes))) for one in readers]
    written = [(one.name, one.family, one.kernel) for one in layouts]
    data = {
        "readers": [{"name": name, "quant_methods": methods, "tensors": tensors} for name, methods, tensors in read],
        "layouts": [{"name": name, "family": family, "kernel": kernel} for name, family, kernel in written],
    }
    return Answer(
        [
            TextTable(
                "what is read", ("format", "quant_method", "tensors beside weight and bias"), _by_format(readers)
            ),
            TextTable("what is written", ("layout", "--layout", "read by"), written),
            "what converts exactly depends on the tensors: xpuquant inspect SRC",
        ],
        data,
        f"reads {', '.join(dict.fromkeys(name for name, _, _ in read))}",
    )
