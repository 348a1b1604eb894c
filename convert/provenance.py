"""xpuquant.json: where a converted repo comes from, what was decided for each module and why, and what each file's
sha256 must be. `verify` and a later `push` read it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from xpuquant.convert.journal import Finished
from xpuquant.convert.plan import Plan, PlannedModule, kind_of
from xpuquant.convert.source import Source
from xpuquant.formats.scheme import FORMAT_VERSION, compact


def provenance(
    plan: Plan,
    source: Source,
    shards: Mapping[str, Finished],
    files: Mapping[str, str],
    config: bytes,
    producer: str,
) -> dict[str, Any]:
    """The content of xpuquant.json. Holds no time and no machine: equal conversions write equal files."""
    return {
        "producer": producer,
        "format_version": FORMAT_VERSION,
        "source": {
            "name": source.name.rstrip("/").rpartition("/")[2] if source.revision is None else source.name,
            "revision": source.revision,
            "bytes": source.nbytes,
            "quantization_config": dict(source.checkpoint.quantization),
            "notes": list(plan.notes),
        },
        "options": plan.options.as_dict(),
        "modules": {planned.conversion.name: _module(planned) for planned in plan.modules},
        "unquantized": compact(tensor.name for tensor in plan.passed),
        "left_files": dict(source.left_files),
        "shards": {
            name: {"sha256": finished.sha256, "bytes": finished.nbytes}
            for name, finished in sorted(shards.items())
        },
        "files": {**files, "config.json": hashlib.sha256(config).hexdigest()},
    }


def _module(planned: PlannedModule) -> dict[str, Any]:
    scheme = planned.conversion.scheme
    names = [tensor.name for _, _, weight in planned.weights for tensor in weight.tensors]
    return {
        "scheme": "bf16 (dequantized)" if scheme is None else scheme.label(),
        "from": kind_of(planned.source),
        "source_tensors": compact(dict.fromkeys(names)),
        "decisions": list(planned.conversion.facts),
    }
