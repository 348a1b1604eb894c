"""One conversion by many processes that share a disk: SLURM arrays, or any scheduler.

    xpuquant convert SRC OUT --shard 1/16        each of these makes its share of the shards
    ...
    xpuquant convert SRC OUT --shard 16/16
    xpuquant finish SRC OUT                      checks that all are there, verifies, publishes

What flows: every process plans alone; equal sources and options give equal plans, and the plan's digest, the first
line of every part's journal, proves it. Shares are runs of shards of about equal bytes. A part that dies is run again
with the same command and skips the shards it had finished. Who excludes whom: parts hold OUT's lock together, each its
own part's lock alone; `finish` and a plain `convert` want OUT's lock alone, so neither runs beside a part.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xpuquant.conversion.cli.output import Answer
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.journal import STAGING, Finished, check_output, file_sha256, sync
from xpuquant.conversion.sizes import size
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.write.execute import execute
from xpuquant.errors import DamagedError, EnvironmentFault, UsageError

_JOURNAL = "journal.jsonl"
_LOCK = "lock"
_FILES = "files"


@dataclass(frozen=True)
class Part:
    """Part `index` of `count`, from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def journal(self) -> str:
        return f"part-{self.index:05}-of-{self.count:05}.jsonl"


def parse_part(text: str) -> Part:
    """`3/16`.

    Raises:
        UsageError: anything else, or a part beyond the last.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text}: want i/n with 1 <= i <= n, for example 3/16")
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


class PartStaging:
    """The staging folder as one part sees it. Use as a context manager: it holds the locks."""

    def __init__(self, out: Path, part: Part, digest: str) -> None:
        self.out = out
        self.folder = out / STAGING / _FILES
        self._journal = out / STAGING / part.journal
        self._part = part
        self._digest = digest
        self._locks: list[int] = []

    def __enter__(self) -> PartStaging:
        check_output(self.out, force=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock(
                self.out / STAGING / _LOCK,
                fcntl.LOCK_SH,
                f"{self.out}: a conversion or `finish` is at work there",
            )
            own = self._journal.with_suffix(".lock")
            self._lock(own, fcntl.LOCK_EX, f"{self.out}: part {self._part} is being converted already")
        except OSError as error:
            raise EnvironmentFault(f"{self.out}: cannot be written ({error.strerror})") from error
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in self._locks:
            os.close(fd)
        self._locks.clear()

    def done(self) -> dict[str, Finished]:
        """Shards this part finished in an earlier run, hashed again.

        Raises:
            UsageError: the part belongs to a conversion of another source or with other options.
        """
        found = read_journal(self._journal, self._digest)
        if not found:
            self._append({"plan": self._digest})
        return {name: f for name, f in found.items() if file_sha256(self.folder / name) == f.sha256}

    def finish(self, shard: str, finished: Finished) -> None:
        """Note a complete shard."""
        sync(self.folder / shard)  # another machine will read it
        self._append({"shard": shard, "sha256": finished.sha256, "nbytes": finished.nbytes})

    def _lock(self, path: Path, kind: int, busy: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._locks.append(fd)
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{busy}; wait for it to end") from None

    def _append(self, line: dict[str, object]) -> None:
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: Path, digest: str) -> dict[str, Finished]:
    """Finished shards of one part's journal; a line cut short by a crash ends it.

    Raises:
        UsageError: it is the journal of another plan.
    """
    finished: dict[str, Finished] = {}
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    for number, text in enumerate(lines):
        try:
            line = json.loads(text)
            if number == 0 and line["plan"] != digest:
                raise UsageError(
                    f"{path.parent.parent}: {path.name} is of another source or of other options; "
                    "start over in another folder"
                )
            if number:
                finished[line["shard"]] = Finished(line["sha256"], line["nbytes"])
        except (ValueError, KeyError):
            break
    return finished


def convert_part(source: Source, out: Path, options: Options, part: Part, jobs: int, reporter: Reporter) -> Answer:
    """Make one part's shards in the staging folder of `out`.

    Raises:
        as `conversion.convert`, but for the verification, which `finish` does.
    """
    plan = make_plan(source.checkpoint, options)
    mine = plan.part(share(plan, part))
    reporter.phase("convert", mine.write_bytes)
    with PartStaging(out, part, plan.digest(source.fingerprint())) as staging:
        finished = execute(mine, source, staging, jobs, staging.done(), reporter.advance)
    text = f"part {part}: {len(finished)} of {len(plan.shards)} shards, {size(mine.write_bytes)}, staged in {out}"
    hint = f"when every part is done: xpuquant finish {source.name} {out}, with the same options"
    return Answer([text, hint], {"part": str(part), "shards": {n: f.sha256 for n, f in finished.items()}})


def adopt_parts(source: Source, options: Options, out: Path) -> None:
    """Gather the journals of all parts into the one that a conversion resumes from.

    Raises:
        UsageError: no part was ever run here.
        DamagedError: some shards have not been made.
    """
    staging = out / STAGING
    if (staging / _JOURNAL).exists():
        return
    plan = make_plan(source.checkpoint, options)
    digest = plan.digest(source.fingerprint())
    finished: dict[str, Finished] = {}
    journals: Sequence[Path] = sorted(staging.glob("part-*.jsonl"))
    if not journals:
        raise UsageError(f"{out}: no part was converted there; run `xpuquant convert SRC OUT --shard i/n` first")
    for journal in journals:
        finished |= read_journal(journal, digest)
    missing = [shard.name for shard in plan.shards if shard.name not in finished]
    if missing:
        raise DamagedError(
            f"{out}: {len(missing)} of {len(plan.shards)} shards have not been made, {missing[0]} first; "
            "run their parts again"
        )
    lines = [{"plan": digest}]
    lines += [{"shard": n, "sha256": f.sha256, "nbytes": f.nbytes} for n, f in finished.items()]  # type: ignore[dict-item]
    merged = staging / "journal.new"
    merged.write_text("".join(json.dumps(line) + "\n" for line in lines))
    merged.replace(staging / _JOURNAL)
