"""`convert`, `finish` and `inspect`: arguments in, an `Answer` to the sink."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from xpuquant.conversion.cli import push_command
from xpuquant.errors import UsageError

DEFAULT_JOBS = max(1, min(8, len(os.sched_getaffinity(0))))
"""A worker per core; beyond 8 the disk is the limit."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Jobs = Annotated[int, typer.Option(min=1, max=256, help="Workers (default: one per core, at most 8).")]
SourceName = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder with a quantized checkpoint, or OWNER/NAME on the Hub.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of SRC on the Hub (default: main).")]
LayoutName = Annotated[
    str,
    typer.Option("--layout", help="Layout to write: xpu, or compressed-tensors, which stock loaders read."),
]
OnUnsupported = Annotated[
    str, typer.Option(help="Modules no XPU kernel takes: refuse, or dequantize them to bf16 (lossy).")
]

ScaleDtype = Annotated[str, typer.Option(help="keep the source's, or round scales to float16, bfloat16, float32.")]
MaxShardSize = Annotated[str, typer.Option(help="Largest output file, e.g. 5GB or 512MiB.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Check every value of the output.")]
FoldActOrder = Annotated[
    bool,
    typer.Option(
        "--fold-act-order",
        help="Store an MLP's rows in the order its act-order down_proj wants: exact, and no permutation at run time. "
        "Adapters trained on the source no longer fit.",
    ),
]


def convert(
    source: SourceName,
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Folder to write (default: SRC-xpu).")] = None,
    layout: LayoutName = "xpu",
    scale_dtype: ScaleDtype = "keep",
    on_unsupported: OnUnsupported = "refuse",
    max_shard_size: MaxShardSize = "5GB",
    fold_act_order: FoldActOrder = False,
    jobs: Jobs = DEFAULT_JOBS,
    verify: Verify = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion in OUT.")] = False,
    ray: Annotated[str, typer.Option(help="Run on a Ray cluster: its address, auto, or local.")] = "",
    part: Annotated[str, typer.Option("--shard", help="Make only part i/n; `finish` puts parts together.")] = "",
    revision: Revision = None,
    push_to: Annotated[
        str | None, typer.Option(metavar="REPO", help="Publish the result on the Hub as OWNER/NAME.")
    ] = None,
    private: push_command.Private = True,
    branch: push_command.Branch = None,
    pr: push_command.PullRequest = False,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Keep only the shards of SRC in use; with --push-to, of the output too."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Convert, verify and write a ready-to-load repo. Run it again to resume after an interruption."""
    from functools import partial

    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.options import Options
    from xpuquant.conversion.plan.plan import make_plan
    from xpuquant.conversion.repo.journal import check_output
    from xpuquant.conversion.runs import local
    from xpuquant.conversion.sources.base import Source
    from xpuquant.conversion.sources.open import open_source
    from xpuquant.conversion.write import execute

    options = Options.parse(layout, scale_dtype, on_unsupported, max_shard_size, fold_act_order)
    output = Output(as_json)
    destination = push_command.Destination(push_to, private, branch, pr) if push_to else None
    opened: Source = open_source(source, revision, stream)
    if destination is not None:
        destination.check_source(opened.name)
    if dry_run:
        output.answer(answers.planned(make_plan(opened.checkpoint, options), opened, jobs))
        return
    target = out or local.default_output(source, layout)
    if destination is not None and not force and push_command.is_converted(target, opened, options):
        # An earlier run came as far as publishing.
        with output.progress() as progress:
            pushed = push_command.push_folder(target, destination, progress)
        output.answer(push_command.pushed_answer(pushed))
        return
    if stream:
        if ray or part:
            raise UsageError("--stream makes one shard after the other; it goes with neither --ray nor --shard")
        work = push_command.Streaming(opened, target, options, destination, jobs, verify, force)
        output.answer(push_command.stream(work, output, command_line()))
        return
    check_output(target, force or bool(part))
    with output.progress() as progress:
        opened = local.downloaded(opened, options, progress)
    if part:
        from xpuquant.conversion.runs import parts

        with output.progress() as progress:
            output.answer(parts.convert_part(opened, target, options, parts.parse_part(part), jobs, progress))
        return
    executor: local.Executor = execute.execute
    if ray:
        from xpuquant.conversion.runs.ray import execute_on_ray

        executor = partial(execute_on_ray, address=ray)
    with output.progress() as progress:
        result = local.convert(
            opened,
            target,
            options,
            jobs=jobs,
            verify=verify,
            force=force,
            reporter=progress,
            command=command_line(),
            executor=executor,
        )
        answer = answers.converted(result)
        if destination is not None:
            pushed = push_command.push_folder(target, destination, progress)
            answer = push_command.together(answer, push_command.pushed_answer(pushed))
    output.answer(answer)


def finish(
    source: SourceName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder the parts were written to.")],
    layout: LayoutName = "xpu",
    scale_dtype: ScaleDtype = "keep",
    on_unsupported: OnUnsupported = "refuse",
    max_shard_size: MaxShardSize = "5GB",
    fold_act_order: FoldActOrder = False,
    jobs: Jobs = DEFAULT_JOBS,
    verify: Verify = True,
    revision: Revision = None,
    as_json: JsonFlag = False,
) -> None:
    """Put the parts of `convert --shard i/n` together: check that all are there, verify, publish."""
    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.options import Options
    from xpuquant.conversion.runs import local, parts
    from xpuquant.conversion.sources.open import open_source

    options = Options.parse(layout, scale_dtype, on_unsupported, max_shard_size, fold_act_order)
    output = Output(as_json)
    with output.progress() as progress:
        opened = local.downloaded(open_source(source, revision), options, progress)
        parts.adopt_parts(opened, options, out)
        result = local.convert(
            opened, out, options, jobs=jobs, verify=verify, reporter=progress, command=command_line()
        )
    output.answer(answers.converted(result))


def inspect(
    source: SourceName,
    on_unsupported: OnUnsupported = "refuse",
    tp: Annotated[list[int] | None, typer.Option(min=1, help="Tensor-parallel sizes to check (repeatable).")] = None,
    revision: Revision = None,
    as_json: JsonFlag = False,
) -> None:
    """What is it, will it convert, how big, which kernel per module: from headers only."""
    from xpuquant.conversion import inspection
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.options import Options
    from xpuquant.conversion.sources.open import open_source

    options = Options(on_unsupported=on_unsupported)
    Output(as_json).answer(inspection.inspect(open_source(source, revision), options, tuple(tp or (2, 4, 8))))


def command_line() -> str:
    """The command as typed, for the card."""
    return shlex.join(["xpuquant", *sys.argv[1:]])
