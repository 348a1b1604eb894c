"""The answer of `inspect`: what a checkpoint is, and what would become of it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from xpuquant.conversion.cli.output import Answer, Typed
from xpuquant.conversion.cli.plan_answers import (
    engines_data,
    engines_table,
    module_data,
    modules_table,
    notes,
    source_data,
)
from xpuquant.conversion.cli.tables import TextTable
from xpuquant.conversion.gpus import EXPERT_GENERATIONS, GPUS, KEPT_FREE, USED, Gpu
from xpuquant.conversion.plan.survey import modules_have
from xpuquant.conversion.rates import START_SECONDS
from xpuquant.conversion.repo.description import ConvertedRepo
from xpuquant.conversion.sizes import counted, duration, size
from xpuquant.formats.scheme import compact, expand

if TYPE_CHECKING:
    from xpuquant.conversion.inspection import Inspection
    from xpuquant.conversion.results import ModuleOutcome, SourceInfo

_MAX_DECISIONS = 12
_MAX_PATTERNS = 8


_NO_REPORT = "nothing: there is none, as after a conversion without verification"
"""Who can write a repo's files can write its report too: `inspect` reads it, and checks nothing."""


def inspected(found: Inspection | ConvertedRepo) -> Answer:
    """The end of `inspect`."""
    return _converted_repo(found) if isinstance(found, ConvertedRepo) else _checkpoint(found)


def _converted_repo(found: ConvertedRepo) -> Answer:
    repo, origin = found.repo, found.origin
    asked = [] if found.options is None else [str(argument) for argument in found.options.asked()]
    what = f"converted by {found.producer}"
    facts = [
        ("repo", at_commit(repo)),
        ("is", f"{what}{' with ' * bool(asked)}{', '.join(asked)}"),
        ("from", f"{at_commit(origin)}, {size(origin.nbytes)}"),
        (
            "size",
            f"{size(repo.nbytes)}, {_modules(found.modules)}, {counted(found.plain, 'other tensor')}",
        ),
        ("its report says", found.verified or _NO_REPORT),
        *((f"served by {name}", versions) for name, versions in found.needs.items()),
    ]
    check = Typed(f"check it:  xpuquant verify {shlex.quote(repo.name)}")
    serve = Typed(f"serve it:  vllm serve {shlex.quote(repo.name)}")
    data = {
        "repo": asdict(repo),
        "from": asdict(origin),
        "options": None if found.options is None else found.options.as_dict(),
        "producer": found.producer,
        "verified": found.verified,
        "needs": dict(found.needs),
        "modules": {module.name: module_data(module) for module in found.modules},
    }
    return Answer(
        [TextTable("", ("", ""), facts), modules_table(found.modules), check, serve],
        data,
        f"{what} from {at_commit(origin)}; its report says: {found.verified or _NO_REPORT}",
    )


def _modules(modules: Sequence[ModuleOutcome]) -> str:
    """`6 quantized modules, 1 dequantized`."""
    dequantized = sum(module.scheme is None for module in modules)
    said = counted(len(modules) - dequantized, "quantized module")
    return f"{said}, {dequantized:,} dequantized" if dequantized else said


def at_commit(info: SourceInfo) -> str:
    """A source by its name, and the commit of one on the Hub."""
    return info.name if info.revision is None else f"{info.name} at {info.revision[:12]}"


def _checkpoint(found: Inspection) -> Answer:
    verdict = "yes, every module has an exact layout"
    if found.refused:
        verdict = f"no: {modules_have(len(found.refused))} no exact XPU layout"
    if any(module.scheme is None for module in found.modules):
        verdict = "yes, with some modules dequantized to bf16"
    says = f"config.json says '{found.quant_method}'"
    facts = TextTable(
        "",
        ("", ""),
        (
            ("checkpoint", found.source.name),
            ("model", f"{found.model_type or 'unknown'}, {counted(found.tensors, 'tensor')}"),
            ("format", f"{', '.join(found.formats) or 'unknown'} ({says})"),
            ("size", size(found.source.nbytes)),
            ("converts", verdict),
        ),
    )
    parts: list[str | TextTable] = [facts, *notes(found.notes)]
    if found.modules:
        parts.append(modules_table(found.modules))
    if found.refused:
        by_reason: dict[str, list[str]] = {}
        for name, reason in found.refused.items():
            by_reason.setdefault(reason, []).append(name)
        rows = [(reason, str(len(names)), _patterns(names)) for reason, names in by_reason.items()]
        parts += [TextTable("refused", ("reason", "modules", "which"), rows), _remedy(found)]
    if found.decisions:
        decided = [(fact, str(count)) for fact, count in Counter(found.decisions).most_common()]
        parts.append(TextTable("decided from the tensors", ("what", "matrices"), decided, most=_MAX_DECISIONS))
    if found.converts:
        parts += engines_table(found.engines)
        start = f"{duration(START_SECONDS)} of it to start and to load kernels"
        took = f"about {duration(found.seconds)} on two cores, verified, {start}; {size(found.nbytes)} of disk"
        parts += [f"converting takes {took}", *_memory(found)]
    data = {
        "source": source_data(found),
        "model_type": found.model_type,
        "quant_method": found.quant_method,
        "formats": list(found.formats),
        "converts": found.converts,
        "modules": {module.name: module.scheme or "bf16" for module in found.modules},
        "refused": found.refused,
        "dequantized_bytes": found.dequantized_bytes,
        "decisions": found.decisions,
        "tensor_parallel": {str(n): problems for n, problems in found.tensor_parallel.items()},
        "notes": list(found.notes),
        "engines": engines_data(found.engines),
        "bytes": found.nbytes,
        "seconds": found.seconds,
        "fits": [asdict(fit) for fit in found.fits],
    }
    return Answer(parts, data, f"converts: {verdict}")


