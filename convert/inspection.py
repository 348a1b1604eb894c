"""`inspect`: what a checkpoint is and what would become of it, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.survey import survey_modules
from xpuquant.conversion.plan.tensor_parallel import problems
from xpuquant.conversion.results import ModuleOutcome, SourceInfo, module_outcomes, source_info
from xpuquant.conversion.sources.base import Source

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
    decisions: Mapping[str, int]
    tensor_parallel: Mapping[int, Mapping[str, str]]
    notes: tuple[str, ...]

    @property
    def converts(self) -> bool:
        return not self.refused


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
        dict(decisions),
        {n: problems(planned, n) for n in ranks},
        (*checkpoint.notes, *survey.reading.notes),
    )
