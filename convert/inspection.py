"""`inspect`: what a checkpoint is and what would become of it, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.survey import Survey, survey_modules
from xpuquant.conversion.plan.tensor_parallel import problems
from xpuquant.conversion.repo.description import ConvertedRepo, described
from xpuquant.conversion.results import ModuleOutcome, SourceInfo, module_outcomes, source_info
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.open import open_source
from xpuquant.formats.checkpoint import Checkpoint

RANKS = (2, 4, 8)
"""Tensor-parallel sizes that are looked at by default."""


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, and what would become of it.

    model_type       as config.json says; None where it does not
    quant_method     as the quantization config says
    formats          as the tensors say, e.g. `GPTQ`
    tensors          number of tensors
    modules          outcome of every module that converts
    refused          module → why it has no exact layout; empty where the checkpoint converts
    refused_bytes    bytes of their tensors in the source
    dequantized_bytes  bytes that they would have as bf16; None where some cannot be stored so
    decisions        what was decided from the tensors → number of matrices
    tensor_parallel  number of GPUs → module → why it does not split; empty where all do
    notes            what is odd about the checkpoint
    """

    source: SourceInfo
    model_type: str | None
    quant_method: str | None
    formats: tuple[str, ...]
    tensors: int
    modules: tuple[ModuleOutcome, ...]
    refused: Mapping[str, str]
    refused_bytes: int
    dequantized_bytes: int | None
    decisions: Mapping[str, int]
    tensor_parallel: Mapping[int, Mapping[str, str]]
    notes: tuple[str, ...]

    @property
    def converts(self) -> bool:
        return not self.refused


def look_at(
    name: str, revision: str | None, options: Options, ranks: Sequence[int] = RANKS
) -> Inspection | ConvertedRepo:
    """Open what the user named, and say what it is: a checkpoint, or a repo that was converted from one.

    Raises: as `open_source` and `inspect_source`.
    """
    source = open_source(name, revision)
    return described(source) or inspect_source(source, options, ranks)


def inspect_source(source: Source, options: Options, ranks: Sequence[int] = RANKS) -> Inspection:
    """Survey a source.

    Args:
        ranks: tensor-parallel sizes to check.

    Raises:
        UsageError: not a quantized checkpoint. DamagedError: not a sound one.
    """
    checkpoint = source.checkpoint
    survey = survey_modules(checkpoint, options)
    planned, weights = survey.planned, survey.reading.weights
    decisions = Counter(fact for weight in weights for fact in weight.facts)
    return Inspection(
        source_info(source),
        checkpoint.config.get("model_type"),
        checkpoint.method,
        tuple(sorted({weight.format for weight in weights})),
        len(checkpoint.tensors),
        module_outcomes(planned, checkpoint.config),
        survey.refused,
        _bytes_below(checkpoint, survey.refused),
        _dequantized_bytes(checkpoint, options, survey),
        dict(decisions),
        {n: problems(planned, n) for n in ranks},
        (*checkpoint.notes, *survey.reading.notes),
    )


def _bytes_below(checkpoint: Checkpoint, modules: Collection[str]) -> int:
    """Bytes of the tensors of some modules."""
    names = set(modules)
    return sum(
        tensor.nbytes
        for name, tensor in checkpoint.tensors.items()
        if any(parent in names for parent in _parents(name))
    )


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _dequantized_bytes(checkpoint: Checkpoint, options: Options, survey: Survey) -> int | None:
    """Bytes of the refused modules as bf16; None where some cannot be stored so."""
    if not survey.dequantizable:
        return None
    other = survey_modules(checkpoint, replace(options, on_unsupported="dequantize"))
    return sum(module.nbytes for module in other.planned if module.conversion.name in survey.refused)
