"""The main job: plan, execute, verify, write.

What flows: shards go into the staging folder of the output, are verified there, and only then is the repo put together:
copied files, shards, index, provenance, card, and config.json last of all. Until that last rename nothing can open the
folder as a model; a run that is stopped anywhere is resumed by the same command.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xpuquant import __version__
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.progress import Progress, Reporter, Silent
from xpuquant.conversion.repo.card import CardFacts, gather, render
from xpuquant.conversion.repo.card_merge import CARD, merge
from xpuquant.conversion.repo.checksums import seal
from xpuquant.conversion.repo.converted import Repo
from xpuquant.conversion.repo.journal import (
    PROVENANCE,
    STAGING,
    Finished,
    Journal,
    check_output,
    file_sha256,
)
from xpuquant.conversion.repo.provenance import provenance
from xpuquant.conversion.repo.replace import clear_output
from xpuquant.conversion.report.reports import write_reports
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.verify.context import Check, Origin
from xpuquant.conversion.verify.run import verify_staged
from xpuquant.conversion.verify.verdict import Verdict
from xpuquant.conversion.write.execute import execute
from xpuquant.errors import EnvironmentFault, UsageError, VerificationError

PRODUCER = f"xpuquant {__version__}"
INDEX = "model.safetensors.index.json"
_EARLIER_CARD = "README.earlier.md"
_HEADROOM_BYTES = 64 << 20


Executor = Callable[[Plan, Source, Journal, int, dict[str, Finished], Progress, bool], dict[str, Finished]]
"""Carries out a plan: `execute` here, `execute_on_ray` on a cluster."""


@dataclass(frozen=True)
class Result:
    """A finished conversion. `verification` is None where it was not asked for."""

    out: Path
    plan: Plan
    source: Source
    shards: Mapping[str, Finished]
    verification: Verdict | None


def convert(
    source: Source,
    out: Path,
    options: Options,
    *,
    jobs: int,
    verify: bool = True,
    force: bool = False,
    reporter: Reporter | None = None,
    command: str = "xpuquant convert",
    executor: Executor = execute,
) -> Result:
    """Convert a checkpoint into a ready-to-load repo.

    Args:
        out: folder to write; absent, empty, an unfinished run of the same conversion, or (with `force`) an older one.
        jobs: workers.
        command: as the user gave it, for the card.
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
    with Journal(out) as journal:
        done = journal.begin(plan.digest(source.fingerprint()), force)
        keep_card(out, journal.folder)
        clear_output(out)
        check_disk(out, plan.write_bytes - sum(finished.nbytes for finished in done.values()))
        reporter.phase("convert", plan.write_bytes)
        shards = executor(
            plan, source, journal, jobs, done, reporter.advance, verify and _fits_memory(plan.write_bytes)
        )
        verification = None
        if verify:
            verification = check_staged(plan, source, journal.folder, out.resolve().name, jobs, reporter)
        write_repo(plan, source, journal, shards, verification, command)
    return Result(out, plan, source, shards, verification)


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
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise UsageError(f"{out}: source and output must not lie in each other; choose another folder")


def check_disk(out: Path, needed: int) -> None:
    """Raises EnvironmentFault where `needed` bytes do not fit, before they are written."""
    free = shutil.disk_usage(out).free
    if free < needed + _HEADROOM_BYTES:
        raise EnvironmentFault(
            f"{out}: {free / 1e9:.1f} GB free, the output needs {(needed + _HEADROOM_BYTES) / 1e9:.1f} GB; "
            "free some space or choose another disk"
        )


def check_staged(plan: Plan, source: Source, folder: Path, name: str, jobs: int, reporter: Reporter) -> Verdict:
    """Check the staged shards against the source.

    Raises:
        VerificationError: something differs; `verify.json` in the staging folder has all of it.
    """
    reporter.phase("verify", sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors))
    repo = Repo(folder, tuple(shard.name for shard in plan.shards), plan.quantization_config(PRODUCER))
    try:
        check = Check(repo, jobs=jobs, progress=reporter.advance)
        verdict = verify_staged(Origin(plan, source), check, name, PRODUCER)
    finally:
        repo.reader.close()
    source.check_unchanged()
    raise_failures(verdict, folder)
    return verdict


