"""xpuquant.json: where a converted repo comes from, what was decided for each module and why, what each file's sha256
must be, and what each module decodes to. `verify` and a later `push` read it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.repo.checksums import UNSEALED
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.verify.derivation import derived
from xpuquant.conversion.verify.proof import Checked


def provenance_record(
    plan: Plan,
    source: Source,
    shards: Mapping[str, Finished],
    files: Mapping[str, str],
    config: bytes,
    producer: str,
    exact: Sequence[Checked],
) -> dict[str, Any]:
    """The content of xpuquant.json, still to be sealed (`checksums.seal`). Holds no time and no machine: equal
    conversions write equal files.

    Args:
        exact: what the comparison with the source found of each module and tensor; nothing where there was none.
    """
    return {
        "sha256": UNSEALED,
        "producer": producer,
        **derived(plan, source, exact),
        "shards": {
            name: {"sha256": finished.sha256, "bytes": finished.nbytes} for name, finished in sorted(shards.items())
        },
        "files": {**files, "config.json": hashlib.sha256(config).hexdigest()},
    }