def _memory(found: Inspection) -> list[str | TextTable]:
    """What each GPU holds, and which GPUs hold it."""
    fits = {fit.gpus: fit for fit in found.fits}
    rows = []
    for n, problems in found.tensor_parallel.items():
        fit = fits.get(n)
        cache = "" if fit is None else "not known" if fit.kv_cache is None else size(fit.kv_cache)
        rows.append((str(n), _split(problems), "" if fit is None else size(fit.weights), cache))
    if not fits:
        return [TextTable("tensor parallel", ("GPUs", "splits"), [row[:2] for row in rows])]
    tokens = f"{found.fits[0].tokens:,} tokens"
    served = [gpu for gpu in GPUS if gpu.computes_experts or not found.has_experts]
    ways = [("GPUs needed", False, False), ("with an fp8 KV cache", True, False), ("as int4", False, True)]
    helps = any(_needed(found, gpu, False, True) != _needed(found, gpu, False, False) for gpu in served)
    ways = ways if helps else ways[:-1]
    cards = [(gpu.name, f"{gpu.gib} GiB", *(_needed(found, gpu, fp8, int4) for _, fp8, int4 in ways)) for gpu in served]
    return [
        TextTable("on each GPU", ("GPUs", "splits", "weights", f"KV cache of {tokens}"), rows),
        TextTable("GPUs that hold it", ("GPU", "memory", *(title for title, _, _ in ways)), cards),
        f"counted: weights and {tokens} of KV cache, in {USED:.0%} of the memory, less {size(KEPT_FREE)} for work",
        *(["as int4: were the model quantized to 4 bits in groups of 128 instead, which xpuquant does not do"] * helps),
        *_left_out([gpu for gpu in GPUS if gpu not in served]),
    ]


def _left_out(gpus: list[Gpu]) -> list[str]:
    """Why some GPUs are not listed."""
    if not gpus:
        return []
    generations = " and ".join(EXPERT_GENERATIONS)
    return [f"not listed: {', '.join(gpu.name for gpu in gpus)}; experts are computed on {generations} only"]


def _needed(found: Inspection, gpu: Gpu, fp8: bool, int4: bool) -> str:
    """The smallest number of GPUs that hold the model."""
    enough = [fit.gpus for fit in found.fits if fit.held_by(gpu.usable, fp8, int4)]
    return str(min(enough)) if enough else f"more than {max(fit.gpus for fit in found.fits)}"


def _split(problems: Mapping[str, str]) -> str:
    if not problems:
        return "yes"
    name, problem = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"no: {name}: {problem}{more}"


def _patterns(names: list[str]) -> str:
    """Modules as compact patterns; how many are in those that are not shown is said."""
    patterns = compact(names)
    hidden = sum(len(expand(pattern)) for pattern in patterns[_MAX_PATTERNS:])
    return ", ".join(patterns[:_MAX_PATTERNS]) + (f", and {hidden} more (--json lists them all)" if hidden else "")


def _remedy(found: Inspection) -> str:
    """What can be done about refused modules, and what it costs."""
    if found.dequantized_bytes is None:
        return "not all of them can be stored as bf16 either: nothing converts this checkpoint"
    return (
        f"--on-unsupported dequantize stores them as bf16: {size(found.dequantized_bytes)} of weights that are "
        f"{size(found.refused_bytes)} here, and no XPU kernel for quantized weights runs them"
    )
