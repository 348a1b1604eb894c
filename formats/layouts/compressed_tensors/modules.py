"""What a checkpoint becomes, module by module, in the compressed-tensors family: every matrix is a Linear of its own.

Experts keep the source's name for each matrix, as the unconverted model spells it; nothing is stacked, and what a
source has stacked or fused is taken apart: `gate_up_proj` of an expert into `gate_proj` and `up_proj`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from xpuquant.errors import UnsupportedError
from xpuquant.formats.architecture import expert_of, fused_with, is_embedding
from xpuquant.formats.checkpoint import COMPRESSED_TENSORS, Checkpoint, Slice, whole
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import OutTensor, Piece
from xpuquant.formats.layouts.compressed_tensors.config import activation_words
from xpuquant.formats.layouts.fillers import FillBias
from xpuquant.formats.layouts.members import unquantized_members
from xpuquant.formats.layouts.modules import CtLinear, Module, halved, is_interleaved
from xpuquant.formats.readers.compressed_tensors.config import weight_args
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.floats import FloatWeight
from xpuquant.formats.weights.integers import GROUP_MULTIPLE, IntWeight, Regrouping, regroup
from xpuquant.formats.weights.parts import BiasRows, RowStride, join_rows, source_matrices, split_gate_up


def gather_linears(checkpoint: Checkpoint, weights: Sequence[Weight]) -> list[Module]:
    """Every weight as a module of its own, in order.

    Raises:
        UnsupportedError: how gpt-oss's gate and up rows lie cannot be known.
    """
    taken = [part for weight in _joined(checkpoint, weights) for part in _parts(checkpoint, weight)]
    mates: dict[str, list[IntWeight]] = {}
    for weight in (module.weight for module in taken):
        if isinstance(weight, IntWeight):
            mates.setdefault(_mates(weight.name), []).append(weight)
    common = {name: (*_common_codes(members), _common_group(members)) for name, members in mates.items()}
    names = {weight.name for weight in weights}
    stacks = {expert[0] for name in names if (expert := expert_of(name)) is not None}
    plain = unquantized_members(checkpoint, stacks, names)
    found: list[Module] = []
    for module in taken:
        activations = _activations(checkpoint, module.weight)
        octets, zero_points, group_size = common.get(_mates(module.name), (False, False, 0))
        expert = expert_of(module.name)
        reason = module.reason
        if expert is not None and expert[0] in plain and reason is None:
            reason = "others of the layer's experts are not quantized: engines take them in one format"
        if isinstance(module.weight, IntWeight) and module.weight.bits == 8 and reason is None:
            reason = _kept_better(checkpoint, module.name)
        shared = replace(module, octets=octets, zero_points=zero_points, group_size=group_size)
        found.append(replace(shared, activations=activations, reason=reason))
    return found


def _common_codes(members: Sequence[IntWeight]) -> tuple[bool, bool]:
    """Whether all members are to have 8 bits, and whether zero points."""
    octets = any(weight.bits > 4 for weight in members)
    return octets, any(weight.has_octet_zeros if octets else weight.has_zero_points for weight in members)


def _kept_better(checkpoint: Checkpoint, name: str) -> str | None:
    """Why 8-bit integers for 8-bit activations are left to their source."""
    if not _of_group(checkpoint, name).startswith("int8"):
        return None
    return "W8A8 is a compressed-tensors checkpoint already, which stock loaders read; the layout xpu takes it"


def groups_in_order(weight: IntWeight, size: int = 0) -> Regrouping | None:
    """Groups of `size` columns; where it is 0 the source's if they are equally long and in order, otherwise the
    coarsest exact ones that are. None where there are none."""
    if size:
        return regroup(weight, (size,))
    if weight.groups_of is None and weight.K % weight.group_size == 0:
        return Regrouping(weight.group_size, None)
    return regroup(weight)


def _common_group(members: Sequence[IntWeight]) -> int:
    """The coarsest group size that all members can have, exactly; 0 where each may keep its own."""
    natural = [(groups_in_order(weight), weight.K) for weight in members]
    sizes = {groups.size for groups, _ in natural if groups is not None}
    if len(sizes) < 2 or all(groups is None or groups.size == K for groups, K in natural):
        return 0
    size = math.gcd(*sizes)
    return size if size % GROUP_MULTIPLE == 0 else 0


def _joined(checkpoint: Checkpoint, weights: Sequence[Weight]) -> Iterator[Weight]:
    """The weights, with halves of gpt-oss's alternating rows joined to what they were cut from."""
    halves = halved(checkpoint) if is_interleaved(checkpoint) else False
    by_name = {weight.name: weight for weight in weights}
    for weight in weights:
        expert = expert_of(weight.name)
        role = expert[2] if expert is not None else ""
        if halves is None and role in ("gate", "up"):
            raise UnsupportedError(
                f"{weight.name}: whether gate_proj and up_proj alternate or are halves depends on the llm-compressor "
                f"that wrote them, and version {checkpoint.quantization.get('version')!r} in the config does not tell"
            )
        parent = weight.name.removesuffix("gate_proj")
        other = by_name.get(f"{parent}up_proj")
        if not halves or role not in ("gate", "up"):
            yield weight
        elif role == "gate" and other is not None:
            fact = "gate_proj and up_proj were halves of the alternating rows"
            yield join_rows(f"{parent}gate_up_proj", weight, other, fact)


