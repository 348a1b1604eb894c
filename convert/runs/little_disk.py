"""Converting a model on a disk that does not hold it (`--stream`).

What flows: output shards are taken in segments that share no module with another segment (nearly always one shard).
The source shards of a segment are downloaded, and the first one of the next segment meanwhile. The segment's shards are
written, every value is checked, they go to a staging branch of the target repository and are dropped here. Then source
shards that no later segment reads are dropped too. At the end one commit makes the staged shards, index, config.json
and card the repository's content. Without a target the output shards stay, and only the source is dropped.

What survives a crash: the shards on the staging branch, whose name is the plan's digest, and the local journal. The
same command skips what either holds. The verdict on each segment is kept beside the journal until the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from xpuquant.conversion.hub.client import connect
from xpuquant.conversion.hub.destination import Destination
from xpuquant.conversion.hub.publish import Pushed, hash_files, publish_repo
from xpuquant.conversion.hub.target import CONFIG, MAIN, Target
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.plan.survey import PlannedModule
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.assemble import stage_repo
from xpuquant.conversion.repo.card_merge import check_card, keep_card
from xpuquant.conversion.repo.converted import Repo
from xpuquant.conversion.repo.journal import PRODUCER, PROVENANCE, Finished
from xpuquant.conversion.repo.replace import clear_output
from xpuquant.conversion.repo.source_card import NOTHING_TOLD, CardFields, metadata_of
from xpuquant.conversion.repo.staging import Staging, check_output, check_told_apart
from xpuquant.conversion.results import Converted, summary
from xpuquant.conversion.runs.finished import is_conversion, recorded_shards
from xpuquant.conversion.runs.local import check_disk, check_places, written_names
from xpuquant.conversion.runs.staged import raise_failures
from xpuquant.conversion.sizes import size
from xpuquant.conversion.sources.repo_files import parse_json
from xpuquant.conversion.sources.streamed import StreamedSource
from xpuquant.conversion.verify.context import Check, Origin
from xpuquant.conversion.verify.noted import joined_verdicts, note_verdict, read_noted
from xpuquant.conversion.verify.record_form import lacks_digests
from xpuquant.conversion.verify.run import verify_staged
from xpuquant.conversion.verify.verdict import Verdict
from xpuquant.conversion.write.execute import execute_plan
from xpuquant.formats.safetensors import Tensor
from xpuquant.values import frozen

_SOURCE = "source"
_VERDICTS = "verdicts"


@frozen
class Segment:
    """A run of output shards that shares no module with the others.

    modules, passed  what they hold
    sources          source shards they are made from or checked against
    """

    shards: tuple[Shard, ...]
    modules: tuple[PlannedModule, ...]
    passed: tuple[Tensor, ...]
    sources: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def segments(plan: Plan) -> list[Segment]:
    """The plan's shards, in order, cut wherever no module is on both sides."""
    place = {tensor.name: i for i, shard in enumerate(plan.shards) for tensor in shard.tensors}
    spans = [{place[tensor.name] for tensor in planned.conversion.tensors} for planned in plan.modules]
    joined = {i for span in spans for i in range(min(span), max(span))}  # shard i continues in i + 1
    found: list[list[int]] = [[]]
    for i in range(len(plan.shards)):
        found[-1].append(i)
        if i not in joined and i + 1 < len(plan.shards):
            found.append([])
    return [_segment(plan, members, place, spans) for members in found]


def _segment(plan: Plan, members: Sequence[int], place: Mapping[str, int], spans: Sequence[set[int]]) -> Segment:
    shards = tuple(plan.shards[i] for i in members)
    modules = tuple(m for m, span in zip(plan.modules, spans, strict=True) if span <= set(members))
    passed = tuple(tensor for tensor in plan.passed if place[tensor.name] in members)
    sources = {part.tensor.file for s in shards for t in s.tensors for piece in t.pieces for part in piece.inputs}
    sources |= {tensor.file for m in modules for _, _, weight in m.weights for tensor in weight.tensors}
    return Segment(shards, modules, passed, tuple(sorted(sources)))


