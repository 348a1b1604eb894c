"""A finished repo, put together in the staging folder: copied files, index, provenance, reports, card, config.json.

The shards are there already. config.json is written last, when the staging folder is published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.repo.card import CardFacts, gather, render
from xpuquant.conversion.repo.card_merge import CARD, merge, staged_card
from xpuquant.conversion.repo.checksums import seal
from xpuquant.conversion.repo.journal import PRODUCER, PROVENANCE, Finished
from xpuquant.conversion.repo.provenance import provenance_record
from xpuquant.conversion.repo.staging import Staging
from xpuquant.conversion.report.reports import write_reports
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.weight_files import INDEX
from xpuquant.conversion.tree import Written
from xpuquant.conversion.verify.verdict import Verdict
from xpuquant.errors import EnvironmentFault


def write_repo(
    plan: Plan,
    source: Source,
    staging: Staging,
    shards: Mapping[str, Finished],
    verdict: Verdict | None,
    command: str,
    metadata: Mapping[str, Any],
) -> None:
    """Put the repo together from the staging folder; config.json is written last.

    Args:
        metadata: of the source's card, read before the work: see `source_card.metadata_of`.
    """
    files, config = stage_repo(plan, source, staging, shards, verdict, command, metadata)
    try:
        staging.publish([shard.name for shard in plan.shards], files, config)
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
    metadata: Mapping[str, Any],
) -> tuple[dict[str, Written], bytes]:
    """Write everything but shards and config.json into the staging folder; returns the files, and config.json."""
    tree, out = staging.files, staging.out
    try:
        files = {name: source.copy_file(name, tree) for name in source.extra_files}
        source.check_unchanged()
        if len(plan.shards) > 1:
            files[INDEX] = tree.write(INDEX, json_bytes(plan.index()))
        config = json_bytes(plan.output_config(source.checkpoint.config, PRODUCER))
        hashes = {name: written.sha256 for name, written in files.items()}
        exact = verdict.exact if verdict is not None else ()
        record = provenance_record(plan, source, shards, hashes, config, PRODUCER, exact)
        files[PROVENANCE] = tree.write(PROVENANCE, seal(json_bytes(record)))
        if verdict is not None:
            files |= write_reports(tree, verdict)
        files[CARD] = write_card(staging, gather(plan, source, verdict, command, out.resolve().name, metadata))
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or out}: cannot be written ({error.strerror})") from error
    return files, config


def write_card(staging: Staging, facts: CardFacts) -> Written:
    """README.md of the output."""
    text, _ = merge(render(facts), staged_card(staging.tree))
    return staging.files.write(CARD, text.encode())


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON as the ecosystem writes it: two spaces, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
