"""What becomes of a source, as answers: the plan of a conversion, and the tables that other answers share with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.cli.output import Answer
from xpuquant.conversion.cli.tables import TextTable
from xpuquant.conversion.results import ModuleOutcome, Planned
from xpuquant.conversion.sizes import counted, size
from xpuquant.formats.scheme import compact
from xpuquant.formats.weights.base import PIECE_BYTES

if TYPE_CHECKING:
    from xpuquant.conversion.inspection import Inspection
    from xpuquant.served_families import Tried

_ON_THE_WAY_BYTES = 16 << 20
"""Per worker: pieces made ahead, blocks before the disk."""

_MAX_SHARDS = 30
_MAX_MATRICES = 8


def planned(plan: Planned, out: Path, jobs: int, part: str | None = None) -> Answer:
    """`convert --dry-run`, of all or of a part."""
    shards = TextTable(
        "output shards" if part is None else f"output shards of part {part}",
        ("file", "tensors", "size"),
        [(shard.name, str(len(shard.tensors)), size(shard.nbytes)) for shard in plan.shards],
        most=_MAX_SHARDS,
    )
    memory = jobs * (PIECE_BYTES + _ON_THE_WAY_BYTES)
    facts = TextTable(
        "",
        ("", ""),
        (
            ("left as is", left_alone(plan)),
            ("reads", size(plan.read_bytes)),
            ("writes", f"{size(plan.write_bytes)} to {out}"),
            ("buffers", f"about {size(memory)} with {jobs} jobs, whatever the size of the model"),
        ),
    )
    return Answer(
        [*notes(plan.notes), modules_table(plan.modules), *engines_table(plan.engines), shards, facts],
        plan_data(plan) | {"out": str(out)} | ({} if part is None else {"part": part}),
        str(out),
    )


def modules_table(modules: Iterable[ModuleOutcome]) -> TextTable:
    """Modules per scheme: what they were, what they become, which kernel will run them."""
    rows: dict[tuple[str, str, str, str], list[ModuleOutcome]] = {}
    for module in modules:
        stored = module.scheme or "bf16 (dequantized)"
        key = (module.source, stored, module.kernel or "bf16 matmul", module.releases or "any")
        rows.setdefault(key, []).append(module)
    return TextTable(
        "modules",
        ("source", "stored as", "XPU kernel", "vllm-xpu-kernels", "modules", "size"),
        [(*key, str(len(members)), size(sum(member.nbytes for member in members))) for key, members in rows.items()],
    )


def engines_table(engines: Iterable[Tried]) -> list[TextTable]:
    """What is known of the engines that load the result; nothing where there is nothing to say."""
    rows = [(f"{one.engine} {one.version}", str(one)) for one in engines]
    return [TextTable("tried with a tiny model of this architecture", ("engine", "outcome"), rows)] if rows else []


def engines_data(engines: Iterable[Tried]) -> list[dict[str, str]]:
    """The same as JSON."""
    return [asdict(one) for one in engines]


def left_alone(plan: Planned) -> str:
    """What stays unquantized, and why."""
    if not plan.passed:
        return "nothing"
    total = sum(tensor.nbytes for tensor in plan.passed)
    matrices = compact(tensor.name.removesuffix(".weight") for tensor in plan.passed if len(tensor.shape) >= 2)
    vectors = sum(len(tensor.shape) < 2 for tensor in plan.passed)
    shown = matrices[:_MAX_MATRICES]
    shown += [f"and {len(matrices) - _MAX_MATRICES} more"] * (len(matrices) > _MAX_MATRICES)
    shown += [counted(vectors, "vector, such as a norm's", "vectors, such as those of norms")] * bool(vectors)
    said = ", ".join(shown)
    return f"{counted(len(plan.passed), 'tensor')} ({size(total)}), not quantized in the source: {said}"


def plan_data(plan: Planned) -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "source": source_data(plan),
        "options": plan.options.as_dict(),
        "modules": {module.name: module_data(module) for module in plan.modules},
        "passed_tensors": [tensor.name for tensor in plan.passed],
        "notes": list(plan.notes),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "engines": engines_data(plan.engines),
        "output": [
            {
                "file": shard.name,
                "bytes": shard.nbytes,
                "tensors": [
                    {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape} for tensor in shard.tensors
                ],
            }
            for shard in plan.shards
        ],
    }


def source_data(of: Planned | Inspection) -> dict[str, Any]:
    """A source as JSON."""
    return {"name": of.source.name, "revision": of.source.revision, "bytes": of.source.nbytes}


def module_data(module: ModuleOutcome) -> dict[str, Any]:
    """What becomes of a module, as JSON."""
    return {
        "source": module.source,
        "scheme": module.scheme,
        "kernel": module.kernel,
        "releases": module.releases,
        "bytes": module.nbytes,
        "decisions": list(module.decisions),
    }


def notes(said: Sequence[str]) -> list[str]:
    """Remarks as lines."""
    return [f"note: {note}" for note in said]
