"""The plan of a conversion: headers in, every output byte's place and origin out. Pure; no weight is read.

Peak memory, progress in bytes, disk-space checks, resume and `--shard i/n` are all properties of this one object.
The same source and options give the same plan, and the same plan the same bytes, whoever executes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xpuquant import __version__
from xpuquant.conversion.options import Options
from xpuquant.errors import UnsupportedError
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.layouts import dequantized, layouts
from xpuquant.formats.layouts.base import Conversion, ExpertStack, Module, OutTensor, copied
from xpuquant.formats.layouts.compressed_tensors import config as ct_config
from xpuquant.formats.layouts.compressed_tensors import modules as ct_modules
from xpuquant.formats.layouts.modules import modules
from xpuquant.formats.readers.reading import Reading, read
from xpuquant.formats.safetensors import Tensor, build_header
from xpuquant.formats.scheme import FORMAT_VERSION, compact, to_config
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.fold_act_order import fold_act_order
from xpuquant.formats.weights.split import SplitBias

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class PlannedModule:
    """A quantized module of the source and what becomes of it."""

    source: Module
    conversion: Conversion

    @property
    def weights(self) -> list[tuple[str, int | None, Weight]]:
        """(role, expert, weight) of every matrix."""
        if isinstance(self.source, ExpertStack):
            return [
                (role, expert, weight)
                for role, members in self.source.weights.items()
                for expert, weight in enumerate(members)
            ]
        return [("linear", None, self.source.weight)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.conversion.tensors)


@dataclass(frozen=True)
class Shard:
    """One output file: `header` first, then `tensors` in order, without gaps."""

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
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
    read_bytes: int
    quantization: Mapping[str, Any] = field(default_factory=dict)

    @property
    def write_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def dequantized(self) -> tuple[PlannedModule, ...]:
        return tuple(module for module in self.modules if module.conversion.scheme is None)

    @property
    def split_biases(self) -> dict[str, SplitBias]:
        """Tensor name → how it is taken out of a stacked or fused bias of the source."""
        linears = [m.source for m in self.modules if isinstance(m.source, ct_modules.CtLinear)]
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
            return ct_config.to_config(ours, plain, self.quantization)
        return to_config({name: scheme for name, scheme in schemes.items() if scheme is not None}, producer)

    def index(self) -> dict[str, Any]:
        """model.safetensors.index.json."""
        weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def digest(self, fingerprint: str) -> str:
        """Identifies plan and source: two runs with equal digests write equal bytes."""
        summary = {
            "producer": __version__,
            "format_version": FORMAT_VERSION,
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
    planned, refused, reading = survey(checkpoint, options)
    if refused:
        raise UnsupportedError(refusal(refused, not reading.refused, options.layout))
    used = {
        bias.tensor.name
        for module in planned
        if isinstance(module.source, ExpertStack) and module.conversion.scheme
        for slices in module.source.biases.values()
        for bias in slices
    }
    split = [module.source.bias for module in planned if isinstance(module.source, ct_modules.CtLinear)]
    used |= {part.tensor.name for bias in split if bias is not None for part in bias.parts}
    passed = tuple(tensor for tensor in reading.rest if tensor.name not in used)
    shards = _shards(_in_source_order(planned, passed), options.max_shard_bytes)
    read_bytes = sum(
        part.nbytes for shard in shards for tensor in shard.tensors for piece in tensor.pieces for part in piece.inputs
    )
    quantization = checkpoint.quantization
    return Plan(options, tuple(planned), passed, shards, checkpoint.notes, read_bytes, quantization)


def refusal(refused: Mapping[str, str], readable: bool, layout: str) -> str:
    """One line for modules that cannot be converted: reasons, with the modules of each as compact patterns."""
    shown = "XPU" if layout == "xpu" else layout
    by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        by_reason.setdefault(reason, []).append(name)
    listed = "; ".join(f"{reason}: {', '.join(compact(names))}" for reason, names in by_reason.items())
    fix = ". Pass --on-unsupported dequantize to store them as bf16" if readable else ""
    return f"{len(refused)} modules have no exact {shown} layout: {listed}{fix}"


def survey(checkpoint: Checkpoint, options: Options) -> tuple[list[PlannedModule], dict[str, str], Reading]:
    """What every module would become: (convertible ones, module → reason for the others, the reading)."""
    reading = read(checkpoint)
    known = layouts(options.layout)
    planned: list[PlannedModule] = []
    refused = dict(reading.refused)
    portable = options.layout == ct_config.FAMILY
    without = "compressed-tensors layout" if portable else "XPU kernel"
    # Siblings of an expert that cannot be read are refused with it, not reported as an incomplete stack.
    stacks = {expert[0] for name in refused if (expert := expert_of(name)) is not None}
    weights = [w for w in reading.weights if (expert := expert_of(w.name)) is None or expert[0] not in stacks]
    if options.fold_act_order:
        weights = fold_act_order(checkpoint, weights)
    for module in ct_modules.modules(checkpoint, weights) if portable else modules(checkpoint, weights):
        layout = next((layout for layout in known.values() if layout.takes(module)), None)
        reason = layout.refuses(module) if layout is not None else f"{kind_of(module)} has no {without}"
        if layout is not None and reason is None:
            planned.append(PlannedModule(module, layout.convert(module, options.scale_dtype)))
        elif options.on_unsupported == "dequantize":
            planned.append(PlannedModule(module, dequantized.convert(module, reason or "")))
        else:
            refused[module.name] = reason or ""
    return planned, refused, reading


def kind_of(module: Module) -> str:
    """What a module's weights are, for tables and refusals."""
    if isinstance(module, ExpertStack):
        kinds = dict.fromkeys(weight.kind for members in module.weights.values() for weight in members)
        return " + ".join(kinds) + " experts"
    return module.weight.kind


