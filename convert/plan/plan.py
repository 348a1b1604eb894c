"""The plan of a conversion: headers in, every output byte's place and origin out. Pure; no weight is read.

Peak memory, progress in bytes, disk-space checks, resume and parts (`--part i/n`) are all properties of this one
object. The same source and options give the same plan, and the same plan the same bytes, whoever executes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from typing import Any

from xpuquant import __version__
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.shards import Shard, balance, in_source_order
from xpuquant.conversion.plan.survey import PlannedModule, Survey, refusal, survey_modules
from xpuquant.conversion.sources.quantization import without_quantization
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.layouts.compressed_tensors import config as ct_config
from xpuquant.formats.layouts.modules import CtLinear, ExpertStack
from xpuquant.formats.safetensors import Tensor, collector_paused
from xpuquant.formats.scheme import format_version, to_config
from xpuquant.formats.weights.parts import BiasRows
from xpuquant.values import frozen


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model that has a quantized head of its own. Where it ties the head to the embeddings, or the
    model's class does where it says nothing (Gemma), vLLM drops the head and multiplies with the embeddings: it looks
    for an `lm_head.weight` alone (vllm/transformers_utils/config.py, checkpoint_has_lm_head; vllm-project/vllm#51063).
    """
    said = _saying_untied(config)
    text = said.get("text_config")
    (text if isinstance(text, dict) else said)["tie_word_embeddings"] = False
    return said


def _saying_untied(config: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for key, value in config.items():
        tied = key == "tie_word_embeddings" and value is True
        said[key] = False if tied else _saying_untied(value) if isinstance(value, Mapping) else value
    return said


@frozen
class Plan:
    """What will be written, and from what.

    modules    every quantized module
    passed     tensors that keep their bytes
    shards     the output files
    notes      what was odd about the source
    quantization  the source's own quantization config
    """

    options: Options
    modules: tuple[PlannedModule, ...]
    passed: tuple[Tensor, ...]
    shards: tuple[Shard, ...]
    notes: tuple[str, ...]
    quantization: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of the source that are read; counted when somebody asks, for that takes a tenth of planning."""
        tensors = (tensor for shard in self.shards for tensor in shard.tensors)
        return sum(part.nbytes for tensor in tensors for piece in tensor.pieces for part in piece.inputs)

    @property
    def write_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def shard_sizes(self) -> dict[str, int]:
        """Bytes of each shard, by its name."""
        return {shard.name: shard.nbytes for shard in self.shards}

    @property
    def dequantized(self) -> tuple[PlannedModule, ...]:
        return tuple(module for module in self.modules if module.conversion.scheme is None)

    @property
    def format_version(self) -> int:
        """The oldest version of the contract that has all of its layouts."""
        return format_version(m.conversion.scheme for m in self.modules if m.conversion.scheme is not None)

    @property
    def has_own_head(self) -> bool:
        """Whether the head is quantized, and with that no name of the embeddings."""
        return any(module.conversion.name.rpartition(".")[2] == "lm_head" for module in self.modules)

    @property
    def split_biases(self) -> dict[str, BiasRows]:
        """Tensor name → how it is taken out of a stacked or fused bias of the source."""
        linears = [m.source for m in self.modules if isinstance(m.source, CtLinear)]
        return {f"{linear.name}.bias": linear.bias for linear in linears if linear.bias is not None}

    def part(self, shards: Sequence[Shard]) -> Plan:
        """The plan of some of the shards: with the modules and passed tensors that lie wholly in them."""
        mine = {tensor.name for shard in shards for tensor in shard.tensors}
        return replace(
            self,
            shards=tuple(shards),
            modules=tuple(m for m in self.modules if all(t.name in mine for t in m.conversion.tensors)),
            passed=tuple(tensor for tensor in self.passed if tensor.name in mine),
        )

    def quantization_config(self, producer: str) -> dict[str, Any]:
        """The contract's part of config.json."""
        schemes = {m.conversion.name: m.conversion.scheme for m in self.modules}
        if self.options.layout == ct_config.FAMILY:
            ours = {name: scheme for name, scheme in schemes.items() if isinstance(scheme, ct_config.CtScheme)}
            plain: list[ct_config.Shaped] = [*self.passed]
            plain += [tensor for module in self.dequantized for tensor in module.conversion.tensors]
            return ct_config.to_ct_config(ours, plain, self.quantization)
        return to_config({name: scheme for name, scheme in schemes.items() if scheme is not None}, producer)

    def output_config(self, config: Mapping[str, Any], producer: str) -> dict[str, Any]:
        """config.json of the output: the source's, with our quantization_config and nobody else's.

        Args:
            config: config.json of the source.
        """
        written = without_quantization(config)
        if self.has_own_head:
            written = untied(written)
        written["quantization_config"] = self.quantization_config(producer)
        return written

    def index(self) -> dict[str, Any]:
        """model.safetensors.index.json."""
        weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def digest(self, fingerprint: str) -> str:
        """Identifies plan and source: two runs with equal digests write equal bytes."""
        summary = {
            "producer": __version__,
            "format_version": self.format_version,
            "options": self.options.as_dict(),
            "source": fingerprint,
            "shards": {shard.name: hashlib.sha256(shard.header).hexdigest() for shard in self.shards},
            "inputs": {
                tensor.name: [
                    [[part.tensor.file, part.tensor.begin, part.start, part.stop, part.axis] for part in piece.inputs]
                    for piece in tensor.pieces
                ]
                for shard in self.shards
                for tensor in shard.tensors
            },
        }
        return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Plan a conversion.

    Raises:
        UsageError: not a quantized checkpoint, or an unknown method.
        UnsupportedError: modules that no kernel takes, each with its reason, unless they are to be dequantized.
        DamagedError: tensors that are missing or contradict each other.
    """
    with collector_paused():
        return _make_plan(checkpoint, options)


def passed_tensors(survey: Survey) -> tuple[Tensor, ...]:
    """What is copied as it is: all that no module is made of."""
    used = {
        bias.tensor.name
        for module in survey.planned
        if isinstance(module.source, ExpertStack) and module.conversion.scheme
        for slices in module.source.biases.values()
        for bias in slices
    }
    fused = [module.source.bias for module in survey.planned if isinstance(module.source, CtLinear)]
    used |= {part.tensor.name for bias in fused if bias is not None for part in bias.parts}
    return tuple(tensor for tensor in survey.reading.rest if tensor.name not in used)


def _make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    survey = survey_modules(checkpoint, options)
    planned, reading = survey.planned, survey.reading
    if survey.refused:
        raise refusal(survey.refused, survey.dequantizable, options.layout)
    passed = passed_tensors(survey)
    units = in_source_order(planned, passed)
    shards = balance(units, options.max_shard_bytes, fused=options.layout != ct_config.FAMILY)
    notes = (*checkpoint.notes, *reading.notes)
    return Plan(options, tuple(planned), passed, shards, notes, checkpoint.quantization)
