"""The modules of a checkpoint: linears, and the experts of one layer.

Families spell the same three matrices differently, on disk:

    Qwen2/3-MoE, DeepSeek, GLM   mlp.experts.E.{gate_proj, up_proj, down_proj}
    Mixtral, MiniMax             block_sparse_moe.experts.E.{w1, w3, w2}
    Mixtral by newer producers   {mlp, block_sparse_moe}.experts.E.{gate_proj, up_proj, down_proj}
    gpt-oss native               mlp.experts.{gate_up_proj, down_proj}_blocks, 3-D (its reader yields one per expert)

so they are recognised by suffix, not by architecture.

gpt-oss has one fused matrix whose rows alternate gate, up. Producers that split it by expert either undo that (gate
the even rows, up the odd) or halve it as it is; see `halved`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import field, replace

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.checkpoint import COMPRESSED_TENSORS, Checkpoint, Slice, rows, whole
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.layouts.members import (
    GATELESS,
    Place,
    check_complete,
    not_quantized,
    unlike,
    unquantized_members,
)
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.parts import BiasRows, join_rows
from xpuquant.values import frozen


@frozen
class Linear:
    """A source module that stays one module. Its bias, if it has one, is an ordinary tensor that passes through."""

    name: str
    weight: Weight

    def matrices(self) -> Iterator[tuple[str, int | None, Weight]]:
        """(role, expert, weight) of every matrix."""
        yield "linear", None, self.weight


@frozen
class CtLinear(Linear):
    """A module that is written in the compressed-tensors family.

    activations  see `CtScheme`
    octets       store 8 bits although 4 suffice: engines fuse the module with one that needs them
    zero_points  store zero points although all are the middle: engines fuse the module with one that has others
    group_size   store groups of this many columns: engines fuse the module with one that has them; 0 for its own
    bias         a bias to be taken out of a stacked or fused one; None where it passes through, or there is none
    reason       why it cannot be converted
    """

    activations: str = ""
    octets: bool = False
    zero_points: bool = False
    group_size: int = 0
    bias: BiasRows | None = None
    reason: str | None = None


@frozen
class ExpertStack:
    """The experts of one layer.

    name         `model.layers.0.mlp.experts`
    weights      role → weight of each expert, in order; roles gate, up, down or gate_up, down; up, down without a gate
    biases       role → bias slice of each expert (dtype of the source); empty where there are none
    interleaved  gate and up rows alternate in the output (gpt-oss's activation reads them so)
    """

    name: str
    weights: Mapping[str, tuple[Weight, ...]]
    biases: Mapping[str, tuple[Slice, ...]] = field(default_factory=dict)
    interleaved: bool = False

    @property
    def experts(self) -> int:
        return len(self.weights["down"])

    @property
    def gated(self) -> bool:
        """Whether the first GEMM makes a gate as well."""
        return set(self.weights) != GATELESS

    @property
    def upper_roles(self) -> tuple[str, ...]:
        """The roles that make up the first GEMM: gate and up, the one that already is both, or up alone."""
        return tuple(role for role in self.weights if role != "down")

    @property
    def facts(self) -> tuple[str, ...]:
        """What was decided about the experts, each thing once."""
        said = dict.fromkeys(weight.facts for members in self.weights.values() for weight in members)
        return tuple(dict.fromkeys(fact for facts in said for fact in facts))

    def matrices(self) -> Iterator[tuple[str, int | None, Weight]]:
        """(role, expert, weight) of every matrix."""
        for role, members in self.weights.items():
            for expert, weight in enumerate(members):
                yield role, expert, weight


@frozen
class LooseExperts:
    """The quantized experts of one layer that no stack can hold, for instance because others are not quantized.

    members      (role, expert) → weight, of those that are
    reason       why, in one line
    interleaved  as of `ExpertStack`
    """

    name: str
    members: Mapping[Place, Weight]
    reason: str
    interleaved: bool = False

    def matrices(self) -> Iterator[tuple[str, int | None, Weight]]:
        """(role, expert, weight) of every quantized matrix."""
        for (role, expert), weight in self.members.items():
            yield role, expert, weight


Module = Linear | ExpertStack | LooseExperts


def is_interleaved(checkpoint: Checkpoint) -> bool:
    """gpt-oss's activation reads gate and up from alternating rows; every other family from two halves."""
    return checkpoint.text_config.get("model_type") == "gpt_oss"


def halved(checkpoint: Checkpoint) -> bool | None:
    """Whether gpt-oss's `gate_proj` and `up_proj` are the first and second half of the alternating rows, rather than
    the even and odd ones; None where it cannot be known.

    Nothing in the tensors tells. llm-compressor writes them, and pins the compressed-tensors whose version is in the
    config: 0.10 and 0.11 (0.14 to 0.16) and 0.14 (0.19 and later) undo the alternation, 0.12 and 0.13 (0.17.1 to
    0.18) halve it. AutoRound undoes it (auto_round/modeling/fused_moe/gpt_oss.py).
    """
    config = checkpoint.quantization
    if config.get("model_free"):
        return True
    if checkpoint.method not in COMPRESSED_TENSORS:
        return False
    if str(config.get("provider") or "").startswith("auto-round"):
        return False
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(config.get("version") or ""))
    if match is None:
        return None
    version = tuple(int(number or 0) for number in match.groups())
    if (0, 17, 1) <= version < (0, 19):
        return True
    return False if (0, 14) <= version < (0, 17) or version >= (0, 19) else None


