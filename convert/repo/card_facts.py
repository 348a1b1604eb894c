"""What a card says about a conversion, gathered from its plan, source and verification."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from xpuquant import __version__
from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.plan.survey import PlannedModule, kind_of
from xpuquant.conversion.repo.card import CardFacts, SchemeCount, VerificationSummary
from xpuquant.conversion.repo.card_merge import front_matter
from xpuquant.conversion.report.reports import in_one_line
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.verify.verdict import Verdict
from xpuquant.formats.scheme import compact

CARD = "README.md"
_TOOLS = ("numpy", "ml_dtypes", "torch")
_CACHED_REPO = re.compile(r"models--([^/]+?)--([^/]+)")
_SHOWN_NAMES = 12


def gather(plan: Plan, source: Source, verdict: Verdict | None, command: str, name: str) -> CardFacts:
    """The facts of a finished conversion.

    Args:
        command: as typed.
        name: how the result is served: its folder's name, or its repo id.
    """
    metadata = front_matter(source.read_text(CARD) or "")
    config = source.checkpoint.config
    return CardFacts(
        name=name,
        base_model=_base_model(source, metadata.get("base_model")),
        revision=source.revision or _cached(source.name)[1],
        command=command,
        versions=_versions(),
        schemes=_schemes(plan),
        left=_left(plan, source),
        source_bytes=source.nbytes,
        bytes=plan.write_bytes,
        shards=len(plan.shards),
        verification=None if verdict is None else _verification(verdict),
        source_metadata=metadata,
        is_multimodal=isinstance(config.get("vision_config"), dict),
        layout=plan.options.layout,
    )


def precision(planned: PlannedModule) -> str:
    """`int4`, `fp8`, `mxfp4`, `mxfp8`, or `bf16` where a module was dequantized."""
    scheme = planned.conversion.scheme
    return "bf16" if scheme is None else scheme.layout.removeprefix("ct_").partition("_")[0]


def _base_model(source: Source, said: object) -> str | None:
    """The repo that was converted; of a plain folder, what its own card calls its base: a conversion is below that
    too."""
    if source.revision is not None:
        return source.name
    cached, _ = _cached(source.name)
    if cached is not None:
        return cached
    if isinstance(said, list) and said:
        said = said[0]
    return said if isinstance(said, str) and said else None


def _cached(name: str) -> tuple[str | None, str | None]:
    """(repo id, commit) of a folder in the Hub client's cache: `models--OWNER--NAME/snapshots/COMMIT`."""
    path = Path(name).resolve()
    match = _CACHED_REPO.fullmatch(path.parent.parent.name)
    if match is None or path.parent.name != "snapshots":
        return None, None
    return f"{match[1]}/{match[2]}", path.name


def _versions() -> dict[str, str]:
    found = {"xpuquant": __version__}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found | {"Python": platform.python_version()}


def _schemes(plan: Plan) -> list[SchemeCount]:
    groups: dict[tuple[str, str, str], list[PlannedModule]] = {}
    for planned in plan.modules:
        scheme = planned.conversion.scheme
        stored = "bf16 (dequantized)" if scheme is None else scheme.label()
        groups.setdefault((kind_of(planned.source), stored, precision(planned)), []).append(planned)
    return [
        SchemeCount(*key, modules=len(members), nbytes=sum(member.nbytes for member in members))
        for key, members in groups.items()
    ]


def _left(plan: Plan, source: Source) -> list[tuple[str, str]]:
    left = []
    matrices = compact(tensor.name.removesuffix(".weight") for tensor in plan.passed if len(tensor.shape) >= 2)
    if matrices:
        more = f" and {len(matrices) - _SHOWN_NAMES} more" if len(matrices) > _SHOWN_NAMES else ""
        left.append((", ".join(matrices[:_SHOWN_NAMES]) + more, "not quantized in the source, kept as they are"))
    reasons: dict[str, list[str]] = {}
    for planned in plan.dequantized:
        reasons.setdefault("; ".join(planned.conversion.facts), []).append(planned.conversion.name)
    left += [(", ".join(compact(names)), why) for why, names in reasons.items()]
    return left + [(f"file {name}", why) for name, why in source.left_files.items() if name != CARD]


def _verification(verdict: Verdict) -> VerificationSummary:
    lines = [in_one_line(verdict)]
    lines += [f"warning: {finding.line()}" for finding in verdict.warnings]
    if verdict.unavailable:
        lines.append("Kernels that could not run where it was converted: " + ", ".join(sorted(verdict.unavailable)))
    return VerificationSummary(lines, "verify.svg", "verify.md")