def _in_source_order(planned: Iterable[PlannedModule], passed: Iterable[Tensor]) -> list[list[OutTensor]]:
    """Output tensors, module by module, in the order of their first source byte: reading goes forward and layers
    stay together."""
    placed: list[tuple[tuple[str, int], list[OutTensor]]] = []
    for module in planned:
        first = min((tensor.file, tensor.begin) for _, _, weight in module.weights for tensor in weight.tensors)
        placed.append((first, list(module.conversion.tensors)))
    placed += [((tensor.file, tensor.begin), [copied(tensor)]) for tensor in passed]
    placed.sort(key=lambda entry: entry[0])
    return [tensors for _, tensors in placed]


def _shards(units: Sequence[Sequence[OutTensor]], max_bytes: int) -> tuple[Shard, ...]:
    """Fill shards evenly. A module's tensors stay in one shard where they fit, so that a shard can be made and
    verified on its own."""
    sizes = [sum(tensor.nbytes for tensor in unit) for unit in units]
    total = sum(sizes)
    # Even shards: the same number of files, none of them a stub. Two where one would be more than half full: a file is
    # hashed in one thread, here, when it is sent and when it is checked.
    count = max(-(-total // max_bytes), 1 + (total > max_bytes // 2))
    target = total / count
    filled: list[list[OutTensor]] = [[]]
    filled_bytes = 0
    for unit, unit_bytes in zip(units, sizes, strict=True):
        for tensors, size in [(unit, unit_bytes)] if unit_bytes <= max_bytes else [([t], t.nbytes) for t in unit]:
            if filled[-1] and (filled_bytes + size > max_bytes or filled_bytes >= target):
                filled.append([])
                filled_bytes = 0
            filled[-1] += tensors
            filled_bytes += size
    return tuple(
        _shard(
            f"model-{i:05}-of-{len(filled):05}.safetensors" if len(filled) > 1 else "model.safetensors",
            members,
        )
        for i, members in enumerate(filled, 1)
    )


def _shard(name: str, tensors: Iterable[OutTensor]) -> Shard:
    # Tensors whose length is no multiple of 8 go last, so that every other one stays aligned.
    ordered = tuple(sorted(tensors, key=lambda tensor: tensor.nbytes % 8 != 0))
    header = build_header(((t.name, t.dtype, t.shape, t.nbytes) for t in ordered), _METADATA)
    return Shard(name, header, ordered)
