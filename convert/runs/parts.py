"""One conversion by many processes that share a disk: SLURM arrays, or any scheduler.

    xpuquant convert SRC OUT --part 1/16         each of these makes its share of the shards
    ...
    xpuquant convert SRC OUT --part 16/16
    xpuquant finish SRC OUT                      checks that all are there and as they were verified, publishes

Every process plans alone. Equal sources and options give equal plans; the plan's digest, in the first line of every
part's journal, proves it: a part that does not fit those beside it is refused before it makes anything. Shares are
runs of shards of about equal bytes. A part that dies is run again with the same command and skips the shards it had
finished. `finish` takes the options from the journals, and is then an ordinary conversion that resumes: all of its
shards are made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.options import Options, contrast
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.card_merge import check_card
from xpuquant.conversion.repo.journal import (
    STAGING,
    Finished,
    JournalFile,
    Record,
    check_sources,
    is_seen_from_here,
)
from xpuquant.conversion.repo.shard_notes import ShardNotes
from xpuquant.conversion.repo.staging import (
    LOCK,
    VERIFIED_PART,
    Staging,
    check_output,
    check_told_apart,
    journals,
    staged_files,
    take_lock,
    taking_place,
)
from xpuquant.conversion.results import PartConverted
from xpuquant.conversion.runs.local import check_places, written_names
from xpuquant.conversion.runs.staged import check_part, is_checked_meanwhile, make_and_check_part
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.tree import Identity, Tree
from xpuquant.conversion.write.execute import execute_plan
from xpuquant.errors import Argument, DamagedError, UnsupportedError, UsageError, VerificationError
from xpuquant.values import frozen

if TYPE_CHECKING:
    from xpuquant.conversion.verify.verdict import Verdict

_JOURNAL = re.compile(r"part-(\d+)-of-(\d+)\.jsonl")
_MOST_LISTED = 8


@frozen
class Part:
    """Part `index` of `count`, from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def journal(self) -> str:
        """File name of its journal."""
        return f"part-{self.index:05}-of-{self.count:05}.jsonl"

    @property
    def verified(self) -> str:
        """File name of the verdict on it."""
        return f"part-{self.index:05}-of-{self.count:05}{VERIFIED_PART}"

    @property
    def lock(self) -> str:
        """File name of the lock on it."""
        return f"part-{self.index:05}-of-{self.count:05}.lock"


def parse_part(text: str) -> Part:
    """`3/16`.

    Raises:
        UsageError: anything else, or a part beyond the last.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(Argument("part", text), ": want i/n with 1 <= i <= n, for example 3/16")
    return Part(int(match[1]), int(match[2]))


def share(plan: Plan, part: Part) -> tuple[Shard, ...]:
    """The shards of one part: a run of about 1/count of the bytes. Every shard is in exactly one part."""
    total = plan.write_bytes
    mine: list[Shard] = []
    position = 0
    for shard in plan.shards:
        middle = position + shard.nbytes / 2
        if int(middle * part.count / total) == part.index - 1:
            mine.append(shard)
        position += shard.nbytes
    return tuple(mine)


class PartStaging(ShardNotes):
    """The staging folder as one part sees it, whose shards lie beside those of the other parts. Use as a context
    manager: it holds the locks."""

    def __init__(self, out: Path, part: Part, note: Callable[[str], None] = lambda text: None) -> None:
        self.out = out
        self._tree = Tree(out).below(STAGING)
        super().__init__(staged_files(out), JournalFile(self._tree, part.journal), note)
        self._part = part
        self._locks: list[int] = []
        self._plan = ""

    def __enter__(self) -> PartStaging:
        check_output(self.out, force=False)
        others = f"{self.out}: a conversion or `finish` is at work there; wait for it to end"
        twin = f"{self.out}: part {self._part} is being converted already; wait for it to end"
        with taking_place(self.out, self.__exit__):
            self._locks.append(take_lock(self._tree, LOCK, others, shared=True))
            self._locks.append(take_lock(self._tree, self._part.lock, twin))
            self.files.make()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if isinstance(error, UnsupportedError):
            # The same options would be refused again: others can take this part's place.
            with suppress(OSError):
                self._journal.drop()
        if isinstance(error, VerificationError):
            with suppress(OSError):
                self._journal.forget_shards(error.files)
        for fd in self._locks:
            os.close(fd)
        self._locks.clear()

    def begin(
        self, digest: str, options: Options, sizes: Mapping[str, int], sources: Mapping[str, Identity]
    ) -> dict[str, Finished]:
        """Start or resume; returns the shards that an earlier run of this part finished, hashed again.

        Args:
            sizes: bytes of each shard of the part.

        Raises:
            UsageError: what lies there, of this part or of others, is of another source or of other options.
        """
        self._plan = digest
        record = self._journal.read()
        self._check_others(digest, options)
        if record is None:
            self._tree.remove(self._part.verified)
            self._journal.begin(digest, options, sources)
            try:
                self._check_others(digest, options)  # one that began at the same time
            except UsageError:
                self._journal.drop()
                raise
            return {}
        check_sources(record, sources)
        if not is_seen_from_here(record):
            self._journal.note_sources(sources)
        return self.go_on([record], sizes)

    def _check_others(self, digest: str, options: Options) -> None:
        for name in journals(self._tree):
            opening = JournalFile(self._tree, name).opening()
            if opening is not None and opening[0] != digest:
                raise _other_conversion(self.out, name, opening[1], options)

    def finish(self, shard: str, finished: Finished) -> None:
        """Note a complete shard."""
        self.files.sync(shard)  # another machine will read it
        super().finish(shard, finished)

    def verify(self, plan: Plan, source: Source, shards: Mapping[str, Finished], jobs: int, reporter: Reporter) -> None:
        """Check the part's shards against the source, and note the verdict for `finish`; an earlier run's holds.

        Args:
            plan: of the part. A module that lies in two parts is in neither's plan: `finish` checks it.

        Raises:
            VerificationError: something differs.
        """
        if plan.shards and not self._noted(shards):
            self.note_verdict(check_part(plan, source, self.files, self.out.resolve().name, jobs, reporter), shards)

    def note_verdict(self, verdict: Verdict, shards: Mapping[str, Finished]) -> None:
        """Note the verdict on the part's shards for `finish`."""
        from xpuquant.conversion.verify.noted import note_verdict

        note_verdict(self._tree, self._part.verified, verdict, shards, self._plan)

    def _noted(self, shards: Mapping[str, Finished]) -> bool:
        """Whether an earlier run of this part has verified these very shards."""
        from xpuquant.conversion.verify.noted import read_noted

        return read_noted(self._tree, self._part.verified, shards, self._plan) is not None