def gather_modules(checkpoint: Checkpoint, weights: Sequence[Weight]) -> list[Module]:
    """Gather experts into stacks; everything else is a linear. Order of first appearance is kept.

    Raises:
        DamagedError: an expert is missing, or experts of one layer differ in shape.
    """
    found: dict[str, Linear | dict[Place, Weight]] = {}
    for weight in weights:
        expert = expert_of(weight.name)
        if expert is None:
            found[weight.name] = Linear(weight.name, weight)
            continue
        members = found.setdefault(expert[0], {})
        assert isinstance(members, dict), "a module cannot be called '....experts'"
        place = (expert[2], expert[1])
        if place in members:
            raise unlike(members, weight.name, place)
        members[place] = weight
    stacks = {name: members for name, members in found.items() if isinstance(members, dict)}
    plain = unquantized_members(checkpoint, stacks.keys(), {weight.name for weight in weights})
    gated = any(role in ("gate", "gate_up") for members in (*stacks.values(), *plain.values()) for role, _ in members)
    return [
        member if isinstance(member, Linear) else _stack(checkpoint, name, member, plain.get(name, set()), gated)
        for name, member in found.items()
    ]


def _stack(
    checkpoint: Checkpoint, name: str, members: Mapping[Place, Weight], plain: Collection[Place], gated: bool
) -> ExpertStack | LooseExperts:
    roles, experts = check_complete(checkpoint, name, {*members, *plain}, gated)
    if plain:
        return LooseExperts(name, members, not_quantized(plain, roles, experts), is_interleaved(checkpoint))
    weights: dict[str, tuple[Weight, ...]] = {}
    for role in roles:
        weights[role] = tuple(members[role, expert] for expert in range(experts))
        shapes = {(weight.N, weight.K) for weight in weights[role]}
        if len(shapes) > 1:
            raise DamagedError(f"{name}: {role} matrices of different shapes {sorted(shapes)}")
    first = {role: members[0] for role, members in weights.items()}
    _check_shapes(name, first)
    _check_upright(checkpoint, name, first)
    biases = {role: slices for role in weights if (slices := _biases(checkpoint, weights[role]))}
    biases = biases or _stacked_biases(checkpoint, name, weights)
    if biases and set(biases) not in (set(weights), {"gate_up", "down"}):
        raise DamagedError(f"{name}: only {', '.join(sorted(biases))} matrices have biases")
    if len(dtypes := {bias.tensor.dtype for slices in biases.values() for bias in slices}) > 1:
        raise DamagedError(f"{name}: biases are {' and '.join(sorted(dtypes))}; want one dtype")
    if is_interleaved(checkpoint) and "gate" in weights:
        weights = _in_order(checkpoint, name, weights)
    return ExpertStack(name, weights, biases, is_interleaved(checkpoint))


def _check_shapes(name: str, first: Mapping[str, Weight]) -> None:
    """Raises DamagedError where gate and up do not feed down, UnsupportedError where they were cut the wrong way."""
    down = first["down"]
    for role, factor in (("gate", 1), ("up", 1), ("gate_up", 2)):
        weight = first.get(role)
        if weight is None or (factor * down.K, down.N) == (weight.N, weight.K):
            continue
        if role != "gate_up" and (2 * weight.N, weight.K) == (down.K, 2 * down.N):
            # gpt-oss's unquantized stacks are [E, H, 2I] and [E, I, H]; AutoRound's model-free mode takes them for
            # [E, 2I, H] and [E, H, I].
            raise UnsupportedError(
                f"{name}: {role} is {[weight.N, weight.K]} and down {[down.N, down.K]}: the experts were stored "
                "transposed, and quantized and cut along the wrong axis; quantize the model again, not model-free"
            )
        raise DamagedError(
            f"{name}: {role} is {[weight.N, weight.K]} and down {[down.N, down.K]}; they do not belong together"
        )