def raise_failures(verdict: Verdict, folder: Path) -> None:
    """Raises VerificationError where something failed; the reports in `folder` have all of it."""
    if not verdict.passed:
        write_reports(folder, verdict)
        first, *more = (f"{finding.where}: {finding.what}" for finding in verdict.failing)
        also = f" (and {len(more)} more in {folder / 'verify.json'})" if more else ""
        raise VerificationError(f"verification failed: {first}{also}; the output was not published")


def output_config(plan: Plan, source: Source) -> dict[str, Any]:
    """config.json of the output: the source's, with our quantization_config and nobody else's."""
    config = {key: value for key, value in source.checkpoint.config.items() if key != "compression_config"}
    text = config.get("text_config")
    if isinstance(text, dict) and "quantization_config" in text:
        config["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    config["quantization_config"] = plan.quantization_config(PRODUCER)
    return config


def write_repo(
    plan: Plan,
    source: Source,
    journal: Journal,
    shards: Mapping[str, Finished],
    verification: Verdict | None,
    command: str,
) -> None:
    """Put the repo together from the staging folder; config.json is written last."""
    files, config = stage_repo(plan, source, journal, shards, verification, command)
    try:
        journal.publish([*(shard.name for shard in plan.shards), *files], config)
    except OSError as error:
        place = error.filename or journal.out
        raise EnvironmentFault(f"{place}: cannot be written ({error.strerror})") from error


def stage_repo(
    plan: Plan,
    source: Source,
    journal: Journal,
    shards: Mapping[str, Finished],
    verification: Verdict | None,
    command: str,
) -> tuple[list[str], bytes]:
    """Write everything but shards and config.json into the staging folder; returns the names, and config.json."""
    staging, out = journal.folder, journal.out
    try:
        for name in source.extra_files:
            source.copy_file(name, staging / name)
        files = list(source.extra_files)
        if len(plan.shards) > 1:
            write_json(staging / INDEX, plan.index())
            files.append(INDEX)
        config = json_bytes(output_config(plan, source))
        hashes = {name: file_sha256(staging / name) or "" for name in files}
        record = provenance(plan, source, shards, hashes, config, PRODUCER, verification)
        write_bytes(staging / PROVENANCE, seal(json_bytes(record)))
        if verification is not None:
            files += write_reports(staging, verification)
        write_card(staging, gather(plan, source, verification, command, out.resolve().name))
        files += [CARD, PROVENANCE]
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or out}: cannot be written ({error.strerror})") from error
    return files, config


def keep_card(out: Path, folder: Path) -> None:
    """Set an earlier conversion's card aside: what people wrote into it goes into the new one."""
    if (out / CARD).exists() and (out / PROVENANCE).exists():
        shutil.copyfile(out / CARD, folder.parent / _EARLIER_CARD)


def write_card(folder: Path, facts: CardFacts) -> None:
    """README.md of the output."""
    earlier = folder.parent / _EARLIER_CARD
    theirs = earlier.read_text(encoding="utf-8", errors="replace") if earlier.exists() else None
    text, _ = merge(render(facts), theirs)
    write_bytes(folder / CARD, text.encode())


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON as the ecosystem writes it: two spaces, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write and flush; the staging folder makes it atomic."""
    write_bytes(path, json_bytes(value))


def write_bytes(path: Path, content: bytes) -> None:
    """Write and flush."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def default_output(name: str, layout: str) -> Path:
    """`Qwen3-8B-GPTQ` → `Qwen3-8B-GPTQ-xpu` in the current folder."""
    return Path(f"{Path(name).resolve().name if Path(name).exists() else name.rpartition('/')[2]}-{layout}")


__all__ = ["PRODUCER", "STAGING", "Result", "convert", "default_output"]
