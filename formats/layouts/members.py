"""Which matrices the experts of a layer have, quantized or not.

Producers leave some unquantized: modules that saw no calibration token or failed (GPTQModel#1680), those that a rule
of the config leaves out, matrices whose sizes a group does not divide. A stack has one form, so it matters that the
rest of its experts is there and is found: by the names of all tensors, and by the number that the config states.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from xpuquant.errors import DamagedError
from xpuquant.formats.architecture import expert_counts, expert_of, stacked_experts
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.weights.base import Weight

Place = tuple[str, int]
"""(role, expert)"""

ROLES = ("gate_up", "gate", "up", "down")
"""In the order of a stack's rows."""

GATELESS = frozenset({"up", "down"})
"""Roles of experts whose activation has no gate (Nemotron-H, Nemotron-3: relu squared)."""

_WHOLE = (frozenset({"gate", "up", "down"}), frozenset({"gate_up", "down"}), GATELESS)
_LISTED = 8


def unquantized_members(
    checkpoint: Checkpoint, stacks: Collection[str], quantized: Collection[str]
) -> dict[str, set[Place]]:
    """Stack → (role, expert) of the matrices that are plain floats.

    Args:
        stacks: those of which some matrices are quantized.
        quantized: names of the modules that are, among them all of these matrices.
    """
    found: dict[str, set[Place]] = {}
    for tensor in checkpoint.tensors.values() if stacks else ():
        name = tensor.name.removesuffix(".weight")
        # A stack of all experts in one tensor, or the matrix of one. Fused stacks are parameters, without `weight`.
        if tensor.dtype not in FLOATS or name in quantized or (name == tensor.name and len(tensor.shape) != 3):
            continue
        members = range(tensor.shape[0]) if len(tensor.shape) == 3 else ()
        for member in (stacked_experts(name, e) for e in members) if members else (name,):
            expert = expert_of(member) if member is not None else None
            if expert is not None and expert[0] in stacks and member not in quantized:
                found.setdefault(expert[0], set()).add((expert[2], expert[1]))
    return found


def check_complete(checkpoint: Checkpoint, name: str, present: Collection[Place], gated: bool) -> tuple[list[str], int]:
    """(roles in their order, number of experts) of a stack.

    Args:
        present: every matrix that is there, in whatever form.
        gated: experts of some layer have a gate.

    Raises:
        DamagedError: a matrix is missing, or experts that the config counts.
    """
    roles = {role for role, _ in present}
    if roles not in _WHOLE or (roles == GATELESS and gated):
        wanted = {"gate_up", "down"} if "gate_up" in roles else {"gate", "up", "down"}
        missing = ", ".join(sorted(wanted - roles)) or "one kind of"
        raise DamagedError(f"{name}: no expert has a {missing} matrix; is a shard incomplete? Download it again")
    experts = max(expert for _, expert in present) + 1
    stated = min(expert_counts(checkpoint), default=0)
    if experts < stated:
        raise DamagedError(
            f"{name}: experts 0 to {experts - 1} are there, config.json says {stated}; is a shard incomplete? "
            "Download it again"
        )
    ordered = [role for role in ROLES if role in roles]
    for role in ordered:
        for expert in range(experts):
            if (role, expert) not in present:
                raise DamagedError(
                    f"{name}: expert {expert} of {experts} has no {role} matrix; is a shard incomplete? "
                    "Download it again"
                )
    return ordered, experts


def not_quantized(plain: Collection[Place], roles: Collection[str], experts: int) -> str:
    """Why a stack of which `plain` matrices are floats has no form, in one line that names them."""
    of_expert: dict[int, list[str]] = {}
    for role, expert in sorted(plain, key=lambda place: (place[1], ROLES.index(place[0]))):
        of_expert.setdefault(expert, []).append(role)
    alike: dict[str, list[int]] = {}
    for expert, missing in of_expert.items():
        alike.setdefault(" and ".join(missing) if len(missing) < len(roles) else "", []).append(expert)
    said = "; ".join(_said(missing, numbers, experts) for missing, numbers in alike.items())
    return f"the experts of a layer share one format; unquantized: {said}"


def _said(roles: str, numbers: list[int], experts: int) -> str:
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    which = f"expert{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:_LISTED]))}{more} of {experts}"
    if len(numbers) == experts:
        which = "every expert"
    return f"{roles} of {which}" if roles else which


def unlike(members: Mapping[Place, Weight], name: str, place: Place) -> DamagedError:
    """Two modules for one matrix: `gate_proj` and `w1` of the same expert."""
    return DamagedError(f"{name} and {members[place].name} are both the {place[0]} matrix of expert {place[1]}")
