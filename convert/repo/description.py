"""What a converted repo says of itself: what it is, from what, verified how, which kernels and versions serve it.

Read from config.json, xpuquant.json, verify.json and the headers of the shards. Nothing is checked here: that is
`verify`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.served_by import engine_versions, kernel_and_releases
from xpuquant.conversion.repo.journal import PROVENANCE
from xpuquant.conversion.results import ModuleOutcome, SourceInfo, TensorInfo, source_info
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.conversion.sources.hub import HubSource
from xpuquant.conversion.sources.repo_files import read_json
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify.record_form import check_form
from xpuquant.errors import DamagedError, UsageError, XpuquantError, one_line
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.guard import guarded
from xpuquant.formats.layouts.compressed_tensors.config import scheme_of
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import QUANT_METHOD, Scheme, from_config
from xpuquant.served_families import ENGINES
from xpuquant.values import frozen

_VERDICT = "verify.json"


@frozen(sealed=True)
class StoredModule:
    """A module of a converted repo, as the repo describes it.

    name            of the module; a stack of experts is one module
    repo, origin    as in `ConvertedRepo`
    outcome         what it was and what it is stored as; `decisions` are those recorded at conversion
    source_tensors  names of the source's tensors that it was made of, as they were recorded
    stored          tensors that it lies in
    """

    name: str
    repo: SourceInfo
    origin: SourceInfo
    outcome: ModuleOutcome
    source_tensors: tuple[str, ...]
    stored: tuple[TensorInfo, ...]


@frozen(sealed=True)
class ConvertedRepo:
    """A converted repo, as it describes itself.

    repo      its name, the commit where it is on the Hub, the bytes of its shards
    origin    what it was converted from, as it was recorded
    options   it was converted with; None where they cannot be read
    producer  what wrote it
    modules   every quantized module as it is stored; `decisions` are those recorded at conversion
    plain     number of tensors of no quantized module
    verified  the verdict of the verification that its verify.json holds, in one line; None where there is none
    needs     what serves it, and which versions
    """

    repo: SourceInfo
    origin: SourceInfo
    options: Options | None
    producer: str
    modules: tuple[ModuleOutcome, ...]
    plain: int
    verified: str | None
    needs: Mapping[str, str]


def described(source: LocalSource | HubSource) -> ConvertedRepo | None:
    """A source as a converted repo; None where it is none.

    Raises:
        DamagedError: what it says of itself cannot be.
    """
    if (record := _record(source)) is None:
        return None
    with guarded(PROVENANCE):
        return _described(source, record)


def stored_modules_of(source: LocalSource | HubSource) -> dict[str, StoredModule] | None:
    """The quantized modules of a converted repo by their names; None where a source is none.

    Raises: as `described`.
    """
    if (record := _record(source)) is None:
        return None
    with guarded(PROVENANCE):
        stored = _stored(source, record["modules"])
        repo, origin = source_info(source), _origin(record)
        return {
            outcome.name: StoredModule(
                outcome.name,
                repo,
                origin,
                outcome,
                tuple(map(str, record["modules"][outcome.name]["source_tensors"])),
                tuple(TensorInfo(t.name, t.dtype, t.shape, t.nbytes) for t in stored[outcome.name]),
            )
            for outcome in _outcomes(source, record["modules"], stored)
        }


def _record(source: LocalSource | HubSource) -> dict[str, Any] | None:
    """A repo's xpuquant.json; None where there is none."""
    if not _holds(source, PROVENANCE):
        return None
    record = _read(source, PROVENANCE)
    try:
        check_form(record)
    except DamagedError as error:
        raise DamagedError(f"{source.name}: {PROVENANCE} {error}") from error
    return record


def _origin(record: Mapping[str, Any]) -> SourceInfo:
    origin = record["source"]
    return SourceInfo(str(origin["name"]), origin["revision"], int(origin["bytes"]))


def _stored(source: LocalSource | HubSource, entries: Collection[str]) -> dict[str | None, list[Tensor]]:
    """Quantized module → its tensors; under None those of no quantized module."""
    found: dict[str | None, list[Tensor]] = {name: [] for name in (None, *entries)}
    for name, tensor in source.checkpoint.tensors.items():
        found[next((parent for parent in _parents(name) if parent in entries), None)].append(tensor)
    return found


def _outcomes(
    source: LocalSource | HubSource,
    entries: Mapping[str, Mapping[str, Any]],
    stored: Mapping[str | None, Sequence[Tensor]],
) -> tuple[ModuleOutcome, ...]:
    schemes = _schemes(source.checkpoint, entries, stored)
    return tuple(
        ModuleOutcome(
            name,
            str(entry["from"]),
            None if "dequantized" in entry else str(entry["scheme"]),
            *kernel_and_releases(name, schemes.get(name), source.checkpoint.config),
            sum(tensor.nbytes for tensor in stored[name]),
            tuple(map(str, entry["decisions"])),
        )
        for name, entry in entries.items()
    )


def _schemes(
    checkpoint: Checkpoint, entries: Mapping[str, Mapping[str, Any]], stored: Mapping[str | None, Sequence[Tensor]]
) -> Mapping[str, Scheme]:
    """Quantized module → its scheme."""
    quantization = checkpoint.quantization
    if quantization.get("quant_method") == QUANT_METHOD:
        return from_config(quantization)
    return {
        name: scheme_of(quantization, name, {tensor.name.rpartition(".")[2]: tensor for tensor in stored[name]})
        for name, entry in entries.items()
        if "dequantized" not in entry
    }


def _described(source: LocalSource | HubSource, record: Mapping[str, Any]) -> ConvertedRepo:
    stored = _stored(source, record["modules"])
    return ConvertedRepo(
        source_info(source),
        _origin(record),
        _options(record.get("options")),
        str(record["producer"]),
        _outcomes(source, record["modules"], stored),
        len(stored[None]),
        _verified(_read(source, _VERDICT)) if _holds(source, _VERDICT) else None,
        _needs(portable=source.checkpoint.quantization.get("quant_method") != QUANT_METHOD),
    )


def _options(recorded: object) -> Options | None:
    try:
        return Options.from_dict(recorded)
    except UsageError:
        return None


def _verified(report: Mapping[str, Any]) -> str | None:
    """A verdict in one line, of this version's verify.json or an older one's."""
    sentence = report.get("sentence")
    if isinstance(sentence, str):
        return one_line(sentence, 1000)
    exact = report.get("exact")
    against = exact.get("against") if isinstance(exact, dict) else None
    return ("verified" if report.get("passed") is True else "failed") + (f" against {against}" if against else "")


def _needs(portable: bool) -> dict[str, str]:
    """What serves a repo → which versions, as the extras of this package ask for."""
    if portable:
        return {"vLLM": "any that reads compressed-tensors", "Transformers": "with compressed-tensors installed"}
    found = engine_versions().items()
    return {ENGINES[name]: f"{versions}, with xpuquant installed beside it" for name, versions in found}


def _holds(source: LocalSource | HubSource, name: str) -> bool:
    return name in source.remote.blobs if isinstance(source, HubSource) else Tree(source.folder).holds_anything(name)


def _read(source: LocalSource | HubSource, name: str) -> dict[str, Any]:
    try:
        tree = source.remote.download(name) if isinstance(source, HubSource) else Tree(source.folder)
        return read_json(tree, name)
    except XpuquantError as error:
        raise DamagedError(f"{source.name}: {error}") from error


def _parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