def make_part(
    source: Source, out: Path, options: Options, part: Part, *, jobs: int, reporter: Reporter
) -> PartConverted:
    """Make one part's shards in the staging folder of `out`, and verify there what lies wholly in them.

    Raises: as `convert_checkpoint`.
    """
    plan = make_plan(source.checkpoint, options)
    check_places(plan, source, out)
    check_card(out)
    mine = plan.part(share(plan, part))
    reporter.phase("convert", mine.write_bytes)
    with PartStaging(out, part, reporter.note) as staging:
        check_told_apart(out, written_names(plan, source))
        done = staging.begin(plan.digest(source.fingerprint()), options, mine.shard_sizes, source.identities())
        if len(done) < len(mine.shards) and is_checked_meanwhile(mine, jobs):
            name = out.resolve().name
            finished, verdict = make_and_check_part(mine, source, staging, name, done, jobs, reporter)
            staging.note_verdict(verdict, finished)
        else:
            finished = execute_plan(mine, source, staging, jobs, done, reporter.advance)
            staging.verify(mine, source, finished, jobs, reporter)
    return PartConverted(str(part), source.name, out, finished, len(plan.shards), mine.write_bytes)


def parts_options(out: Path, told: Mapping[str, Any]) -> Options:
    """The options that the parts in `out` were converted with.

    Args:
        told: field of `Options` → value that was given again; it must be the parts'.

    Raises:
        UsageError: no part was converted there, parts differ, or `told` does.
    """
    records = _records(out)
    if not records:
        raise UsageError(
            f"{out}: no part was converted there; first convert each into it, with ", Argument("part", "i/n")
        )
    options = next(iter(records.values())).options
    for name, record in records.items():
        if record.options != options:
            raise _other_conversion(out, name, record.options, options)
    check_told(out, options, told)
    return options


def check_told(out: Path, options: Options, told: Mapping[str, Any]) -> None:
    """Raises UsageError where options that were given again are not those that `out` was converted with."""
    for theirs, ours in options.differing(Options(**told)):
        if theirs.name in told:
            what = Argument(ours.name)
            raise UsageError(f"{out}: was converted with ", theirs, ", not with ", ours, "; leave ", what, " out here")


def check_parts(source: Source, options: Options, out: Path) -> None:
    """Check that the parts in `out` are of this source and have made every shard.

    Raises:
        UsageError: a part is of another source. DamagedError: some shards have not been made.
    """
    plan = make_plan(source.checkpoint, options)
    digest = plan.digest(source.fingerprint())
    records = _records(out)
    for name, record in records.items():
        if record.plan != digest:
            raise _other_conversion(out, name, record.options, options)
    made = {shard for record in records.values() for shard in record.finished}
    missing = [shard.name for shard in plan.shards if shard.name not in made]
    if missing:
        todo = _unfinished(plan, records, made)
        what = f"{_listed(todo)} of it" if todo else "it"
        raise DamagedError(
            f"{out}: {len(missing)} of {len(plan.shards)} shards have not been made, {missing[0]} first; convert {what}"
        )


def _unfinished(plan: Plan, records: Iterable[str], made: Set[str]) -> list[Part]:
    """The parts that have shards yet to be made, of as many as the conversion was cut into."""
    counts = [part.count for part in map(_part_of, records) if part is not None]
    if not counts:
        return []
    parts = [Part(index, max(counts)) for index in range(1, max(counts) + 1)]
    return [part for part in parts if any(shard.name not in made for shard in share(plan, part))]


def _listed(parts: Sequence[Part]) -> str:
    more = f" and {len(parts) - _MOST_LISTED} more" if len(parts) > _MOST_LISTED else ""
    return f"part{'s' * (len(parts) > 1)} {', '.join(map(str, parts[:_MOST_LISTED]))}{more}"


def _records(out: Path) -> dict[str, Record]:
    if not Tree(out).is_folder(STAGING):
        return {}
    with Staging(out) as staging:
        return staging.records()


def _part_of(journal: str) -> Part | None:
    """The part whose journal has that file name; None for the journal of a whole conversion."""
    match = _JOURNAL.fullmatch(journal)
    return None if match is None else Part(int(match[1]), int(match[2]))


def _other_conversion(out: Path, journal: str, theirs: Options, ours: Options) -> UsageError:
    part = _part_of(journal)
    who = "an unfinished conversion there" if part is None else f"part {part} there"
    differing = contrast(theirs, ours)
    if not differing:
        return UsageError(
            f"{out}: {who} is of another source, of files that have changed since, or of another version of xpuquant; "
            "start over in another folder"
        )
    return UsageError(
        f"{out}: {who} was made ", *differing, "; convert every part alike, or start over in another folder"
    )
