"""The main job: plan, execute, verify, write.

What flows: shards go into the staging folder of the output, are verified there (`staged.py`), and only then is the repo
put together: copied files, shards, index, provenance, card, and config.json last of all. Until that last rename nothing
can open the folder as a model; a run that is stopped anywhere is resumed by the same command.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.plan.survey import kind_of
from xpuquant.conversion.progress import Progress, Reporter, Silent
from xpuquant.conversion.repo.card_merge import check_card, keep_card
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.repo.replace import clear_output
from xpuquant.conversion.repo.source_card import NOTHING_TOLD, CardFields, metadata_of
from xpuquant.conversion.repo.staging import Staging, check_output, check_told_apart
from xpuquant.conversion.runs.staged import check_staged, is_checked_meanwhile, make_and_check
from xpuquant.conversion.sizes import size
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.repo_files import WRITTEN
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write.execute import execute_plan
from xpuquant.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from xpuquant.conversion.results import Converted
    from xpuquant.conversion.verify.verdict import Verdict

_HEADROOM_BYTES = 64 << 20


class Executor(Protocol):
    """Carries out a plan: `execute` on this machine, `execute_on_ray` on a cluster."""

    def __call__(
        self,
        plan: Plan,
        source: Source,
        staging: Staging,
        *,
        jobs: int,
        done: dict[str, Finished],
        progress: Progress,
        read_again: bool,
    ) -> dict[str, Finished]:
        """Make every shard of the plan that is not done. See `execute`."""
        ...


def convert_checkpoint(
    source: Source,
    out: Path,
    options: Options,
    *,
    jobs: int,
    verify: bool = True,
    force: bool = False,
    reporter: Reporter | None = None,
    command: str = "xpuquant convert",
    card: CardFields = NOTHING_TOLD,
    executor: Executor = execute_plan,
) -> Converted:
    """Convert a checkpoint into a ready-to-load repo.

    Args:
        source: its weights are on this machine, see `downloaded`.
        out: folder to write; absent, empty, an unfinished run of the same conversion, or (with `force`) an older one.
        jobs: workers.
        command: as the user gave it, for the card.
        card: what the card is told to say.
        executor: who carries out the plan.

    Raises:
        UsageError, UnsupportedError: before anything is written.
        DamagedError: the source is not sound.
        VerificationError: the output is wrong; nothing loadable is left.
        EnvironmentFault: disk, permissions.
    """
    reporter = reporter or Silent()
    check_apart(source, out)
    check_output(out, force)
    plan = make_plan(source.checkpoint, options)
    check_places(plan, source, out)
    check_card(out)
    metadata = metadata_of(source, card, reporter.note)
    reporter.begins(_about_to(plan, source, str(out)))
    with Staging(out, reporter.note) as staging:
        check_told_apart(out, written_names(plan, source))
        done = staging.begin(plan.digest(source.fingerprint()), options, plan.shard_sizes, force, source.identities())
        keep_card(staging)
        clear_output(out)
        check_disk(out, plan.write_bytes - sum(f.nbytes for f in done.values()) - staging.noted_bytes(done))
        reporter.phase("convert", plan.write_bytes)
        verdict: Verdict | None = None
        if verify and executor is execute_plan and is_checked_meanwhile(plan, jobs):
            shards, verdict = make_and_check(plan, source, staging, done, jobs, reporter)
        else:
            is_kept = verify and _fits_memory(plan.write_bytes)
            shards = executor(
                plan, source, staging, jobs=jobs, done=done, progress=reporter.advance, read_again=is_kept
            )
            if verify:
                verdict = check_staged(plan, source, staging, shards, jobs, reporter)
        # What tells of the result is imported when there is one: the first byte does not wait for it.
        from xpuquant.conversion.repo.assemble import write_repo
        from xpuquant.conversion.results import Converted, summary

        write_repo(plan, source, staging, shards, verdict, command, metadata)
    return Converted(summary(plan, source), out, shards, verdict, kept=staging.kept)


def _about_to(plan: Plan, source: Source, where: str) -> str:
    """What a conversion is about to do, in one line: its source, the source's format, what is written where."""
    formats = " + ".join(dict.fromkeys(kind_of(module.source) for module in plan.modules)) or "nothing quantized"
    schemes = [module.conversion.scheme for module in plan.modules]
    made = " + ".join(dict.fromkeys("bf16" if scheme is None else scheme.layout for scheme in schemes))
    at = "" if source.revision is None else f" at {source.revision[:12]}"
    return f"{source.name}{at}: {formats}, {size(source.nbytes)} → {where}: {made}, {size(plan.write_bytes)}"


def downloaded(source: Source, options: Options, reporter: Reporter) -> Source:
    """A source whose weights are here: a repository on the Hub is downloaded into the client's cache, after its headers
    have shown that it will convert.

    Raises:
        UnsupportedError, UsageError: as planning. EnvironmentFault: network, disk.
    """
    fetch = getattr(source, "fetch", None)
    if fetch is None:
        return source
    make_plan(source.checkpoint, options)
    reporter.phase("download", source.nbytes)
    fetched: Source = fetch(reporter.advance)
    return fetched


def _fits_memory(nbytes: int) -> bool:
    """Whether a repo can be read again from the page cache: what is larger would be gone from it by then."""
    return nbytes < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def check_apart(source: Source, out: Path) -> None:
    """Raises UsageError where the output would lie in the source, which is never written to, or the source in it."""
    if source.revision is None and Path(source.name).is_dir():
        one, other = Path(source.name).resolve(), out.resolve()
        if _lies_in(one, other) or _lies_in(other, one):
            raise UsageError(f"{out}: source and output must not lie in each other; choose another folder")


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder, or leads through it, also under a name that is spelt otherwise: where the file system
    does not tell capitals, a folder has several."""
    if not folder.exists():
        return path.is_relative_to(folder)
    return any(place.exists() and place.samefile(folder) for place in (path, *path.parents))


def check_places(plan: Plan, source: Source, out: Path) -> None:
    """Raises UsageError where something in `out` is in the way of a file that the conversion writes: said before the
    work, and before an earlier conversion is cleared."""
    tree = Tree(out)
    for name in written_names(plan, source):
        tree.check_place(name)


def written_names(plan: Plan, source: Source) -> tuple[str, ...]:
    """Every file that a conversion may write."""
    return (*WRITTEN, *(shard.name for shard in plan.shards), *source.extra_files)


def check_disk(out: Path, needed: int) -> None:
    """Raises EnvironmentFault where `needed` bytes do not fit, before they are written."""
    free = shutil.disk_usage(out).free
    if free < needed + _HEADROOM_BYTES:
        raise EnvironmentFault(
            f"{out}: {free / 1e9:.1f} GB free, the output needs {(needed + _HEADROOM_BYTES) / 1e9:.1f} GB; "
            "free some space or choose another disk"
        )
