"""The command `push`, and what `convert --push-to` shares with it: options, checks, and how the result is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xpuquant.errors import UsageError

if TYPE_CHECKING:
    from xpuquant.conversion.cli.output import Answer, Output
    from xpuquant.conversion.hub.publish import Pushed
    from xpuquant.conversion.options import Options
    from xpuquant.conversion.progress import Reporter
    from xpuquant.conversion.sources.base import Source

Private = Annotated[bool, typer.Option("--private/--public", help="Of a repository that is created.")]
Branch = Annotated[str | None, typer.Option(help="Push to this branch; created from main.")]
PullRequest = Annotated[bool, typer.Option("--pr", help="Push to a pull request; a later push adds to it.")]


@dataclass(frozen=True)
class Destination:
    """Where a result is published."""

    repo_id: str
    private: bool = True
    branch: str | None = None
    pr: bool = False

    def __post_init__(self) -> None:
        if self.branch and self.pr:
            raise UsageError("--branch and --pr exclude each other: a pull request is against main")

    def check_source(self, name: str) -> None:
        """Raises UsageError where a conversion would overwrite the repository it comes from."""
        if self.repo_id == name and not (self.branch or self.pr):
            raise UsageError(
                f"--push-to {name} would replace the source; push to another repository, a --branch or a --pr"
            )


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `convert` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; created if it is not there.")],
    private: Private = True,
    branch: Branch = None,
    pr: PullRequest = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Publish a converted folder on the Hub. Run it again to finish or repeat it: what is there is not sent again."""
    from xpuquant.conversion.cli.output import Output

    output = Output(as_json)
    destination = Destination(repo, private, branch, pr)
    with output.progress() as progress:
        pushed = push_folder(out, destination, progress)
    output.answer(pushed_answer(pushed))


def is_converted(out: Path, source: Source, options: Options) -> bool:
    """Whether a folder is the finished conversion of a source with these options."""
    from xpuquant.conversion.repo.journal import PROVENANCE, STAGING
    from xpuquant.conversion.sources.repo_files import read_json

    if (out / STAGING).exists() or not (out / PROVENANCE).exists() or not (out / "config.json").exists():
        return False
    record = read_json(out / PROVENANCE)
    said = record.get("source", {})
    name = source.name if source.revision else source.name.rstrip("/").rpartition("/")[2]
    same_source = (said.get("name"), said.get("revision")) == (name, source.revision)
    return same_source and said.get("bytes") == source.nbytes and record.get("options") == options.as_dict()


def push_folder(out: Path, to: Destination, reporter: Reporter) -> Pushed:
    """`publish.push`, reporting progress in bytes."""
    from xpuquant.conversion.hub import publish

    total = sum((out / name).stat().st_size for name in publish.local_files(out))
    reporter.phase("push", total)
    return publish.push(out, to.repo_id, private=to.private, branch=to.branch, pr=to.pr, report=reporter.advance)


@dataclass(frozen=True)
class Streaming:
    """A conversion with `--stream`."""

    source: Source
    out: Path
    options: Options
    destination: Destination | None
    jobs: int
    verify: bool
    force: bool


def stream(work: Streaming, output: Output, command: str) -> Answer:
    """Convert, and publish on the way, with little disk; says first how little."""
    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.hub.client import connect
    from xpuquant.conversion.hub.target import MAIN, Target
    from xpuquant.conversion.plan.plan import make_plan
    from xpuquant.conversion.runs import streamed
    from xpuquant.conversion.sizes import size
    from xpuquant.conversion.sources.streamed import StreamedSource

    source, to = work.source, work.destination
    if not isinstance(source, StreamedSource):
        raise UsageError("--stream needs the Hub; HF_HUB_OFFLINE is set, and the cache holds the model: leave it away")
    plan = make_plan(source.checkpoint, work.options)
    note = (
        f"needs at most {size(streamed.peak_disk(plan, source, to is not None))} of disk; "
        f"the model is {size(source.nbytes)}, the output {size(plan.write_bytes)}"
    )
    with output.progress() as progress:
        progress.note(note)
    target = None
    if to is not None:
        target = Target(connect(), to.repo_id)
        target.create(to.private)
        target.open(to.branch or MAIN, to.pr)
        earlier = streamed.published(plan, source, target)
        if earlier is not None and not work.force:
            return pushed_answer(earlier)
    with output.progress() as progress:
        result, pushed = streamed.convert_streaming(
            source,
            work.out,
            work.options,
            jobs=work.jobs,
            verify=work.verify,
            force=work.force,
            reporter=progress,
            command=command,
            target=target,
        )
    if pushed is None:
        return answers.converted(result)
    there = replace(result, out=Path(pushed.repo_id))  # the folder is gone: it is served from the Hub
    return together(answers.converted(there), pushed_answer(pushed))


def pushed_answer(pushed: Pushed) -> Answer:
    """What a push did."""
    from xpuquant.conversion.cli.output import Answer, Grid
    from xpuquant.conversion.sizes import size

    there = f", {len(pushed.unchanged)} were there" if pushed.unchanged else ""
    rows = [
        ("pushed to", pushed.url if pushed.revision == "main" else f"{pushed.url} ({pushed.revision})"),
        ("uploaded", f"{len(pushed.uploaded)} files, {size(pushed.nbytes)}{there}"),
        ("compared", "every checksum on the Hub equals the local one"),
    ]
    if pushed.removed:
        rows.append(("removed", f"stale: {', '.join(pushed.removed)}"))
    return Answer([*(f"note: {note}" for note in pushed.notes), Grid("", ("", ""), rows)], asdict(pushed))


def together(converted: Answer, pushed: Answer) -> Answer:
    """The end of `convert --push-to`."""
    from xpuquant.conversion.cli.output import Answer

    return Answer([*converted.parts, *pushed.parts], {**converted.data, "pushed": pushed.data})
