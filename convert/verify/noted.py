"""Verdicts on some of a conversion's shards, kept until all of them are put together.

A note names the shards and their sha256: it speaks of bytes, and is believed only of a repo that has these, in a
conversion of the same plan and source, and only where this user made it (`vouching.py`). So a part is verified on the
machine that made it, a stream shard by shard, and what puts them together reads no source again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.repo.staging import VERIFIED_PART
from xpuquant.conversion.sources.base import Source, bytes_by_dtype
from xpuquant.conversion.sources.repo_files import read_json
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify.exactness import Known
from xpuquant.conversion.verify.proof import Checked
from xpuquant.conversion.verify.verdict import Sanity, Verdict
from xpuquant.conversion.vouching import is_ours, mark_of
from xpuquant.errors import XpuquantError
from xpuquant.values import frozen


@frozen
class Noted:
    """What was found of `shards`, by name."""

    shards: frozenset[str]
    verdict: Verdict


def note_verdict(tree: Tree, name: str, verdict: Verdict, shards: Mapping[str, Finished], plan: str) -> None:
    """Keep the verdict on some shards in a file.

    Args:
        plan: digest of the plan and the source that they were compared with.

    Raises:
        OSError: it cannot be written.
    """
    hashes = {shard: finished.sha256 for shard, finished in shards.items()}
    note = {"plan": plan, "shards": hashes, "verdict": verdict.to_json()}
    tree.write(name, json.dumps({**note, "mark": mark_of(_text(note))}).encode())


def _text(note: Mapping[str, Any]) -> bytes:
    """A note as it is marked; the same after it has been written and read."""
    return json.dumps(json.loads(json.dumps(note)), sort_keys=True).encode()


def read_noted(tree: Tree, name: str, held: Mapping[str, Finished], plan: str) -> Noted | None:
    """The verdict in a file, where this user noted it of the same plan and the shards it is on are among those held,
    byte for byte; else None."""
    try:
        note = read_json(tree, name)
        mark = note.pop("mark")
        if note["plan"] != plan or not is_ours(_text(note), mark):
            return None
        shards = dict(note["shards"])
        if any(held[shard].sha256 != sha256 for shard, sha256 in shards.items()):
            return None
        return Noted(frozenset(shards), Verdict.from_json(note["verdict"]))
    except (XpuquantError, KeyError, TypeError, ValueError):
        return None


def known_of(staging: Tree, held: Mapping[str, Finished], plan: str) -> Known:
    """What the parts of a conversion noted of theirs in its staging folder; of shards that are held, byte for byte."""
    found: dict[str, tuple[Checked, Sanity | None]] = {}
    for name in staging.names():
        noted = read_noted(staging, name, held, plan) if name.endswith(VERIFIED_PART) else None
        if noted is not None:
            verdict = noted.verdict
            found |= {checked.name: (checked, verdict.sanity.get(checked.name)) for checked in verdict.exact}
    return found


def joined_verdicts(verdicts: Sequence[Verdict], source: Source) -> Verdict:
    """One verdict of those on different modules."""
    after: dict[str, int] = {}
    for verdict in verdicts:
        for dtype, nbytes in verdict.after.items():
            after[dtype] = after.get(dtype, 0) + nbytes
    return replace(
        verdicts[0],
        shards=sum(verdict.shards for verdict in verdicts),
        exact=[checked for verdict in verdicts for checked in verdict.exact],
        kernels=[run for verdict in verdicts for run in verdict.kernels],
        sanity={name: sanity for verdict in verdicts for name, sanity in verdict.sanity.items()},
        findings=[finding for verdict in verdicts for finding in verdict.findings],
        schemes={name: scheme for verdict in verdicts for name, scheme in verdict.schemes.items()},
        before=bytes_by_dtype(source.checkpoint.tensors.values()),
        after=after,
        setting=verdicts[-1].setting,
    )
