"""`inspect`: what a checkpoint is and what would become of it, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.footprint import kv_cache, weights_on_each
from xpuquant.conversion.plan.plan import passed_tensors
from xpuquant.conversion.plan.served_by import engines_of
from xpuquant.conversion.plan.survey import PlannedModule, Survey, survey_modules
from xpuquant.conversion.plan.tensor_parallel import problems
from xpuquant.conversion.rates import seconds
from xpuquant.conversion.repo.description import ConvertedRepo, described
from xpuquant.conversion.results import ModuleOutcome, SourceInfo, module_outcomes, source_info
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.open import open_source
from xpuquant.formats.architecture import state_groups
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.safetensors import Tensor
from xpuquant.served_families import Tried
from xpuquant.values import frozen

RANKS = (1, 2, 4, 8)
"""Tensor-parallel sizes that are looked at by default."""

CONTEXT = 8192
"""Tokens of the sequence whose KV cache is counted by default."""


@frozen(sealed=True)
class Fit:
    """What each of a number of GPUs has to hold. Bytes; see `plan/footprint.py` for what is counted.

    weights       of the converted model
    kv_cache      of one sequence of `tokens` tokens, in bf16; None where config.json does not say enough
    kv_cache_fp8  the same in fp8
    weights_int4  of the model, were its wider modules int4 in groups of 128; None where that is no tenth less
    """

    gpus: int
    tokens: int
    weights: int
    kv_cache: int | None
    kv_cache_fp8: int | None
    weights_int4: int | None = None

    def held_by(self, usable: int, fp8: bool = False, int4: bool = False) -> bool:
        """Whether a GPU with so many bytes for weights and KV cache holds its part.

        Args:
            fp8: with a KV cache in fp8.
            int4: with weights of 4 bits, where they are wider.
        """
        weights = self.weights if self.weights_int4 is None or not int4 else self.weights_int4
        return weights + ((self.kv_cache_fp8 if fp8 else self.kv_cache) or 0) <= usable


@frozen(sealed=True)
class Inspection:
    """A checkpoint, and what would become of it.

    model_type       as config.json says; None where it does not
    quant_method     as the quantization config says
    formats          as the tensors say, e.g. `gptq`
    tensors          number of tensors
    modules          outcome of every module that converts
    refused          module → why it has no exact layout; empty where the checkpoint converts
    refused_bytes    bytes of their tensors in the source
    dequantized_bytes  bytes that they would have as bf16; None where some cannot be stored so
    decisions        what was decided from the tensors → number of matrices
    tensor_parallel  number of GPUs → module → why it does not split; empty where all do
    notes            what is odd about the checkpoint
    nbytes           bytes of the converted weights
    fits             what each GPU has to hold, for every number of GPUs over which the model splits
    engines          what versions of engines are known to do with the converted model
    seconds          how long converting and verifying takes, from measured rates on two cores
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
    nbytes: int
    fits: tuple[Fit, ...]
    engines: tuple[Tried, ...]
    seconds: float

    @property
    def converts(self) -> bool:
        """Whether every module has an exact layout."""
        return not self.refused

    @property
    def has_experts(self) -> bool:
        """Whether some module is stored as a stack of quantized experts."""
        return any(
            module.scheme is not None and module.scheme.split()[0].endswith("_experts") for module in self.modules
        )


def look_at(
    name: str, revision: str | None, options: Options, ranks: Sequence[int] = RANKS, context: int = CONTEXT
) -> Inspection | ConvertedRepo:
    """Open what the user named, and say what it is: a checkpoint, or a repo that was converted from one.

    Raises: as `open_source` and `inspect_source`.
    """
    source = open_source(name, revision)
    return described(source) or inspect_source(source, options, ranks, context)


def inspect_source(
    source: Source, options: Options, ranks: Sequence[int] = RANKS, context: int = CONTEXT
) -> Inspection:
    """Survey a source.

    Args:
        ranks: tensor-parallel sizes to check.
        context: tokens of the sequence whose KV cache is counted.

    Raises:
        UsageError: not a quantized checkpoint. DamagedError: not a sound one.
    """
    checkpoint = source.checkpoint
    survey = survey_modules(checkpoint, options)
    planned, weights = survey.planned, survey.reading.weights
    decisions = Counter(fact for weight in weights for fact in weight.facts)
    groups = state_groups(checkpoint.text_config)
    splits = {n: problems(planned, n, groups) if n > 1 else {} for n in ranks}
    formats = tuple(sorted({weight.format for weight in weights}))
    passed = () if survey.refused else passed_tensors(survey)
    return Inspection(
        source_info(source),
        checkpoint.config.get("model_type"),
        checkpoint.method,
        formats,
        len(checkpoint.tensors),
        module_outcomes(planned, checkpoint.config),
        survey.refused,
        _bytes_below(checkpoint, survey.refused),
        _dequantized_bytes(checkpoint, options, survey),
        dict(decisions),
        splits,
        (*checkpoint.notes, *survey.reading.notes),
        sum(module.nbytes for module in planned) + sum(tensor.nbytes for tensor in passed),
        () if survey.refused else tuple(_fit(checkpoint, planned, passed, n, context) for n in ranks if not splits[n]),
        () if survey.refused else engines_of(planned, options, checkpoint),
        seconds(source.nbytes, formats),
    )


def _fit(
    checkpoint: Checkpoint, planned: Sequence[PlannedModule], passed: Sequence[Tensor], ranks: int, tokens: int
) -> Fit:
    config = checkpoint.text_config
    bf16, fp8 = (kv_cache(config, tokens, ranks, element) for element in (2, 1))
    weights, as_int4 = (weights_on_each(planned, passed, config, ranks, narrow) for narrow in (False, True))
    return Fit(ranks, tokens, weights, bf16, fp8, as_int4 if as_int4 < 0.9 * weights else None)


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
    if not survey.refused:
        return 0
    other = survey_modules(checkpoint, replace(options, on_unsupported="dequantize"))
    return sum(module.nbytes for module in other.planned if module.conversion.name in survey.refused)
