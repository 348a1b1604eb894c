"""Converting a model on a disk that does not hold it (`--stream`).

What flows: output shards are taken in groups that share no module with another group (nearly always one shard). For
each group its source shards are downloaded (the next group's first one meanwhile), the shards are written, every value
is checked, they go to a staging branch of the target repository and are dropped here; then source shards that no later
group reads are dropped too. At the end one commit makes the staged shards, index, config.json and card the repository's
content. Without a target the output shards stay, and only the source is dropped.

What survives a crash: the shards on the staging branch, whose name is the plan's digest, and the local journal. The
same command skips what either holds. The verdict on each group is kept beside the journal until the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xpuquant.conversion.hub.publish import Pushed, hash_files, publish
from xpuquant.conversion.hub.target import CONFIG, Target
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.plan.survey import PlannedModule
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.converted import Repo
from xpuquant.conversion.repo.journal import PROVENANCE, Finished, Journal, check_output
from xpuquant.conversion.repo.replace import clear_output
from xpuquant.conversion.runs.local import (
    PRODUCER,
    Result,
    check_disk,
    keep_card,
    raise_failures,
    stage_repo,
)
from xpuquant.conversion.sources.repo_files import parse_json
from xpuquant.conversion.sources.streamed import StreamedSource
from xpuquant.conversion.verify.context import Check, Origin
from xpuquant.conversion.verify.exactness import claim_of
from xpuquant.conversion.verify.run import sizes, verify_staged
from xpuquant.conversion.verify.verdict import Checked, Verdict
from xpuquant.conversion.write.execute import execute
from xpuquant.formats.safetensors import Tensor

_SOURCE = "source"
_VERDICTS = "verdicts"


@dataclass(frozen=True)
class Group:
    """Output shards that share no module with others.

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


def groups(plan: Plan) -> list[Group]:
    """The plan's shards, in order, cut wherever no module is on both sides."""
    place = {tensor.name: i for i, shard in enumerate(plan.shards) for tensor in shard.tensors}
    spans = [{place[tensor.name] for tensor in planned.conversion.tensors} for planned in plan.modules]
    joined = {i for span in spans for i in range(min(span), max(span))}  # shard i continues in i + 1
    found: list[list[int]] = [[]]
    for i in range(len(plan.shards)):
        found[-1].append(i)
        if i not in joined and i + 1 < len(plan.shards):
            found.append([])
    return [_group(plan, members, place, spans) for members in found]


def _group(plan: Plan, members: Sequence[int], place: Mapping[str, int], spans: Sequence[set[int]]) -> Group:
    shards = tuple(plan.shards[i] for i in members)
    modules = tuple(m for m, span in zip(plan.modules, spans, strict=True) if span <= set(members))
    passed = tuple(tensor for tensor in plan.passed if place[tensor.name] in members)
    sources = {part.tensor.file for s in shards for t in s.tensors for piece in t.pieces for part in piece.inputs}
    sources |= {tensor.file for m in modules for _, _, weight in m.weights for tensor in weight.tensors}
    return Group(shards, modules, passed, tuple(sorted(sources)))


def peak_disk(plan: Plan, source: StreamedSource, dropping: bool) -> int:
    """Bytes of disk that a streamed conversion needs at most, beyond what the client's cache holds already."""
    cut = groups(plan)
    last = {name: i for i, group in enumerate(cut) for name in group.sources}
    here: set[str] = set()
    kept = peak = 0
    for i, group in enumerate(cut):
        here |= set(group.sources) | set(_ahead(cut, i))
        held = sum(source.remote.sizes[name] for name in here if not source.is_cached(name))
        peak = max(peak, held + kept + group.nbytes)
        kept += 0 if dropping else group.nbytes
        here = {name for name in here if last[name] > i}
    return peak


def _ahead(cut: Sequence[Group], i: int) -> tuple[str, ...]:
    """What is downloaded while group `i` is made: the next source shard that it does not have itself."""
    return tuple(n for n in cut[i + 1].sources if n not in cut[i].sources)[:1] if i + 1 < len(cut) else ()


def published(plan: Plan, source: StreamedSource, target: Target) -> Pushed | None:
    """What an earlier run has published, where it is this very conversion; None where there is work to do."""
    head = target.head()
    there = target.files(head)
    if PROVENANCE not in there or CONFIG not in there:
        return None
    record = parse_json(target.text(PROVENANCE, head).encode(), PROVENANCE)
    said, shards = record.get("source", {}), record.get("shards", {})
    is_same = (
        record.get("producer") == PRODUCER
        and (said.get("name"), said.get("revision")) == (source.name, source.revision)
        and record.get("options") == plan.options.as_dict()
        and all(shard.name in there and shard.name in shards for shard in plan.shards)
        and all(there[name].sha256 == shard.get("sha256") for name, shard in shards.items() if name in there)
    )
    if not is_same:
        return None
    return Pushed(target.repo_id, target.url, target.revision, head, (), tuple(there), (), 0)


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
    target: Target | None,
) -> tuple[Result, Pushed | None]:
    """Convert without ever holding all of the source, nor, with a target, of the output.

    Args:
        out: folder for the output, or with a target for what is under way; it is removed at the end.
        target: created and opened.

    Raises: as `conversion.convert` and `publish.push`.
    """
    check_output(out, force)
    plan = make_plan(source.checkpoint, options)
    digest = plan.digest(source.fingerprint())
    with Journal(out) as journal:
        done = journal.begin(digest, force)
        keep_card(out, journal.folder)
        clear_output(out)
        work = _Work(plan, source, journal, done, target, digest, jobs, verify)
        check_disk(out, peak_disk(plan, source, target is not None) - work.held())
        reporter.phase("stream", 3 * plan.write_bytes)
        shards, verdict = work.run(reporter, out.resolve().name if target is None else target.repo_id)
        files, config = stage_repo(plan, source, journal, shards, verdict, command)
        result = Result(out, plan, source, shards, verdict)
        if target is None:
            journal.publish([*(shard.name for shard in plan.shards), *files], config)
            return result, None
        (journal.folder / "config.json").write_bytes(config)
        small = hash_files(journal.folder, [*files, "config.json"])
        pushed = publish(target, journal.folder, small, shards, lambda nbytes: None)
        shutil.rmtree(journal.folder.parent)
    if not any(out.iterdir()):
        out.rmdir()
    return result, pushed


