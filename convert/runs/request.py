"""What was asked for, and the one place that decides what runs: a part, a stream, a cluster, or all of it here."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.options import Options, default_jobs
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.card_merge import CARD, front_matter
from xpuquant.conversion.repo.source_card import NOTHING_TOLD, CardFields
from xpuquant.conversion.repo.staging import check_output
from xpuquant.conversion.runs.finished import changed_file, converted_shards, is_finished, recorded_options
from xpuquant.conversion.runs.local import Executor, convert_checkpoint, downloaded
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.sources.repo_files import read_text
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write.execute import execute_plan
from xpuquant.errors import Argument, DamagedError, NotVerifiedError, UsageError
from xpuquant.values import frozen

if TYPE_CHECKING:
    from xpuquant.conversion.hub.destination import Destination
    from xpuquant.conversion.results import Converted, PartConverted, Planned
    from xpuquant.conversion.runs.parts import Part

# What only some conversions need, and what tells of the result, is imported there: the first byte does not wait for it.


@frozen
class ConvertRequest:
    """A conversion as it was asked for.

    source       folder, or repo id on the Hub at `revision`
    out          folder to write; None: the source's name with the layout's, in the current folder
    jobs         workers; 0: one per core, at most 8
    verify       check every value of the output
    force        replace an earlier conversion in `out`
    part         make only this part
    ray          address of a Ray cluster to run on; None: this machine
    stream       keep only the shards in use
    destination  where to publish the result
    card         what its card is told to say

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
    ray: str | None = None
    stream: bool = False
    destination: Destination | None = None
    card: CardFields = NOTHING_TOLD

    def __post_init__(self) -> None:
        if self.ray is not None and not self.ray.strip():
            raise UsageError(Argument("ray", self.ray), ": want auto, local, or a cluster's host:port")
        if self.destination is not None:
            self.destination.check_verified(self.verify)
        given = {
            "part": self.part is not None,
            "stream": self.stream,
            "ray": self.ray is not None,
            "force": self.force,
            "verify": not self.verify,
            "push_to": self.destination is not None,
            **{told.name: True for told in self.card.told()},
        }
        for (one, other), reason in EXCLUDES.items():
            if given.get(one) and given.get(other):
                excluded = Argument(other, False) if other == "verify" else Argument(other)
                raise UsageError(Argument(one), " does not go with ", excluded, f": {reason}")

    @property
    def workers(self) -> int:
        return self.jobs or default_jobs()

    @property
    def target(self) -> Path:
        """The folder to write."""
        return self.out or default_output(self.source, self.options.layout)


EXCLUDES: Mapping[tuple[str, str], str] = {
    ("part", "ray"): "both share the work out; choose one",
    ("part", "push_to"): "a part is not published; give it to `finish`",
    (
        "part",
        "verify",
    ): "a part is verified where it is made; leave it away here, and give it to `finish` for no verdict at all",
    ("part", "force"): "a part replaces nothing; choose another folder, or remove this one first",
    **{("part", field): "`finish` writes the card; give it to that" for field in ("base_model", "license", "language")},
    ("stream", "part"): "it makes one shard after the other, here",
    ("stream", "ray"): "it makes one shard after the other, here",
}
"""Two arguments of a conversion that exclude each other → why, and what to do."""


@frozen
class FinishRequest:
    """Parts to be put together, as it was asked for. Fields as in `ConvertRequest`.

    told  field of `Options` → value that was given again: the parts' own must be the same
    """

    source: str
    out: Path
    revision: str | None = None
    jobs: int = 0
    verify: bool = True
    destination: Destination | None = None
    card: CardFields = NOTHING_TOLD
    told: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.destination is not None:
            self.destination.check_verified(self.verify)


def plan_only(request: ConvertRequest) -> Planned:
    """What a conversion, or its part, would write, from headers alone; nothing is written.

    Raises: as `make_plan`; EnvironmentFault: the Hub cannot be reached.
    """
    from xpuquant.conversion.results import summary
    from xpuquant.conversion.runs.parts import share

    source = _open(request)
    plan = make_plan(source.checkpoint, request.options)
    return summary(plan if request.part is None else plan.part(share(plan, request.part)), source)


