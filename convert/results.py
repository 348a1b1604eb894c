"""What the functions of `xpuquant` return: frozen data, without the machinery that made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.plan.served_by import engines_of, kernel_and_releases
from xpuquant.conversion.plan.survey import PlannedModule, kind_of
from xpuquant.conversion.repo.journal import Finished
from xpuquant.served_families import Tried
from xpuquant.values import frozen

if TYPE_CHECKING:
    from xpuquant.conversion.hub.publish import Pushed
    from xpuquant.conversion.sources.base import Source
    from xpuquant.conversion.verify.verdict import Verdict


@frozen(slots=True, sealed=True)
class SourceInfo:
    """A checkpoint.

    name      a folder, or a repo id on the Hub
    revision  the commit a repo id was resolved to; None for a folder
    nbytes    bytes of its shards
    auto_class  Transformers' class that loads the whole model
    """

    name: str
    revision: str | None
    nbytes: int
    auto_class: str = "AutoModelForCausalLM"


@frozen(slots=True, sealed=True)
class TensorInfo:
    """A tensor.

    dtype  safetensors label (`I32`, `BF16`, `F8_E4M3`, ...)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@frozen(slots=True, sealed=True)
class ModuleOutcome:
    """What becomes of one quantized module.

    source     what it was, e.g. `int4 g128 symmetric`
    scheme     what it is stored as, e.g. `int4_linear g128`; None where it is dequantized to bf16
    kernel     the XPU kernel that reads it; None where it is dequantized
    releases   of vllm-xpu-kernels that serve it, e.g. `0.1.15.1 to 0.1.16.x`, then those of auto-round-lib where its
               kernels compute it; None where that is stock vLLM's affair
    nbytes     bytes it is stored in
    decisions  what was decided from its tensors
    matrices   matrices it holds: one, or those of a stack of experts
    """

    name: str
    source: str
    scheme: str | None
    kernel: str | None
    releases: str | None
    nbytes: int
    decisions: tuple[str, ...]
    matrices: int = 1


@frozen(slots=True, sealed=True)
class ShardInfo:
    """A file of the output: its name, its size with the header, its tensors in order."""

    name: str
    nbytes: int
    tensors: tuple[TensorInfo, ...]


@frozen(sealed=True)
class Planned:
    """What a conversion writes, and from what.

    modules      every quantized module
    passed       tensors that keep their bytes
    shards       the files of the output
    notes        what was odd about the source
    read_bytes   bytes of the source that are read
    write_bytes  bytes of all shards
    engines      what versions of engines are known to do with a model of this architecture; empty where the output is
                 stock engines' affair
    """

    source: SourceInfo
    options: Options
    modules: tuple[ModuleOutcome, ...]
    passed: tuple[TensorInfo, ...]
    shards: tuple[ShardInfo, ...]
    notes: tuple[str, ...]
    read_bytes: int
    write_bytes: int
    engines: tuple[Tried, ...] = ()


@frozen(sealed=True)
class Converted:
    """A finished conversion.

    plan     what was written: see `modules` there for the outcome of each
    out      the folder; None where it is only on the Hub
    shards   file name → sha256 and size
    verdict  of the verification; None where it was not asked for, or was an earlier run's: `xpuquant.verify`
             checks that again
    pushed   what was published on the Hub; None where that was not asked for
    is_new   False where an earlier run had converted it already, and this one only published
    kept     of an earlier run that was stopped: file name → bytes that were found sound and not made again
    """

    plan: Planned
    out: Path | None
    shards: Mapping[str, Finished]
    verdict: Verdict | None
    pushed: Pushed | None = None
    is_new: bool = True
    kept: Mapping[str, int] = field(default_factory=dict)


@frozen(sealed=True)
class PartConverted:
    """One part of a conversion, staged in `out`.

    part    `i/n`
    source  the checkpoint's name
    shards  those of this part: file name → sha256 and size
    of      number of shards in the whole output
    nbytes  bytes of this part's shards
    """

    part: str
    source: str
    out: Path
    shards: Mapping[str, Finished]
    of: int
    nbytes: int


def source_info(source: Source) -> SourceInfo:
    """A source as data."""
    return SourceInfo(source.name, source.revision, source.nbytes, source.checkpoint.auto_class)


def module_outcomes(modules: Iterable[PlannedModule], config: Mapping[str, Any]) -> tuple[ModuleOutcome, ...]:
    """Planned modules of a model with that config.json, as data."""
    return tuple(_module(module, config) for module in modules)


def _module(planned: PlannedModule, config: Mapping[str, Any]) -> ModuleOutcome:
    conversion, scheme = planned.conversion, planned.conversion.scheme
    kernel, releases = kernel_and_releases(conversion.name, scheme, config)
    return ModuleOutcome(
        conversion.name,
        kind_of(planned.source),
        None if scheme is None else scheme.label(),
        kernel,
        releases,
        planned.nbytes,
        tuple(conversion.facts),
        len(planned.weights),
    )


def summary(plan: Plan, source: Source) -> Planned:
    """A plan as data."""
    return Planned(
        source_info(source),
        plan.options,
        module_outcomes(plan.modules, source.checkpoint.config),
        tuple(TensorInfo(t.name, t.dtype, t.shape, t.nbytes) for t in plan.passed),
        tuple(
            ShardInfo(
                shard.name,
                shard.nbytes,
                tuple(TensorInfo(t.name, t.dtype, tuple(t.shape), t.nbytes) for t in shard.tensors),
            )
            for shard in plan.shards
        ),
        tuple(plan.notes),
        plan.read_bytes,
        plan.write_bytes,
        engines_of(plan.modules, plan.options, source.checkpoint),
    )
