"""The model card: facts gathered from a conversion (`gather`), and README.md made from them (`render`). What people
write into a card is kept by `card_merge.py`.

The metadata follows the Hub's model card specification (`base_model_relation: quantized` puts the repository below its
base in the model tree) and is written by huggingface_hub's own `ModelCardData`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import field
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import Any

from xpuquant import __version__
from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.plan.served_by import engine_versions, engines_of, kernel_and_releases
from xpuquant.conversion.plan.survey import PlannedModule, kind_of
from xpuquant.conversion.repo.card_merge import CARD, generate, loaded_by_transformers, served_by_vllm
from xpuquant.conversion.repo.source_card import cached_repo
from xpuquant.conversion.report.markup import Markdown, fenced, joined, listed, markdown, table
from xpuquant.conversion.report.sentences import headline
from xpuquant.conversion.report.svg import said_of
from xpuquant.conversion.sizes import counted, size
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.verify.verdict import Verdict
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.scheme import compact
from xpuquant.served_families import Tried
from xpuquant.values import frozen

LIBRARY = "transformers"
RELATION = "quantized"
TAGS = ("xpuquant", "xpu", "intel")
_KEPT_METADATA = ("license", "license_name", "license_link", "language", "datasets", "thumbnail")
_INHERITED_TAGS = ("chat", "conversational", "moe", "code", "vision", "multimodal")
"""Tags of the source that stay true of a conversion. Others name its format (`gptq`, `4-bit`) and would lie."""

_TOOLS = ("numpy", "ml_dtypes", "torch")
_SHOWN_NAMES = 12


@frozen
class SchemeCount:
    """Modules that are stored alike.

    source  what they were, e.g. `GPTQ int4 g128`
    stored  what they are now, e.g. `int4_linear g128`
    precision  `int4`, `fp8`, `mxfp4`, `mxfp8`, or `bf16` where they were dequantized
    """

    source: str
    stored: str
    precision: str
    modules: int
    nbytes: int


@frozen
class VerificationSummary:
    """What was checked.

    lines    sentences: the verdict, then remarks
    picture  an image file in the repository, and `said` what it shows
    report   a file in the repository, and `page` the same as HTML
    """

    lines: Sequence[str]
    picture: str | None = None
    report: str | None = None
    said: str = "How close kernels come to the source, module by module"
    page: str | None = None


@frozen
class CardFacts:
    """Everything a card says.

    name            repo id or folder name, as it is served
    base_model      repo id of the source; None where it is not known
    revision        its commit
    source_metadata what is kept of the source's card: see `source_card.metadata_of`
    auto_class       Transformers' class that loads it
    is_multimodal   the model also takes images; decides the pipeline tag where the source names none
    command         the exact command line
    engines         what versions of engines are known to do with a model of this architecture
    versions        tool → version
    left            (what was not converted, why)
    plugins         engine → its versions that the plugins are for
    format_version  that readers of the repo must know
    releases        of the kernel libraries that serve it, as `ModuleOutcome.releases` has them
    """

    name: str
    base_model: str | None
    revision: str | None
    command: str
    versions: Mapping[str, str]
    schemes: Sequence[SchemeCount]
    left: Sequence[tuple[str, str]]
    source_bytes: int
    bytes: int
    shards: int
    verification: VerificationSummary | None
    source_metadata: Mapping[str, Any] = field(default_factory=dict)
    is_multimodal: bool = False
    auto_class: str = "AutoModelForCausalLM"
    layout: str = "xpu"
    engines: Sequence[Tried] = ()
    plugins: Mapping[str, str] = field(default_factory=dict)
    releases: Sequence[str] = ()
    format_version: int = 1


def gather(
    plan: Plan,
    source: Source,
    verdict: Verdict | None,
    command: str,
    name: str,
    metadata: Mapping[str, Any],
) -> CardFacts:
    """The facts of a finished conversion.

    Args:
        metadata: see `source_card.metadata_of`.
        command: as typed.
        name: how the result is served: its folder's name, or its repo id.
    """
    config = source.checkpoint.config
    return CardFacts(
        name=name,
        base_model=metadata.get("base_model"),
        revision=source.revision or cached_repo(source.name)[1],
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
        auto_class=source.checkpoint.auto_class,
        layout=plan.options.layout,
        engines=engines_of(plan.modules, plan.options, source.checkpoint),
        plugins=engine_versions() if plan.options.layout == "xpu" else {},
        releases=_releases(plan, config),
        format_version=plan.quantization_config("")["format_version"] if plan.options.layout == "xpu" else 1,
    )


def _releases(plan: Plan, config: Mapping[str, Any]) -> Sequence[str]:
    """Of the kernel libraries, distinct ones of all modules. Where some need a second library, so does the model."""
    stored = ((planned.conversion.name, planned.conversion.scheme) for planned in plan.modules)
    found = dict.fromkeys(kernel_and_releases(name, scheme, config)[1] or "" for name, scheme in stored)
    return [one for one in found if one and not any(other.startswith(f"{one},") for other in found)]


def precision(planned: PlannedModule) -> str:
    """`int4`, `fp8`, `mxfp4`, `mxfp8`, or `bf16` where a module was dequantized."""
    scheme = planned.conversion.scheme
    return "bf16" if scheme is None else scheme.layout.removeprefix("ct_").partition("_")[0]


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
        if planned.conversion.rounded is not None:
            stored += f", scales rounded to {numpy_dtype(planned.conversion.rounded).name}"
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
    vectors = sum(len(tensor.shape) < 2 for tensor in plan.passed)
    if vectors:
        left.append((counted(vectors, "vector", "vectors") + ", such as those of norms", "kept as they are"))
    reasons: dict[str, list[str]] = {}
    for planned in plan.dequantized:
        reasons.setdefault("; ".join(planned.conversion.facts), []).append(planned.conversion.name)
    left += [(", ".join(compact(names)), why) for why, names in reasons.items()]
    return left + [(f"file {name}, left out", why) for name, why in source.left_files.items() if name != CARD]


def _verification(verdict: Verdict) -> VerificationSummary:
    lines = [headline(verdict)]
    lines += [f"warning: {finding.line()}" for finding in verdict.warnings]
    if verdict.unavailable:
        lines.append("Kernels that could not run where it was converted: " + ", ".join(sorted(verdict.unavailable)))
    return VerificationSummary(lines, "verify.svg", "verify.md", said_of(verdict), "verify.html")


def render(facts: CardFacts) -> str:
    """The text of README.md: metadata, then the generated block between its markers."""
    sections = [
        _opening(facts),
        _serving(facts),
        _converted(facts),
        _verified(facts),
        _made(facts),
    ]
    return generate(metadata(facts), joined("\n\n", sections))


def metadata(facts: CardFacts) -> dict[str, Any]:
    """The front matter, as keys and values."""
    from huggingface_hub import ModelCardData

    source = facts.source_metadata
    kept = {key: source[key] for key in _KEPT_METADATA if source.get(key)}
    precisions = dict.fromkeys(s.precision for s in facts.schemes if s.precision != "bf16")
    inherited = [tag for tag in source.get("tags", ()) if tag in _INHERITED_TAGS]
    if facts.base_model is not None:
        kept |= {"base_model": facts.base_model, "base_model_relation": RELATION}
    pipeline = source.get("pipeline_tag") or ("image-text-to-text" if facts.is_multimodal else "text-generation")
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=str(pipeline),
        tags=[*(TAGS if facts.layout == "xpu" else (TAGS[0], facts.layout)), *precisions, *inherited],
        ignore_metadata_errors=True,
        **kept,
    )
    return dict(data.to_dict())  # type: ignore[no-untyped-call]


def _opening(facts: CardFacts) -> Markdown:
    base = markdown("A quantized checkpoint")
    if facts.base_model is not None:  # a repo id: see `source_card`
        base = markdown("[{id}](https://huggingface.co/{id})", id=facts.base_model)
    precisions = " and ".join(dict.fromkeys(s.precision for s in facts.schemes)) or "its"
    layout = "in the layout that kernels for Intel GPUs (XPU) read"
    if facts.layout != "xpu":
        layout = f"as a standard {facts.layout} checkpoint"
    return markdown(
        "# {name}\n\n{base} {layout}: {precisions} weights. The conversion does not quantize again. What was compared "
        "with the source, what equals it and what was rounded stands under [Verification](#verification).",
        name=facts.name.rpartition("/")[2],
        base=base,
        layout=layout,
        precisions=precisions,
    )


def _serving(facts: CardFacts) -> Markdown:
    serve = served_by_vllm(facts.name)
    if facts.layout != "xpu":
        return markdown(
            "## Serve\n\nWith [vLLM](https://docs.vllm.ai/), on any device it has kernels for:\n\n{vllm}\n\n"
            "With Transformers, after `pip install compressed-tensors`:\n\n{transformers}",
            vllm=fenced(serve, "sh"),
            transformers=fenced(_loading(facts, "auto"), "python"),
        )
    return markdown(
        "## Serve\n\n{install}{versions}\n\nWith [vLLM](https://docs.vllm.ai/) on an Intel GPU:\n\n{vllm}\n\n"
        "With Transformers:\n\n{transformers}{tried}",
        install=_install(facts),
        versions=_versions_that_serve(facts),
        vllm=fenced(serve, "sh"),
        transformers=fenced(_loading(facts, "xpu"), "python"),
        tried=_tried(facts.engines),
    )


def _tried(engines: Sequence[Tried]) -> Markdown:
    """What is known of the versions of engines, where anything is."""
    if all(one.outcome == "not tried" for one in engines):
        return markdown("")
    said = [
        markdown("{engine} {version}: {outcome}", engine=one.engine, version=one.version, outcome=str(one))
        for one in engines
    ]
    return markdown("\n\nTried with a tiny model of this architecture, on a CPU:\n\n{said}", said=listed(said))


_RELEASES = {
    1: markdown("This repo is of `format_version` 1, which 0.1.0 reads too."),
    2: markdown(
        "This repo is of `format_version` 2, which 0.1.0 refuses: a newer release reads it, or a newer checkout."
    ),
}
"""`format_version` → what reads it. A checkout calls itself by the release that came before it."""


def _install(facts: CardFacts) -> Markdown:
    """How to install what reads this layout; an address and a package index are named once the package has them."""
    try:
        lines = distribution("xpuquant").metadata.get_all("Project-URL") or []
        urls = [line.rpartition(", ")[2] for line in lines]
    except PackageNotFoundError:
        urls = []
    if not urls:
        return markdown(
            "The package `xpuquant` has to be installed beside the server: from a checkout of it, `pip install .`, or "
            "from its wheel. {which}",
            which=_RELEASES[facts.format_version],
        )
    return markdown(
        "[xpuquant]({url}) has to be installed beside the server:\n\n{line}",
        url=urls[0],
        line=fenced("pip install xpuquant", "sh"),
    )


def _versions_that_serve(facts: CardFacts) -> Markdown:
    """Which versions read it, a line for each engine; nothing where they are not known."""
    if not facts.plugins:
        return markdown("")
    kernels = f"; on Intel GPUs, vllm-xpu-kernels: {'; '.join(facts.releases)}" if facts.releases else ""
    lines = [versions + (kernels if engine == "vllm" else "") for engine, versions in facts.plugins.items()]
    return markdown("\n\nVersions that read it:\n\n{lines}", lines=listed(lines))


def _loading(facts: CardFacts, device: str) -> str:
    auto, loaded = facts.auto_class, loaded_by_transformers(facts.name)
    return f'from transformers import {auto}\n\nmodel = {auto}.{loaded}, device_map="{device}")'


def _converted(facts: CardFacts) -> Markdown:
    rows = [(s.source, s.stored, str(s.modules), size(s.nbytes)) for s in facts.schemes]
    total = markdown(
        "All weights together take {after} in {files}; in the source they take {before}.",
        after=size(facts.bytes),
        files=counted(facts.shards, "file"),
        before=size(facts.source_bytes),
    )
    parts = [markdown("## What was converted"), table(("source", "stored as", "modules", "size"), rows, "llrr"), total]
    if facts.left:
        left = [markdown("{what}: {why}", what=what, why=why) for what, why in facts.left]
        parts += [markdown("What stays as it was, was dequantized or left out, and why:"), listed(left)]
    return joined("\n\n", parts)


def _verified(facts: CardFacts) -> Markdown:
    checked = facts.verification
    if checked is None:
        return markdown(
            "## Verification\n\nNone: the conversion ran with `--no-verify`. No value was compared with the source, "
            "and no kernel computed one."
        )
    verdict, *remarks = checked.lines
    parts = [markdown("## Verification"), markdown("{verdict}.", verdict=verdict[:1].upper() + verdict[1:])]
    if remarks:
        parts.append(listed(remarks, limit=1000))
    if checked.picture:
        parts.append(markdown("![{said}]({file})", said=checked.said, file=checked.picture))
    if checked.report:
        page = markdown(", and as a page in [{file}]({file})", file=checked.page) if checked.page else markdown("")
        parts.append(markdown("All of it is in [{file}]({file}){page}.", file=checked.report, page=page))
    return joined("\n\n", parts)


def _made(facts: CardFacts) -> Markdown:
    revision = markdown("")
    if facts.revision is not None:
        revision = markdown("\n\nSource revision: {revision}.", revision=facts.revision)
    return markdown(
        "## How it was made\n\n{command}\n\nWith {versions}.{revision}\n\n"
        "`xpuquant.json` names the source tensors and the decisions for every module, and the sha256 of every file.",
        command=fenced(facts.command.replace("\n", " "), "sh"),
        versions=", ".join(f"{tool} {version}" for tool, version in facts.versions.items()),
        revision=revision,
    )
