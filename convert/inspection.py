"""`xpuquant inspect`: what a checkpoint is and what would become of it, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from xpuquant.conversion.cli.answers import modules_grid
from xpuquant.conversion.cli.output import Answer, Grid
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.survey import survey
from xpuquant.conversion.plan.tensor_parallel import problems
from xpuquant.conversion.sizes import size
from xpuquant.conversion.sources.base import Source
from xpuquant.formats.scheme import compact

_RANKS = (2, 4, 8)


def inspect(source: Source, options: Options, ranks: Sequence[int] = _RANKS) -> Answer:
    """Survey a source.

    Args:
        ranks: tensor-parallel sizes to check.

    Raises:
        UsageError: not a quantized checkpoint. DamagedError: not a sound one.
    """
    checkpoint = source.checkpoint
    planned, refused, reading = survey(checkpoint, options)
    formats = sorted({weight.format for weight in reading.weights})
    decisions = Counter(fact for weight in reading.weights for fact in weight.facts)
    verdict = "no: some modules have no exact XPU layout" if refused else "yes, exactly"
    if planned and any(module.conversion.scheme is None for module in planned):
        verdict = "yes, with some modules dequantized to bf16"
    facts = Grid(
        "",
        ("", ""),
        (
            ("checkpoint", source.name),
            ("model", f"{checkpoint.config.get('model_type', 'unknown')}, {len(checkpoint.tensors)} tensors"),
            ("format", f"{', '.join(formats) or 'unknown'} (config.json says '{checkpoint.method}')"),
            ("size", size(source.nbytes)),
            ("converts", verdict),
        ),
    )
    parts: list[str | Grid] = [facts, *(f"note: {note}" for note in checkpoint.notes)]
    if planned:
        parts.append(modules_grid(planned))
    if refused:
        by_reason: dict[str, list[str]] = {}
        for name, reason in refused.items():
            by_reason.setdefault(reason, []).append(name)
        rows = [(reason, str(len(names)), ", ".join(compact(names)[:6])) for reason, names in by_reason.items()]
        parts.append(Grid("refused", ("reason", "modules", "which"), rows))
    if decisions:
        common = [(fact, str(count)) for fact, count in decisions.most_common(12)]
        parts.append(Grid("decided from the tensors", ("what", "matrices"), common))
    splits = {size_: problems(planned, size_) for size_ in ranks}
    parts.append(Grid("tensor parallel", ("GPUs", "splits"), [(str(n), _split(found)) for n, found in splits.items()]))
    data = {
        "source": {"name": source.name, "revision": source.revision, "bytes": source.nbytes},
        "model_type": checkpoint.config.get("model_type"),
        "quant_method": checkpoint.method,
        "formats": formats,
        "converts": not refused,
        "modules": {
            module.conversion.name: module.conversion.scheme.label() if module.conversion.scheme else "bf16"
            for module in planned
        },
        "refused": refused,
        "decisions": dict(decisions),
        "tensor_parallel": {str(n): found for n, found in splits.items()},
        "notes": list(checkpoint.notes),
    }
    return Answer(parts, data)


def _split(found: dict[str, str]) -> str:
    if not found:
        return "yes"
    name, problem = next(iter(found.items()))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"no: {name}: {problem}{more}"