class _Work:
    """The groups of one streamed conversion, one after the other."""

    def __init__(
        self,
        plan: Plan,
        source: StreamedSource,
        journal: Journal,
        done: dict[str, Finished],
        target: Target | None,
        digest: str,
        jobs: int,
        verify: bool,
    ) -> None:
        self._plan = plan
        self._source = source
        self._journal = journal
        self._target = target
        self._jobs = jobs
        self._verify = verify
        self._verdicts = journal.folder.parent / _VERDICTS
        self._verdicts.mkdir(exist_ok=True)
        folder = journal.folder.parent / _SOURCE
        folder.mkdir(exist_ok=True)
        source.keep_in(folder)
        self._done = done
        self._staged: dict[str, Finished] = {}
        if target is not None:
            planned = {shard.name: shard.nbytes for shard in plan.shards}
            self._staged = target.open_staging(f"xpuquant-{digest[:16]}", planned)

    def held(self) -> int:
        """Bytes that an earlier run left here."""
        kept = [path for path in self._journal.folder.parent.rglob("*.safetensors*") if path.is_file()]
        return sum(path.stat().st_size for path in kept)

    def run(self, reporter: Reporter, name: str) -> tuple[dict[str, Finished], Verdict | None]:
        cut = groups(self._plan)
        last = {file: i for i, group in enumerate(cut) for file in group.sources}
        finished: dict[str, Finished] = {}
        verdicts: list[Verdict] = []
        for i, group in enumerate(cut):
            todo = [shard for shard in group.shards if shard.name not in self._staged]
            if todo:
                for file in (*group.sources, *_ahead(cut, i)):
                    self._source.prefetch(file)
                self._make(group, todo, reporter)
            else:
                reporter.advance(group.nbytes * 3)
            if self._verify:
                verdicts.append(self._check(group, name, reporter))
            for shard in group.shards:
                finished[shard.name] = self._stage(shard, reporter)
            for file in group.sources:
                if last[file] <= i:
                    self._source.release(file)
        verdict = _merged(verdicts, self._source) if self._verify else None
        return finished, verdict

    def _make(self, group: Group, todo: Iterable[Shard], reporter: Reporter) -> None:
        plan = replace(self._plan, shards=tuple(todo))
        known = {shard.name: self._done[shard.name] for shard in plan.shards if shard.name in self._done}
        self._done |= execute(plan, self._source, self._journal, self._jobs, known, reporter.advance)

    def _check(self, group: Group, name: str, reporter: Reporter) -> Verdict:
        """The verdict on a group; from the earlier run that staged it, where parts of it are no longer here."""
        noted = self._verdicts / f"{group.shards[0].name}.json"
        if any(shard.name in self._staged for shard in group.shards):
            if noted.exists():
                return Verdict.from_json(json.loads(noted.read_text()))
            return Verdict(
                name,
                PRODUCER,
                exact=[Checked(m.conversion.name, len(m.weights), None, claim=claim_of(m)) for m in group.modules],
            )
        plan = replace(self._plan, modules=group.modules, passed=group.passed, shards=group.shards)
        repo = Repo(
            self._journal.folder,
            tuple(shard.name for shard in group.shards),
            plan.quantization_config(PRODUCER),
        )
        try:
            check = Check(repo, jobs=self._jobs, progress=reporter.advance)
            verdict = verify_staged(Origin(plan, self._source), check, name, PRODUCER)
        finally:
            repo.reader.close()
        raise_failures(verdict, self._journal.folder)
        noted.write_text(json.dumps(verdict.to_json()))
        return verdict

    def _stage(self, shard: Shard, reporter: Reporter) -> Finished:
        if self._target is None:
            return self._done[shard.name]
        if shard.name not in self._staged:
            path = self._journal.folder / shard.name
            self._target.stage(path, self._done[shard.name])
            self._staged[shard.name] = self._done[shard.name]
            path.unlink()
            reporter.advance(shard.nbytes)
        return self._staged[shard.name]


def _merged(verdicts: Sequence[Verdict], source: StreamedSource) -> Verdict:
    """One verdict of those on the groups."""
    after: dict[str, int] = {}
    for verdict in verdicts:
        for dtype, nbytes in verdict.after.items():
            after[dtype] = after.get(dtype, 0) + nbytes
    return replace(
        verdicts[0],
        exact=[checked for verdict in verdicts for checked in verdict.exact],
        kernels=[run for verdict in verdicts for run in verdict.kernels],
        health={name: health for verdict in verdicts for name, health in verdict.health.items()},
        findings=[finding for verdict in verdicts for finding in verdict.findings],
        schemes={name: scheme for verdict in verdicts for name, scheme in verdict.schemes.items()},
        before=sizes(source),
        after=after,
    )
