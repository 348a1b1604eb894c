"""The commands that convert and publish: `convert`, `finish`, `push`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xpuquant.conversion.cli import arguments as args
from xpuquant.errors import Argument, UsageError

if TYPE_CHECKING:
    from xpuquant.conversion.runs.parts import Part

_OF_ONE = {
    "source": "the list has the sources, and -o the folder for all outputs",
    "part": "make the parts of each source by itself",
    "revision": "a revision is of one source",
    "push_to": "it names one repository; push each output by itself",
    "branch": "it is of one repository",
    "base_model": "it is the base of one source",
}
"""Argument → why it does not go with a list of sources."""


def convert(
    source: args.ToConvertArgument = None,
    out: args.OutToWriteArgument = None,
    out_option: args.OutOption = None,
    sources_file: args.FromOption = None,
    layout: args.LayoutOption = "xpu",
    scale_dtype: args.ScaleDtypeOption = "keep",
    on_unsupported: args.OnUnsupportedOption = "refuse",
    max_shard_size: args.MaxShardSizeOption = "5GB",
    fold_act_order: args.FoldActOrderOption = False,
    jobs: args.JobsOption = 0,
    verify: args.VerifyOption = True,
    dry_run: args.DryRunOption = False,
    force: args.ForceOption = False,
    ray: args.RayOption = None,
    part: args.PartOption = None,
    revision: args.RevisionOption = None,
    push_to: args.PushToOption = None,
    private: args.PrivateOption = True,
    branch: args.BranchOption = None,
    pr: args.PullRequestOption = False,
    unverified: args.UnverifiedOption = False,
    stream: args.StreamOption = False,
    base_model: args.BaseModelOption = None,
    license: args.LicenseOption = None,  # noqa: A002  # the card's own word
    language: args.LanguageOption = None,
    as_json: args.JsonOption = False,
    quiet: args.QuietOption = False,
    verbose: args.VerboseOption = False,
) -> None:
    """Convert, verify and write a ready-to-load repo. Run it again to resume after an interruption."""
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.hub.destination import Destination
    from xpuquant.conversion.options import Options
    from xpuquant.conversion.repo.source_card import CardFields
    from xpuquant.conversion.runs.request import ConvertRequest, plan_only, run

    if sources_file is not None:
        _check_list_alone(
            source=source, part=part, revision=revision, push_to=push_to, branch=branch, base_model=base_model
        )
    elif source is None:
        raise UsageError("nothing to convert: give SRC, or a list of sources with ", Argument("sources_file"))
    if out is not None and out_option is not None:
        raise UsageError(f"OUT is given twice: {out} and {out_option}")
    request = ConvertRequest(
        source or "",
        out_option if out is None else out,
        Options(layout, scale_dtype, on_unsupported, max_shard_size, fold_act_order),
        revision=revision,
        jobs=jobs,
        verify=verify,
        force=force,
        part=None if part is None else _part(part),
        ray=ray,
        stream=stream,
        destination=Destination.asked(push_to, private, branch, pr, unverified),
        card=CardFields(base_model, license, language),
    )
    output = Output(as_json, quiet, verbose)
    if sources_file is not None:
        from xpuquant.conversion.cli.several import convert_several
        from xpuquant.conversion.runs.several import read_list

        convert_several([one.request(request) for one in read_list(sources_file)], output, dry_run=dry_run)
        return
    if dry_run:
        from xpuquant.conversion.cli.plan_answers import planned

        output.answer(planned(plan_only(request), request.target, request.workers, part))
        return
    with output.progress() as progress:
        result = run(request, progress)
    # What is said at the end, and what it needs, is imported then: it would be a third of the time to the first byte.
    from xpuquant.conversion.cli import answers

    output.answer(answers.converted(result, output))


def _part(text: str) -> Part:
    from xpuquant.conversion.runs.parts import parse_part

    return parse_part(text)


def _check_list_alone(**given: str | None) -> None:
    """Raises UsageError where an argument of one source stands beside a list of several."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(Argument("sources_file"), " does not go with ", Argument(name), f": {_OF_ONE[name]}")


def finish(
    source: args.SourceArgument,
    out: args.OutOfPartsArgument,
    jobs: args.JobsOption = 0,
    verify: args.VerifyOption = True,
    revision: args.RevisionOption = None,
    push_to: args.PushToOption = None,
    private: args.PrivateOption = True,
    branch: args.BranchOption = None,
    pr: args.PullRequestOption = False,
    unverified: args.UnverifiedOption = False,
    base_model: args.BaseModelOption = None,
    license: args.LicenseOption = None,  # noqa: A002  # the card's own word
    language: args.LanguageOption = None,
    as_json: args.JsonOption = False,
    quiet: args.QuietOption = False,
    verbose: args.VerboseOption = False,
    layout: args.SameTextOption = None,
    scale_dtype: args.SameTextOption = None,
    on_unsupported: args.SameTextOption = None,
    max_shard_size: args.SameTextOption = None,
    fold_act_order: args.SameFlagOption = None,
) -> None:
    """Put the parts of `convert --part i/n` together. Checks that all are there, verifies, publishes."""
    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.hub.destination import Destination
    from xpuquant.conversion.repo.source_card import CardFields
    from xpuquant.conversion.runs.request import FinishRequest, put_together

    told = {
        "layout": layout,
        "scale_dtype": scale_dtype,
        "on_unsupported": on_unsupported,
        "max_shard_size": max_shard_size,
        "fold_act_order": fold_act_order,
    }
    given = {name: value for name, value in told.items() if value is not None}
    destination = Destination.asked(push_to, private, branch, pr, unverified)
    card = CardFields(base_model, license, language)
    request = FinishRequest(source, out, revision, jobs, verify, destination, card, given)
    output = Output(as_json, quiet, verbose)
    with output.progress() as progress:
        result = put_together(request, progress)
    output.answer(answers.converted(result, output))


def push(
    out: args.OutConvertedArgument,
    repo_id: args.RepoArgument,
    private: args.PrivateOption = True,
    branch: args.BranchOption = None,
    pr: args.PullRequestOption = False,
    unverified: args.UnverifiedOption = False,
    as_json: args.JsonOption = False,
    quiet: args.QuietOption = False,
    verbose: args.VerboseOption = False,
) -> None:
    """Publish a converted folder on the Hub. Run it again to finish or repeat it: what is there is not sent again."""
    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.hub import publish
    from xpuquant.conversion.hub.destination import Destination

    output = Output(as_json, quiet, verbose)
    if not unverified and publish.never_verified(out):
        unverified = output.ask(f"{out} {publish.NEVER_VERIFIED}. Publish it all the same?")
    with output.progress() as progress:
        result = publish.push(out, Destination(repo_id, private, branch, pr, unverified), progress)
    output.answer(answers.pushed(result, output))
