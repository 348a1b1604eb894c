"""Which matrices of a checkpoint are the experts of one layer.

Families spell the same three matrices differently, on disk:

    Qwen2/3-MoE, DeepSeek, GLM   mlp.experts.E.{gate_proj, up_proj, down_proj}
    Mixtral, MiniMax             block_sparse_moe.experts.E.{w1, w3, w2}
    Mixtral by newer producers   {mlp, block_sparse_moe}.experts.E.{gate_proj, up_proj, down_proj}
    gpt-oss native               mlp.experts.{gate_up_proj, down_proj}_blocks, 3-D (its reader yields one per expert)

so they are recognised by suffix, not by architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Checkpoint, Slice, whole
from xpuquant.formats.layout import ExpertStack, Linear, Module
from xpuquant.formats.weight import Weight

ROLES = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up",
    "down_proj": "down", "w2": "down", "gate_up_proj": "gate_up",
}  # fmt: skip

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<part>" + "|".join(ROLES) + ")")


def expert_of(name: str) -> tuple[str, int, str] | None:
    """(stack, expert, role) of a module name, or None for one that is no expert's."""
    match = _EXPERT.fullmatch(name)
    return (match["stack"], int(match["expert"]), ROLES[match["part"]]) if match else None


def is_interleaved(checkpoint: Checkpoint) -> bool:
    """gpt-oss's activation reads gate and up from alternating rows; every other family from two halves."""
    return checkpoint.text_config.get("model_type") == "gpt_oss"


def modules(checkpoint: Checkpoint, weights: Sequence[Weight]) -> list[Module]:
    """Gather experts into stacks; everything else is a linear. Order of first appearance is kept.

    Raises:
        DamagedError: an expert is missing, or experts of one layer differ in shape.
    """
    found: dict[str, Linear | dict[tuple[str, int], Weight]] = {}
    for weight in weights:
        expert = expert_of(weight.name)
        if expert is None:
            found[weight.name] = Linear(weight.name, weight)
        else:
            members = found.setdefault(expert[0], {})
            assert isinstance(members, dict), "a module cannot be called '....experts'"
            members[expert[2], expert[1]] = weight
    return [
        member if isinstance(member, Linear) else _stack(checkpoint, name, member)
        for name, member in found.items()
    ]


def _stack(checkpoint: Checkpoint, name: str, members: Mapping[tuple[str, int], Weight]) -> ExpertStack:
    roles = {role for role, _ in members}
    if roles not in ({"gate", "up", "down"}, {"gate_up", "down"}):
        wanted = {"gate_up", "down"} if "gate_up" in roles else {"gate", "up", "down"}
        missing = ", ".join(sorted(wanted - roles))
        raise DamagedError(f"{name}: no expert has a quantized {missing} matrix")
    experts = max(expert for _, expert in members) + 1
    weights: dict[str, tuple[Weight, ...]] = {}
    for role in sorted(roles, key=("gate_up", "gate", "up", "down").index):
        for expert in range(experts):
            if (role, expert) not in members:
                raise DamagedError(f"{name}: expert {expert} of {experts} has no quantized {role} matrix")
        weights[role] = tuple(members[role, expert] for expert in range(experts))
        shapes = {(weight.N, weight.K) for weight in weights[role]}
        if len(shapes) > 1:
            raise DamagedError(f"{name}: {role} matrices of different shapes {sorted(shapes)}")
    biases = {role: slices for role in weights if (slices := _biases(checkpoint, weights[role]))}
    if biases and set(biases) != set(weights):
        raise DamagedError(f"{name}: only {', '.join(sorted(biases))} matrices have biases")
    return ExpertStack(name, weights, biases, is_interleaved(checkpoint))


def _biases(checkpoint: Checkpoint, weights: Sequence[Weight]) -> tuple[Slice, ...]:
    present = [weight.bias or _bias_tensor(checkpoint, weight) for weight in weights]
    slices = tuple(bias for bias in present if bias is not None)
    if slices and len(slices) != len(weights):
        raise DamagedError(f"{weights[present.index(None)].name}.bias is missing; other experts have one")
    for weight, bias in zip(weights, slices, strict=False):
        if bias.shape[-1] != weight.N:
            raise DamagedError(f"{bias.tensor.name} has shape {list(bias.shape)}, want [{weight.N}]")
    return slices


def _bias_tensor(checkpoint: Checkpoint, weight: Weight) -> Slice | None:
    tensor = checkpoint.tensors.get(f"{weight.name}.bias")
    # A reader that used the bias up has found it to be a dummy.
    return whole(tensor) if tensor is not None and tensor not in weight.tensors else None