def peak_disk(plan: Plan, source: StreamedSource, dropping: bool) -> int:
    """Bytes of disk that a streamed conversion needs at most, beyond what the client's cache holds already."""
    cut = segments(plan)
    last = {name: i for i, segment in enumerate(cut) for name in segment.sources}
    here: set[str] = set()
    kept = peak = 0
    for i, segment in enumerate(cut):
        here |= set(segment.sources) | set(_next_source(cut, i))
        held = sum(source.remote.blobs[name].nbytes for name in here if not source.is_cached(name))
        peak = max(peak, held + kept + segment.nbytes)
        kept += 0 if dropping else segment.nbytes
        here = {name for name in here if last[name] > i}
    return peak


def _next_source(cut: Sequence[Segment], i: int) -> tuple[str, ...]:
    """What is downloaded while segment `i` is made: the next source shard that it does not have itself."""
    return tuple(n for n in cut[i + 1].sources if n not in cut[i].sources)[:1] if i + 1 < len(cut) else ()


def convert_streaming(
    source: StreamedSource,
    out: Path,
    options: Options,
    *,
    jobs: int,
    verify: bool,
    force: bool,
    reporter: Reporter,
    command: str,
    destination: Destination | None,
    card: CardFields = NOTHING_TOLD,
) -> Converted:
    """Convert without ever holding all of the source, nor, with a destination, of the output.

    Args:
        out: folder for the output, or with a destination for what is under way; it is removed at the end.
        destination: where to publish; what an earlier run has published there is found, and not made again.

    Raises: as `convert_checkpoint` and `publish.push`.
    """
    plan = make_plan(source.checkpoint, options)
    metadata = metadata_of(source, card, reporter.note)
    reporter.note(
        f"needs at most {size(peak_disk(plan, source, destination is not None))} of disk; "
        f"the model is {size(source.nbytes)}, the output {size(plan.write_bytes)}"
    )
    target = None
    if destination is not None:
        target = Target(connect(), destination.repo_id)
        target.create(destination.private)
        target.open(destination.branch or MAIN, destination.pr)
        earlier = None if force else _published(plan, source, target, verify and not destination.unverified)
        if earlier is not None:
            return earlier
    check_output(out, force)
    if target is None:
        check_places(plan, source, out)
    check_card(out)
    digest = plan.digest(source.fingerprint())
    with Staging(out, reporter.note) as staging:
        check_told_apart(out, written_names(plan, source))
        done = staging.begin(digest, options, plan.shard_sizes, force)
        keep_card(staging)
        clear_output(out)
        work = _Work(plan, source, staging, target, jobs, verify, done)
        work.open_staging_branch(digest)
        check_disk(out, peak_disk(plan, source, target is not None) - work.held())
        reporter.phase("stream", 3 * plan.write_bytes)
        shards, verdict = work.run(reporter, out.resolve().name if target is None else target.repo_id)
        files, config = stage_repo(plan, source, staging, shards, verdict, command, metadata)
        result = Converted(summary(plan, source), out, shards, verdict, kept=staging.kept)
        if target is None:
            staging.publish([shard.name for shard in plan.shards], files, config)
            return result
        files[CONFIG] = staging.files.write(CONFIG, config)
        staging.check_unchanged(files)
        small = hash_files(staging.files, files)
        pushed = publish_repo(target, staging.files, small, shards, lambda nbytes: None)
        staging.drop()
    with suppress(OSError):  # it holds something else
        out.rmdir()
    return replace(result, out=None, pushed=pushed)


def _published(plan: Plan, source: StreamedSource, target: Target, verified: bool) -> Converted | None:
    """What an earlier run has published, where it is this very conversion; None where there is work to do.

    Args:
        verified: it has to have been verified.
    """
    head = target.head()
    there = target.files(head)
    if PROVENANCE not in there or CONFIG not in there:
        return None
    record = parse_json(target.text(PROVENANCE, head).encode(), PROVENANCE)
    shards = recorded_shards(record)
    is_same = (
        record.get("producer") == PRODUCER
        and is_conversion(record, source, plan.options)
        and all(shard.name in there and shard.name in shards for shard in plan.shards)
        and all(there[name].sha256 == shard.sha256 for name, shard in shards.items() if name in there)
        and not (verified and lacks_digests(record))
    )
    if not is_same:
        return None
    pushed = Pushed(target.repo_id, target.url, target.revision, head, (), tuple(there), (), 0)
    return Converted(summary(plan, source), None, shards, None, pushed, is_new=False)


