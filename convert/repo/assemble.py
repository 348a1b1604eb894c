"""A finished repo, put together in the staging folder: copied files, index, provenance, reports, card, config.json.

The shards are there already. config.json is written last, when the staging folder is published.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xpuquant import __version__
from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.repo.card import CardFacts, gather, render
from xpuquant.conversion.repo.card_merge import CARD, merge
from xpuquant.conversion.repo.checksums import hash_file, seal
from xpuquant.conversion.repo.journal import PROVENANCE, Finished
from xpuquant.conversion.repo.provenance import provenance_record
from xpuquant.conversion.repo.staging import Staging
from xpuquant.conversion.report.reports import write_reports
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.quantization import without_quantization
from xpuquant.conversion.sources.weight_files import INDEX
from xpuquant.conversion.verify.verdict import Verdict
from xpuquant.errors import EnvironmentFault

PRODUCER = f"xpuquant {__version__}"
_EARLIER_CARD = "README.earlier.md"


def output_config(plan: Plan, source: Source) -> dict[str, Any]:
    """config.json of the output: the source's, with our quantization_config and nobody else's."""
    config = without_quantization(source.checkpoint.config)
    config["quantization_config"] = plan.quantization_config(PRODUCER)
    return config


def write_repo(
    plan: Plan,
    source: Source,
    staging: Staging,
    shards: Mapping[str, Finished],
    verdict: Verdict | None,
    command: str,
) -> None:
    """Put the repo together from the staging folder; config.json is written last."""
    files, config = stage_repo(plan, source, staging, shards, verdict, command)
    try:
        staging.publish([*(shard.name for shard in plan.shards), *files], config)
    except OSError as error:
        place = error.filename or staging.out
        raise EnvironmentFault(f"{place}: cannot be written ({error.strerror})") from error


def stage_repo(
    plan: Plan,
    source: Source,
    staging: Staging,
    shards: Mapping[str, Finished],
    verdict: Verdict | None,
    command: str,
) -> tuple[list[str], bytes]:
    """Write everything but shards and config.json into the staging folder; returns the names, and config.json."""
    folder, out = staging.folder, staging.out
    try:
        for name in source.extra_files:
            source.copy_file(name, folder / name)
        files = list(source.extra_files)
        if len(plan.shards) > 1:
            write_json(folder / INDEX, plan.index())
            files.append(INDEX)
        config = json_bytes(output_config(plan, source))
        hashes = {name: hash_file(folder / name) or "" for name in files}
        record = provenance_record(plan, source, shards, hashes, config, PRODUCER, verdict)
        write_bytes(folder / PROVENANCE, seal(json_bytes(record)))
        if verdict is not None:
            files += write_reports(folder, verdict)
        write_card(folder, gather(plan, source, verdict, command, out.resolve().name))
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
