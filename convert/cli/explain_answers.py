"""The answers of `explain` and of `formats`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from xpuquant.conversion.cli.inspect_answers import at_commit
from xpuquant.conversion.cli.output import Answer
from xpuquant.conversion.cli.tables import TextTable
from xpuquant.conversion.sizes import size

if TYPE_CHECKING:
    from xpuquant.conversion.explanation import Explanation
    from xpuquant.conversion.repo.description import StoredModule
    from xpuquant.conversion.results import ModuleOutcome, TensorInfo
    from xpuquant.formats.layouts.base import Layout
    from xpuquant.formats.readers.base import Reader

_MAX_TENSORS = 20


def explained(found: Explanation) -> Answer:
    """The end of `explain`, of a checkpoint's module."""
    facts = [("module", found.name)]
    if found.outcome is None:
        facts.append(("refused", found.refused or ""))
        brief = f"{found.name} is refused: {found.refused}"
    else:
        facts += [("is", found.outcome.source), *_kept(found.outcome)]
        brief = f"{found.name}: {found.outcome.source} → {_scheme(found.outcome)}"
    parts: list[str | TextTable] = [TextTable("", ("", ""), facts)]
    if found.outcome is not None:
        parts.append(TextTable("decided from its tensors", ("",), [(fact,) for fact in found.outcome.decisions]))
    parts.append(_table("made of", found.tensors))
    if found.written:
        parts.append(_table("written as", found.written))
    return Answer(parts, asdict(found), brief)


def stored_module(found: StoredModule) -> Answer:
    """The end of `explain`, of a converted repo's module."""
    one, origin = found.outcome, found.origin
    facts = [("module", found.name), ("was", f"{one.source} in {at_commit(origin)}"), *_kept(one)]
    return Answer(
        [
            TextTable("", ("", ""), facts),
            TextTable("was decided from its tensors", ("",), [(fact,) for fact in one.decisions]),
            TextTable("was made of", ("",), [(name,) for name in found.source_tensors], most=_MAX_TENSORS),
            _table("lies in", found.stored),
        ],
        asdict(found),
        f"{found.name}: {one.source} → {_scheme(one)}",
    )


def _scheme(outcome: ModuleOutcome) -> str:
    return outcome.scheme or "bf16 (dequantized)"


def _kept(outcome: ModuleOutcome) -> list[tuple[str, str]]:
    """What it is stored as, and what reads that."""
    return [
        ("stored as", f"{_scheme(outcome)}, {size(outcome.nbytes)}"),
        ("XPU kernel", outcome.kernel or "bf16 matmul"),
        ("vllm-xpu-kernels", outcome.releases or "any"),
    ]


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
