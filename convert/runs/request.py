"""What was asked for, and the one place that decides what runs: a part, a stream, a cluster, or all of it here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from xpuquant.conversion.options import Options, default_jobs
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.staging import check_output
from xpuquant.conversion.results import Converted, PartConverted, Planned, summary
from xpuquant.conversion.runs.local import Executor, convert_checkpoint, downloaded
from xpuquant.conversion.runs.parts import Part, check_parts, make_part, parts_options
from xpuquant.conversion.runs.publishing import Destination, converted_shards, push_folder
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.write.execute import execute_plan
from xpuquant.errors import UsageError


@dataclass(frozen=True)
class ConvertRequest:
    """A conversion as it was asked for.

    source       folder, or repo id on the Hub at `revision`
    out          folder to write; None: the source's name with the layout's, in the current folder
    jobs         workers; 0: one per core, at most 8
    verify       check every value of the output
    force        replace an earlier conversion in `out`
    part         make only this part
    ray          address of a Ray cluster to run on; empty: this machine
    stream       keep only the shards in use
    destination  where to publish the result
    command      for the card; empty: the command line that asks for the same

    Raises:
        UsageError: things that exclude each other.
    """

    source: str
    out: Path | None = None
    options: Options = field(default_factory=Options)
    revision: str | None = None
    jobs: int = 0
    verify: bool = True
    force: bool = False
    part: Part | None = None
    ray: str = ""
    stream: bool = False
    destination: Destination | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.stream and (self.ray or self.part):
            raise UsageError("--stream makes one shard after the other; it goes with neither --ray nor --shard")

    @property
    def workers(self) -> int:
        return self.jobs or default_jobs()

    @property
    def target(self) -> Path:
        """The folder to write."""
        return self.out or default_output(self.source, self.options.layout)

    def card_command(self) -> str:
        """What the card says how this was made."""
        return self.command or command_line(self)


@dataclass(frozen=True)
class FinishRequest:
    """Parts to be put together, as it was asked for. Fields as in `ConvertRequest`.

    told  argument of `Options.parse` → value that was given again: the parts' own must be the same
    """

    source: str
    out: Path
    revision: str | None = None
    jobs: int = 0
    verify: bool = True
    command: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)


def plan_only(request: ConvertRequest) -> Planned:
    """What a conversion would write, from headers alone; nothing is written.

    Raises: as `make_plan`; EnvironmentFault: the Hub cannot be reached.
    """
    source = _open(request)
    return summary(make_plan(source.checkpoint, request.options), source)


def run(request: ConvertRequest, reporter: Reporter) -> Converted | PartConverted:
    """Convert as asked: a part, or all of it.

    Raises: as `convert`.
    """
    return convert(request, reporter) if request.part is None else convert_one_part(request, reporter)


def convert_one_part(request: ConvertRequest, reporter: Reporter) -> PartConverted:
    """Make the part that was asked for.

    Raises: as `make_part`.
    """
    assert request.part is not None
    opened, out = _open(request), request.target
    check_output(out, force=True)
    source = downloaded(opened, request.options, reporter)
    return make_part(source, out, request.options, request.part, jobs=request.workers, reporter=reporter)


def convert(request: ConvertRequest, reporter: Reporter) -> Converted:
    """Convert as asked: streamed, on a cluster or here; only publish what an earlier run has converted.

    Raises: as `convert_checkpoint`, and with a destination as `publish.push`.
    """
    opened, out, options = _open(request), request.target, request.options
    if request.destination is not None and not request.force:
        shards = converted_shards(out, opened, options)
        if shards is not None:  # an earlier run came as far as publishing
            plan = summary(make_plan(opened.checkpoint, options), opened)
            pushed = push_folder(out, request.destination, reporter)
            return Converted(plan, out, shards, None, pushed, is_new=False)
    if request.stream:
        return _run_streamed(request, opened, reporter)
    check_output(out, request.force)
    converted = convert_checkpoint(
        downloaded(opened, options, reporter),
        out,
        options,
        jobs=request.workers,
        verify=request.verify,
        force=request.force,
        reporter=reporter,
        command=request.card_command(),
        executor=_executor(request),
    )
    if request.destination is None:
        return converted
    return replace(converted, pushed=push_folder(out, request.destination, reporter))


def put_together(request: FinishRequest, reporter: Reporter) -> Converted:
    """Put the parts of a conversion together, with the options that stand in their journals.

    Raises: as `convert_checkpoint`; UsageError: no part was converted there, or parts of something else;
        DamagedError: some shards have not been made.
    """
    opened = open_source(request.source, request.revision)
    options = parts_options(request.out, request.told)
    source = downloaded(opened, options, reporter)
    check_parts(source, options, request.out)
    return convert_checkpoint(
        source,
        request.out,
        options,
        jobs=request.jobs or default_jobs(),
        verify=request.verify,
        reporter=reporter,
        command=request.command or shlex.join(["xpuquant", "finish", request.source, str(request.out)]),
    )


def default_output(name: str, layout: str) -> Path:
    """`Qwen3-8B-GPTQ` → `Qwen3-8B-GPTQ-xpu` in the current folder."""
    return Path(f"{Path(name).resolve().name if Path(name).exists() else name.rpartition('/')[2]}-{layout}")


def command_line(request: ConvertRequest) -> str:
    """The command line that asks for the same bytes."""
    words = ["xpuquant", "convert", request.source, str(request.target), *request.options.as_arguments()]
    return shlex.join(words if request.revision is None else [*words, "--revision", request.revision])


def _open(request: ConvertRequest) -> Source:
    source: Source = open_source(request.source, request.revision, request.stream)
    if request.destination is not None:
        request.destination.check_source(source.name)
    return source


def _run_streamed(request: ConvertRequest, source: Source, reporter: Reporter) -> Converted:
    from xpuquant.conversion.runs.streamed import convert_streaming
    from xpuquant.conversion.sources.streamed import StreamedSource

    if not isinstance(source, StreamedSource):
        raise UsageError("--stream needs the Hub; HF_HUB_OFFLINE is set, and the cache holds the model: leave it away")
    return convert_streaming(
        source,
        request.target,
        request.options,
        jobs=request.workers,
        verify=request.verify,
        force=request.force,
        reporter=reporter,
        command=request.card_command(),
        destination=request.destination,
    )


def _executor(request: ConvertRequest) -> Executor:
    if not request.ray:
        return execute_plan
    from xpuquant.conversion.runs.ray import execute_on_ray

    return partial(execute_on_ray, address=request.ray)