def _parts(checkpoint: Checkpoint, weight: Weight) -> list[CtLinear]:
    """A weight as modules of one projection each."""
    expert = expert_of(weight.name)
    if expert is not None and weight.bias is None and f"{expert[0]}.down_proj_bias" in checkpoint.tensors:
        # Only AutoRound's model-free gpt-oss is so.
        return [CtLinear(weight.name, weight, reason="biases of experts in one tensor beside weights that are not")]
    if expert is None or expert[2] != "gate_up":
        bias = None if weight.bias is None else BiasRows((weight.bias,), RowStride(0, 1), weight.N)
        return [CtLinear(weight.name, weight, bias=bias)]
    pair = split_gate_up(weight, is_interleaved(checkpoint))
    if isinstance(pair, str):
        return [CtLinear(weight.name, weight, reason=pair)]
    biases = _biases(checkpoint, weight)
    return [CtLinear(part.name, part, bias=BiasRows(biases, part.stride, part.N) if biases else None) for part in pair]


def _biases(checkpoint: Checkpoint, weight: Weight) -> tuple[Slice, ...]:
    """What makes up the bias of a fused weight."""
    if weight.bias is not None:
        return (weight.bias,)
    tensors = [checkpoint.tensors.get(f"{part.name}.bias") for part in source_matrices(weight)]
    return tuple(whole(tensor) for tensor in tensors if tensor is not None)


def ct_refusal(module: CtLinear) -> str | None:
    """What every layout of the family refuses."""
    if module.reason is not None:
        return module.reason
    return "an embedding: few loaders read quantized rows" if is_embedding(module.name) else None


def bias_tensors(module: CtLinear) -> list[OutTensor]:
    """A bias taken out of a stacked or fused one, as a tensor of the output."""
    bias = module.bias
    if bias is None:
        return []
    piece = Piece(bias.parts, bias.count * numpy_dtype(bias.dtype).itemsize, FillBias(bias))
    return [OutTensor(f"{module.name}.bias", bias.dtype, (bias.count,), (piece,))]


def _mates(name: str) -> str:
    """What engines put into one tensor with a module, by a name for all of it. They want one scheme there."""
    expert = expert_of(name)
    return fused_with(name) if expert is None else expert[0]


def _activations(checkpoint: Checkpoint, weight: Weight) -> str:
    """How the source has activations quantized, as far as a weight's format allows it: see `CtScheme`."""
    if not isinstance(weight, FloatWeight):
        # W4A8 stored packed is read by no two releases alike; its weights are those of W4A16.
        return ""
    if weight.input_scale is not None:
        return "float8 tensor static"
    words = ""
    config = checkpoint.quantization
    if checkpoint.method in COMPRESSED_TENSORS:
        words = _of_group(checkpoint, weight.name)
        if not words:
            return ""
    elif _weight_only(config.get("act_bits")):
        return ""
    if words and not words.endswith("static"):
        return words
    if weight.is_mx:
        return "float8 group32 dynamic" if weight.element != "e2m1" else words
    return "float8 group128 dynamic" if weight.granularity == "block" else "float8 token dynamic"


def _of_group(checkpoint: Checkpoint, name: str) -> str:
    """The activations of the group that describes the module best; empty where it does not say."""
    groups = checkpoint.quantization.get("config_groups")
    best = next(iter(weight_args(checkpoint, name)), None)
    group = groups.get(best.group) if best is not None and isinstance(groups, dict) else None
    return activation_words(group.get("input_activations")) if isinstance(group, dict) else ""


def _weight_only(bits: object) -> bool:
    """AutoRound's `act_bits`: 16 and more are activations as they are."""
    return isinstance(bits, int) and bits >= 16