def _check_upright(checkpoint: Checkpoint, name: str, first: Mapping[str, Weight]) -> None:
    """Raises UnsupportedError where stacks are `[E, K, N]`: gate, up and down then feed each other as well, and only
    the width of the model tells."""
    hidden, upper = checkpoint.text_config.get("hidden_size"), next(iter(first.values()))
    if upper.stack and upper.N == hidden != upper.K and "gate" in first:
        raise UnsupportedError(
            f"{name}: gate is {[upper.N, upper.K]} in a model of width {hidden}: the stacks are transposed, and their "
            "scales along the wrong axis"
        )


def _in_order(
    checkpoint: Checkpoint, name: str, weights: Mapping[str, tuple[Weight, ...]]
) -> dict[str, tuple[Weight, ...]]:
    """gpt-oss's roles as they are meant: gate and up, or the fused matrix that the two halves were.

    Raises:
        UnsupportedError: which of the two cannot be known.
    """
    version = checkpoint.quantization.get("version")
    halves = halved(checkpoint)
    if halves is None:
        raise UnsupportedError(
            f"{name}: whether gate_proj and up_proj alternate or are halves depends on the llm-compressor that wrote "
            f"them, and version {version!r} in the config does not tell; quantize the model again"
        )
    if not halves:
        said = "gate_proj is the even rows of the fused axis, up_proj the odd"
        fact = said if version is None else f"{said}: compressed-tensors {version}"
        gate = tuple(replace(weight, facts=(*weight.facts, fact)) for weight in weights["gate"])
        return {**weights, "gate": gate}
    fact = f"gate_proj and up_proj are halves of the alternating rows (compressed-tensors {version}): joined again"
    pairs = zip(weights["gate"], weights["up"], strict=True)
    fused = tuple(join_rows(f"{name}.{e}.gate_up_proj", gate, up, fact) for e, (gate, up) in enumerate(pairs))
    return {"gate_up": fused, "down": weights["down"]}


def _biases(checkpoint: Checkpoint, weights: Sequence[Weight]) -> tuple[Slice, ...]:
    present = [weight.bias or _bias_tensor(checkpoint, weight) for weight in weights]
    slices = tuple(bias for bias in present if bias is not None)
    if slices and len(slices) != len(weights):
        raise DamagedError(f"{weights[present.index(None)].name}.bias is missing; other experts have one")
    dtypes = {bias.tensor.dtype for bias in slices}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        raise DamagedError(
            f"{slices[0].tensor.name} and its siblings are {', '.join(sorted(dtypes))}; want one of {', '.join(FLOATS)}"
        )
    for weight, bias in zip(weights, slices, strict=False):
        if bias.shape[-1] != weight.N or math.prod(bias.shape) != weight.N:
            raise DamagedError(f"{bias.tensor.name} has shape {list(bias.shape)}, want [{weight.N}]")
    return slices


def _stacked_biases(
    checkpoint: Checkpoint, name: str, weights: Mapping[str, Sequence[Weight]]
) -> dict[str, tuple[Slice, ...]]:
    """Biases that stayed stacked, `[E, 2I]` and `[E, H]`, beside experts that were taken apart (AutoRound, model-free):
    in the order of the fused rows."""
    upper = "up" if set(weights) == GATELESS else "gate_up"
    tensors = [checkpoint.tensors.get(f"{name}.{role}_proj_bias") for role in (upper, "down")]
    found: dict[str, tuple[Slice, ...]] = {}
    for role, tensor in zip((upper, "down"), tensors, strict=True):
        if tensor is None:
            continue
        members = weights["down"] if role == "down" else [w for key, (w, *_) in weights.items() if key != "down"]
        N = members[0].N if role == "down" else sum(weight.N for weight in members)
        if tensor.shape != (len(weights["down"]), N) or tensor.dtype not in FLOATS:
            raise DamagedError(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, want {[len(weights['down']), N]}"
            )
        found[role] = tuple(rows(tensor, expert, expert + 1) for expert in range(len(weights["down"])))
    return found


def _bias_tensor(checkpoint: Checkpoint, weight: Weight) -> Slice | None:
    tensor = checkpoint.tensors.get(f"{weight.name}.bias")
    # A reader that used the bias up has found it to be a dummy.
    return whole(tensor) if tensor is not None and tensor not in weight.tensors else None
