"""xpuquant.json: where a converted repo comes from, what was decided for each module and why, what each file's sha256
must be, and what each module decodes to. `verify` and a later `push` read it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.plan.survey import PlannedModule, kind_of
from xpuquant.conversion.repo.checksums import UNSEALED
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.verify.digests import KIND
from xpuquant.conversion.verify.proof import Checked
from xpuquant.conversion.verify.run import sizes
from xpuquant.conversion.verify.verdict import Verdict
from xpuquant.formats.scheme import compact


def provenance_record(
    plan: Plan,
    source: Source,
    shards: Mapping[str, Finished],
    files: Mapping[str, str],
    config: bytes,
    producer: str,
    verdict: Verdict | None,
) -> dict[str, Any]:
    """The content of xpuquant.json, still to be sealed (`checksums.seal`). Holds no time and no machine: equal
    conversions write equal files."""
    checks = {checked.name: checked for checked in verdict.exact if checked.digest} if verdict else {}
    modules = {planned.conversion.name: planned for planned in plan.modules}
    return {
        "sha256": UNSEALED,
        "producer": producer,
        "format_version": plan.format_version,
        "source": {
            "name": source.name.rstrip("/").rpartition("/")[2] if source.revision is None else source.name,
            "revision": source.revision,
            "bytes": source.nbytes,
            "bytes_by_dtype": sizes(source),
            "quantization_config": dict(source.checkpoint.quantization),
            "notes": list(plan.notes),
        },
        "options": plan.options.as_dict(),
        "modules": {name: _module(planned, checks.get(name)) for name, planned in modules.items()},
        "unquantized": compact([*(tensor.name for tensor in plan.passed), *plan.split_biases]),
        "tensors_sha256": {name: one.digest for name, one in sorted(checks.items()) if name not in modules},
        "left_files": dict(source.left_files),
        "shards": {
            name: {"sha256": finished.sha256, "bytes": finished.nbytes} for name, finished in sorted(shards.items())
        },
        "files": {**files, "config.json": hashlib.sha256(config).hexdigest()},
    }


def _module(planned: PlannedModule, checked: Checked | None) -> dict[str, Any]:
    """What is recorded of a module. `checked` is None where it was not verified."""
    scheme = planned.conversion.scheme
    names = [tensor.name for _, _, weight in planned.weights for tensor in weight.tensors]
    entry: dict[str, Any] = {
        "scheme": "bf16 (dequantized)" if scheme is None else scheme.label(),
        "from": kind_of(planned.source),
        "source_tensors": compact(dict.fromkeys(names)),
        "decisions": list(planned.conversion.facts),
    }
    if scheme is None:
        entry["dequantized"] = [tensor.name for tensor in planned.conversion.tensors]
    elif checked is not None:
        entry["roles"] = list(dict.fromkeys(role for role, _, _ in planned.weights))
        entry[KIND] = checked.digest
        if checked.rounding is not None:
            rounding = checked.rounding
            entry["rounding"] = {
                "dtype": rounding.dtype,
                "scales": rounding.numbers,
                "changed": rounding.changed,
                "largest": rounding.largest,
            }
    return entry