class _Work:
    """The segments of one streamed conversion, one after the other."""

    def __init__(
        self,
        plan: Plan,
        source: StreamedSource,
        staging: Staging,
        target: Target | None,
        jobs: int,
        verify: bool,
        done: dict[str, Finished],
    ) -> None:
        self._plan = plan
        self._source = source
        self._staging = staging
        self._target = target
        self._jobs = jobs
        self._verify = verify
        self._verdicts = staging.tree.below(_VERDICTS)
        self._verdicts.make()
        downloads = staging.tree.below(_SOURCE)
        downloads.make()
        if downloads.has_links():
            # The client makes none there, and would follow one.
            staging.tree.drop(_SOURCE)
            downloads.make()
        source.keep_in(downloads)
        self._done = done
        self._staged: dict[str, Finished] = {}

    def open_staging_branch(self, digest: str) -> None:
        """With a target: find or make the branch of this very plan, and what an earlier run committed there."""
        if self._target is not None:
            wanted = {shard.name: shard.nbytes for shard in self._plan.shards}
            self._staged = self._target.open_staging(f"xpuquant-{digest[:16]}", wanted)

    def held(self) -> int:
        """Bytes that an earlier run left here."""
        tree = self._staging.tree
        return sum(tree.size(file.name) for file in tree.files(hidden=True) if ".safetensors" in file.name)

    def run(self, reporter: Reporter, name: str) -> tuple[dict[str, Finished], Verdict | None]:
        """Make, check and stage every segment; returns all shards, and the verdict on them."""
        cut = segments(self._plan)
        last = {file: i for i, segment in enumerate(cut) for file in segment.sources}
        finished: dict[str, Finished] = {}
        verdicts: list[Verdict] = []
        for i, segment in enumerate(cut):
            verdict = self._noted(segment) if self._verify else None
            # What is staged and has not been checked is made again: nothing else shows that it is right.
            todo = [shard for shard in segment.shards if self._verify or shard.name not in self._staged]
            if verdict is None and todo:
                for file in (*segment.sources, *_next_source(cut, i)):
                    self._source.prefetch(file)
                self._make(todo, reporter)
            else:
                reporter.advance(2 * segment.nbytes)
            if self._verify:
                verdicts.append(verdict or self._check(segment, name, reporter))
            for shard in segment.shards:
                finished[shard.name] = self._stage(shard, reporter)
            for file in segment.sources:
                if last[file] <= i:
                    self._source.release(file)
        return finished, joined_verdicts(verdicts, self._source) if self._verify else None

    def _make(self, todo: Iterable[Shard], reporter: Reporter) -> None:
        plan = replace(self._plan, shards=tuple(todo))
        known = {shard.name: self._done[shard.name] for shard in plan.shards if shard.name in self._done}
        self._done |= execute_plan(plan, self._source, self._staging, self._jobs, known, reporter.advance)

    def _noted(self, segment: Segment) -> Verdict | None:
        """The verdict of an earlier run on these very shards, which are staged or here; None where there is none."""
        noted = read_noted(self._verdicts, _note(segment), self._done | self._staged, self._staging.plan)
        is_of_it = noted is not None and noted.shards == {shard.name for shard in segment.shards}
        return noted.verdict if noted is not None and is_of_it else None

    def _check(self, segment: Segment, name: str, reporter: Reporter) -> Verdict:
        """The verdict on a segment, all of whose shards are here."""
        plan = replace(self._plan, modules=segment.modules, passed=segment.passed, shards=segment.shards)
        repo = Repo(
            self._staging.files,
            tuple(shard.name for shard in segment.shards),
            plan.quantization_config(PRODUCER),
        )
        try:
            check = Check(repo, jobs=self._jobs, progress=reporter.advance)
            verdict = verify_staged(Origin(plan, self._source), check, name, PRODUCER)
        finally:
            repo.reader.close()
        raise_failures(verdict, self._staging.files, plan)
        made = {shard.name: self._done[shard.name] for shard in segment.shards}
        note_verdict(self._verdicts, _note(segment), verdict, made, self._staging.plan)
        return verdict

    def _stage(self, shard: Shard, reporter: Reporter) -> Finished:
        if self._target is None:
            return self._done[shard.name]
        if self._staging.files.holds(shard.name):
            self._target.stage(self._staging.files, shard.name, self._done[shard.name])
            self._staged[shard.name] = self._done[shard.name]
            self._staging.files.remove(shard.name)
        reporter.advance(shard.nbytes)
        return self._staged[shard.name]


def _note(segment: Segment) -> str:
    """The file that the verdict on a segment is kept in."""
    return f"{segment.shards[0].name}.json"
