"""The commands that convert and publish: `convert`, `finish`, `push`."""

from __future__ import annotations

import shlex
import sys

from xpuquant.conversion.cli import arguments as args


def convert(
    source: args.Source,
    out: args.OutToWrite = None,
    layout: args.Layout = "xpu",
    scale_dtype: args.ScaleDtype = "keep",
    on_unsupported: args.OnUnsupported = "refuse",
    max_shard_size: args.MaxShardSize = "5GB",
    fold_act_order: args.FoldActOrder = False,
    jobs: args.Jobs = 0,
    verify: args.Verify = True,
    dry_run: args.DryRun = False,
    force: args.Force = False,
    ray: args.Ray = "",
    part: args.Part = "",
    revision: args.Revision = None,
    push_to: args.PushTo = None,
    private: args.Private = True,
    branch: args.Branch = None,
    pr: args.PullRequest = False,
    stream: args.Stream = False,
    as_json: args.Json = False,
) -> None:
    """Convert, verify and write a ready-to-load repo. Run it again to resume after an interruption."""
    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.options import Options
    from xpuquant.conversion.runs.parts import parse_part
    from xpuquant.conversion.runs.publishing import Destination
    from xpuquant.conversion.runs.request import ConvertRequest, plan_only, run

    request = ConvertRequest(
        source,
        out,
        Options.parse(layout, scale_dtype, on_unsupported, max_shard_size, fold_act_order),
        revision=revision,
        jobs=jobs,
        verify=verify,
        force=force,
        part=parse_part(part) if part else None,
        ray=ray,
        stream=stream,
        destination=Destination(push_to, private, branch, pr) if push_to else None,
        command=typed_command(),
    )
    output = Output(as_json)
    if dry_run:
        output.answer(answers.planned(plan_only(request), request.workers))
        return
    with output.progress() as progress:
        result = run(request, progress)
    output.answer(answers.converted(result))


def finish(
    source: args.Source,
    out: args.OutOfParts,
    jobs: args.Jobs = 0,
    verify: args.Verify = True,
    revision: args.Revision = None,
    as_json: args.Json = False,
    layout: args.SameText = None,
    scale_dtype: args.SameText = None,
    on_unsupported: args.SameText = None,
    max_shard_size: args.SameText = None,
    fold_act_order: args.SameFlag = None,
) -> None:
    """Put the parts of `convert --shard i/n` together: check that all are there, verify, publish."""
    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.runs.request import FinishRequest
    from xpuquant.conversion.runs.request import finish as put_together

    told = {
        "layout": layout,
        "scale_dtype": scale_dtype,
        "on_unsupported": on_unsupported,
        "max_shard_size": max_shard_size,
        "fold_act_order": fold_act_order,
    }
    given = {name: value for name, value in told.items() if value is not None}
    request = FinishRequest(source, out, revision, jobs, verify, typed_command(), given)
    output = Output(as_json)
    with output.progress() as progress:
        result = put_together(request, progress)
    output.answer(answers.converted(result))


def push(
    out: args.OutConverted,
    repo: args.Repo,
    private: args.Private = True,
    branch: args.Branch = None,
    pr: args.PullRequest = False,
    as_json: args.Json = False,
) -> None:
    """Publish a converted folder on the Hub. Run it again to finish or repeat it: what is there is not sent again."""
    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.runs.publishing import Destination, push_folder

    output = Output(as_json)
    with output.progress() as progress:
        result = push_folder(out, Destination(repo, private, branch, pr), progress)
    output.answer(answers.pushed(result))


def typed_command() -> str:
    """The command as typed, for the card."""
    return shlex.join(["xpuquant", *sys.argv[1:]])
