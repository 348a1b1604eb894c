"""The main job: plan, execute, verify, write.

What flows: shards go into the staging folder of the output, are verified there, and only then is the repo put together:
copied files, shards, index, provenance, card, and config.json last of all. Until that last rename nothing can open the
folder as a model; a run that is stopped anywhere is resumed by the same command.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xpuquant import __version__
from xpuquant.convert.earlier import clear_output
from xpuquant.convert.exactness import Checked, check_exact
from xpuquant.convert.execute import execute
from xpuquant.convert.journal import (
    PROVENANCE,
    STAGING,
    Finished,
    Journal,
    check_output,
    file_sha256,
)
from xpuquant.convert.numerics import Agreement, check_kernels
from xpuquant.convert.options import Options
from xpuquant.convert.plan import Plan, make_plan
from xpuquant.convert.provenance import provenance
from xpuquant.convert.repo import Repo
from xpuquant.convert.source import Source
from xpuquant.errors import EnvironmentFault, VerificationError, one_line

PRODUCER = f"xpuquant {__version__}"
INDEX = "model.safetensors.index.json"
_HEADROOM_BYTES = 64 << 20


class Reporter(Protocol):
    """Who is told how far the work is. Called from any thread."""

    def phase(self, name: str, total: int) -> None:
        """A stage of `total` bytes begins."""
        ...

    def advance(self, nbytes: int) -> None: ...


class Silent:
    """Tells nobody."""

    def phase(self, name: str, total: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


@dataclass(frozen=True)
class Verification:
    """What was checked, and the verdicts."""

    exact: Sequence[Checked]
    kernels: Sequence[Agreement]

    @property
    def failures(self) -> list[str]:
        """One line each: the module and what is wrong with it."""
        wrong = [f"{check.name}: {check.error}" for check in self.exact if check.error is not None]
        return wrong + [
            f"{run.module}: kernel '{run.backend}' is off by {run.error:.1e} (at most {run.tolerance:.0e})"
            for run in self.kernels
            if not run.passed
        ]


@dataclass(frozen=True)
class Result:
    """A finished conversion. `verification` is None where it was not asked for."""

    out: Path
    plan: Plan
    source: Source
    shards: Mapping[str, Finished]
    verification: Verification | None


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
) -> Result:
    """Convert a checkpoint into a ready-to-load repo.

    Args:
        out: folder to write; absent, empty, an unfinished run of the same conversion, or (with `force`) an older one.
        jobs: workers.
        command: as the user gave it, for the card.

    Raises:
        UsageError, UnsupportedError: before anything is written.
        DamagedError: the source is not sound.
        VerificationError: the output is wrong; nothing loadable is left.
        EnvironmentFault: disk, permissions.
    """
    reporter = reporter or Silent()
    check_output(out, force)
    plan = make_plan(source.checkpoint, options)
    with Journal(out) as journal:
        done = journal.begin(plan.digest(source.fingerprint()), force)
        clear_output(out)
        check_disk(out, plan.write_bytes - sum(finished.nbytes for finished in done.values()))
        reporter.phase("convert", plan.write_bytes)
        shards = execute(plan, source, journal, jobs, done, reporter.advance)
        verification = None
        if verify:
            verification = verify_staged(plan, source, journal.folder, jobs, reporter)
        write_repo(plan, source, journal, shards, verification, command)
    return Result(out, plan, source, shards, verification)


def check_disk(out: Path, needed: int) -> None:
    """Raises EnvironmentFault where `needed` bytes do not fit, before they are written."""
    free = shutil.disk_usage(out).free
    if free < needed + _HEADROOM_BYTES:
        raise EnvironmentFault(
            f"{out}: {free / 1e9:.1f} GB free, the output needs {(needed + _HEADROOM_BYTES) / 1e9:.1f} GB; "
            "free some space or choose another disk"
        )


def verify_staged(plan: Plan, source: Source, folder: Path, jobs: int, reporter: Reporter) -> Verification:
    """Check the staged shards against the source.

    Raises:
        VerificationError: something differs; `verify.json` in the staging folder has all of it.
    """
    from xpuquant.kernels.reference import BACKEND

    reporter.phase("verify", sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors))
    repo = Repo(folder, tuple(shard.name for shard in plan.shards), plan.quantization_config(PRODUCER))
    try:
        exact = check_exact(plan, source, repo, jobs, reporter.advance)
        verification = Verification(exact, check_kernels(plan, source, repo, [BACKEND]))
    finally:
        repo.reader.close()
    source.check_unchanged()
    if verification.failures:
        write_json(folder / "verify.json", verification_report(verification))
        first, *more = verification.failures
        also = f" (and {len(more)} more in {folder / 'verify.json'})" if more else ""
        raise VerificationError(one_line(f"verification failed: {first}{also}; the output was not published"))
    return verification


def verification_report(verification: Verification) -> dict[str, Any]:
    """The content of verify.json."""
    return {
        "passed": not verification.failures,
        "checked_by": PRODUCER,
        "exact": {
            "modules": sum(1 for check in verification.exact if check.matrices),
            "matrices": sum(check.matrices for check in verification.exact),
            "passed_tensors": sum(1 for check in verification.exact if not check.matrices),
            "failures": {check.name: check.error for check in verification.exact if check.error is not None},
        },
        "kernels": [
            {
                "backend": run.backend, "module": run.module, "scheme": run.scheme, "N": run.N, "K": run.K,
                "relative_error": run.error, "tolerance": run.tolerance, "not_run": run.reason,
            }
            for run in verification.kernels
        ],
    }  # fmt: skip


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
    verification: Verification | None,
    command: str,
) -> None:
    """Put the repo together from the staging folder; config.json is written last."""
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
        record = provenance(plan, source, shards, hashes, config, PRODUCER)
        write_json(staging / PROVENANCE, record)
        if verification is not None:
            write_json(staging / "verify.json", verification_report(verification))
            files.append("verify.json")
        (staging / "README.md").write_text(f"# {out.name}\n\n    {command}\n")
        files += ["README.md", PROVENANCE]
        journal.publish([*(shard.name for shard in plan.shards), *files], config)
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or out}: cannot be written ({error.strerror})") from error


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON as the ecosystem writes it: two spaces, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write and flush; the staging folder makes it atomic."""
    with path.open("wb") as file:
        file.write(json_bytes(value))
        file.flush()
        os.fsync(file.fileno())


def default_output(name: str, layout: str) -> Path:
    """`Qwen3-8B-GPTQ` → `Qwen3-8B-GPTQ-xpu` in the current folder."""
    return Path(f"{Path(name).resolve().name if Path(name).exists() else name.rpartition('/')[2]}-{layout}")


__all__ = ["PRODUCER", "STAGING", "Result", "Verification", "convert", "default_output"]