def run(request: ConvertRequest, reporter: Reporter) -> Converted | PartConverted:
    """Convert as asked: a part, or all of it.

    Raises: as `convert`.
    """
    return convert(request, reporter) if request.part is None else convert_one_part(request, reporter)


def convert_one_part(request: ConvertRequest, reporter: Reporter) -> PartConverted:
    """Make the part that was asked for.

    Raises: as `make_part`.
    """
    from xpuquant.conversion.runs.parts import make_part

    assert request.part is not None
    opened, out = _open(request), request.target
    check_output(out, force=True)
    if is_finished(out):
        raise UsageError(f"{out}: already holds a converted model; choose another folder, or remove this one first")
    source = downloaded(opened, request.options, reporter)
    return make_part(source, out, request.options, request.part, jobs=request.workers, reporter=reporter)


def convert(request: ConvertRequest, reporter: Reporter) -> Converted:
    """Convert as asked: streamed, on a cluster or here; of what an earlier run has finished, publish it where that is
    asked for, and do nothing else.

    Raises: as `convert_checkpoint`, and with a destination as `publish.push`; NotVerifiedError: what an earlier run has
        finished was never verified, and this one was asked to.
    """
    opened, out, options = _open(request), request.target, request.options
    if not request.force and (earlier := _converted_before(out, opened, options, _AGAIN)) is not None:
        _check_verified(out, request.verify, request.destination)
        _check_card(out, request.card)
        return _published(earlier, request.destination, reporter)
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
        command=card_command(request),
        card=request.card,
        executor=_executor(request),
    )
    return _published(converted, request.destination, reporter)


_AGAIN = ("to convert again, pass ", Argument("force", True))


def _converted_before(out: Path, source: Source, options: Options, fix: Sequence[object]) -> Converted | None:
    """The finished conversion of this source with these options that a folder holds; None where it holds none.

    What is left of one is not said to be finished: a file that is missing, or is not what was written, is named.

    A commit names what was converted. A folder's name and size do not: some rows of every module are compared. Where
    they differ, the digests of the record tell files that have changed since from another source.

    Args:
        fix: the end of a refusal, in parts.

    Raises:
        UsageError: of another source. DamagedError: a file is not what the conversion wrote.
    """
    if not is_finished(out):
        return None
    if (changed := changed_file(out, weights=False)) is not None:
        raise DamagedError(f"{changed}; ", *fix)
    shards = converted_shards(out, source, options)
    if shards is None:
        return None
    from xpuquant.conversion.results import Converted, summary
    from xpuquant.conversion.verify.sample import sampled_difference

    plan = make_plan(source.checkpoint, options)
    if source.revision is None and (differs := sampled_difference(out, plan, source)) is not None:
        if (changed := changed_file(out)) is not None:
            raise DamagedError(f"{changed}; ", *fix)
        raise UsageError(f"{out}: holds the conversion of another source ({differs}); ", *fix)
    return Converted(summary(plan, source), out, shards, None, is_new=False)


def _check_verified(out: Path, verify: bool, destination: Destination | None) -> None:
    """Raises NotVerifiedError where an earlier run did not verify what this one was asked to. A conversion that may be
    published unverified may be left so."""
    from xpuquant.conversion.hub.publish import NEVER_VERIFIED, never_verified

    if verify and not (destination is not None and destination.unverified) and never_verified(out):
        raise NotVerifiedError(
            f"{out} {NEVER_VERIFIED}; to have it converted again and verified, call convert with ",
            Argument("force", True),
        )


def _check_card(out: Path, told: CardFields) -> None:
    """Raises UsageError where a finished conversion's card does not say what this one is told to say."""
    said = front_matter(read_text(Tree(out), CARD) or "")
    differing = [one for one in told.told() if said.get(one.name) != told.metadata()[one.name]]
    if differing:
        raise UsageError(
            f"{out}: is finished already, and its card does not say ",
            differing[0],
            f"; write it into {out / CARD}, where it is kept, or convert again with ",
            Argument("force", True),
        )


def put_together(request: FinishRequest, reporter: Reporter) -> Converted:
    """Put the parts of a conversion together, with the options that stand in their journals; only publish what an
    earlier run has put together.

    Raises: as `convert_checkpoint`, and with a destination as `publish.push`; UsageError: no part was converted there,
        or parts of something else; DamagedError: some shards have not been made; NotVerifiedError: as `convert`.
    """
    from xpuquant.conversion.runs.parts import check_parts, parts_options

    opened = open_source(request.source, request.revision)
    if request.destination is not None:
        request.destination.check_source(opened.name)
    check_output(request.out, force=True)
    if is_finished(request.out):
        earlier = _put_together_before(request, opened)
        _check_verified(request.out, request.verify, request.destination)
        _check_card(request.out, request.card)
        return _published(earlier, request.destination, reporter)
    options = parts_options(request.out, request.told)
    source = downloaded(opened, options, reporter)
    check_parts(source, options, request.out)
    converted = convert_checkpoint(
        source,
        request.out,
        options,
        jobs=request.jobs or default_jobs(),
        verify=request.verify,
        reporter=reporter,
        command=shlex.join(
            ["xpuquant", "finish", _public(request.source), request.out.resolve().name]
            + ["--no-verify"] * (not request.verify)
            + _spelt(request.card.told())
        ),
        card=request.card,
    )
    return _published(converted, request.destination, reporter)


def _put_together_before(request: FinishRequest, source: Source) -> Converted:
    """What an earlier run has put together.

    Raises:
        UsageError: it is of another source, or of other options than were told. DamagedError: a file is not what the
            conversion wrote.
    """
    from xpuquant.conversion.runs.parts import check_told

    options = recorded_options(request.out)
    check_told(request.out, options, request.told)
    fix = ("choose another folder",)
    earlier = _converted_before(request.out, source, options, fix)
    if earlier is None:
        if (changed := changed_file(request.out)) is not None:
            raise DamagedError(f"{changed}; ", *fix)
        raise UsageError(f"{request.out}: holds the finished conversion of another source; ", *fix)
    return earlier


def _published(converted: Converted, destination: Destination | None, reporter: Reporter) -> Converted:
    if destination is None:
        return converted
    from xpuquant.conversion.hub.publish import push

    assert converted.out is not None
    return replace(converted, pushed=push(converted.out, destination, reporter))


def default_output(name: str, layout: str) -> Path:
    """`Qwen3-8B-GPTQ` → `Qwen3-8B-GPTQ-xpu` in the current folder."""
    here = Path(name).exists()
    return Path(f"{Path(name).resolve().name if here else name.partition('@')[0].rpartition('/')[2]}-{layout}")


def card_command(request: ConvertRequest) -> str:
    """The command line that asks for the same, for a card that anybody reads: of a folder here its name."""
    words = ["xpuquant", "convert", _public(request.source), request.target.resolve().name]
    words += _spelt([*request.options.asked(), *request.card.told()])
    if not request.verify:
        words.append("--no-verify")
    return shlex.join(words if request.revision is None else [*words, "--revision", request.revision])


def _spelt(arguments: Iterable[Argument]) -> list[str]:
    """Arguments as options of the command line."""
    words: list[str] = []
    for one in arguments:
        words += [f"--{one.name.replace('_', '-')}", *([] if one.value is True else [str(one.value)])]
    return words


def _public(source: str) -> str:
    """A source without this machine's folders."""
    return Path(source).resolve().name if Path(source).exists() else source


def _open(request: ConvertRequest) -> Source:
    source: Source = open_source(request.source, request.revision, request.stream)
    if request.destination is not None:
        request.destination.check_source(source.name)
    return source


def _run_streamed(request: ConvertRequest, source: Source, reporter: Reporter) -> Converted:
    from xpuquant.conversion.runs.little_disk import convert_streaming
    from xpuquant.conversion.sources.streamed import StreamedSource

    if not isinstance(source, StreamedSource):
        raise UsageError(
            Argument("stream"), " needs the Hub; HF_HUB_OFFLINE is set, and the cache holds the model: leave it away"
        )
    return convert_streaming(
        source,
        request.target,
        request.options,
        jobs=request.workers,
        verify=request.verify,
        force=request.force,
        reporter=reporter,
        command=card_command(request),
        destination=request.destination,
        card=request.card,
    )


def _executor(request: ConvertRequest) -> Executor:
    if request.ray is None:
        return execute_plan
    from xpuquant.conversion.runs.ray import execute_on_ray

    return partial(execute_on_ray, address=request.ray, verify=request.verify)
