"""Which classes of experts in Transformers compute what `XpuquantExperts` computes, and how they gate.

Transformers swaps the forward of a class of experts itself (for grouped GEMMs), where the class is decorated with
`transformers.integrations.moe.use_experts_implementation`: the decorator's arguments are then all that a stand-in has
to know, and `_apply_gate` is what lies between the two matrices. A class without the decorator may do anything: those
that are listed here were read, others are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.integrations.moe import use_experts_implementation

from xpuquant import layers
from xpuquant.errors import UnsupportedError
from xpuquant.formats.scheme import Scheme

Gate = Callable[[torch.Tensor], torch.Tensor]

UNDECORATED = ("transformers.models.step3p7.modeling_step3p7.Step3p7Experts",)
"""Classes that were read: undecorated, because their constructor takes another argument, and alike in all else."""

ROWS_BY_EXPERT = ("transformers.models.llama4.modeling_llama4.Llama4TextExperts",)
"""Classes that are given rows instead of routes, as many for each expert, router weights in them already;
`gate_up_proj` is `[E, H, 2I]`, gate then up."""

WITH_IDENTITIES = ("transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts",)
"""Classes that are given routes to experts beyond those of the stack, which return their input."""

_ANY = ("is_transposed", "is_concatenated", "has_bias", "has_gate")
"""Arguments of the decorator that are served, whatever they say: how `gate_up_proj` and `down_proj` lie in the source,
and what the scheme says too."""


def check_experts_class(experts: Any, scheme: Scheme) -> None:
    """Raise UnsupportedError, in one line, where a module computes anything but a routed sum of gated experts, or reads
    its rows otherwise than they are stored."""
    name = type(experts).__name__
    if not (_is_declared(experts) or _full_name(experts) in (*UNDECORATED, *ROWS_BY_EXPERT, *WITH_IDENTITIES)):
        raise UnsupportedError(
            f"{name} computes in its own way, which xpuquant does not know in Transformers: "
            "load the source repo instead"
        )
    for argument, default in _declaration().items():
        is_computed = argument in _ANY or (argument == "has_post_expert_norm" and normalizes_outputs(experts))
        if not is_computed and getattr(experts, argument, default) != default:
            raise UnsupportedError(
                f"{name} is declared {argument}={getattr(experts, argument)}, which xpuquant does not compute in "
                "Transformers: load the source repo instead"
            )
    if getattr(experts, "has_gate", True) != scheme.gated:
        says = "has none" if scheme.gated else "has one"
        raise UnsupportedError(f"the stack is stored {'with' if scheme.gated else 'without'} a gate, and {name} {says}")
    for part in scheme.stacks:
        if not isinstance(getattr(experts, part, None), torch.nn.Parameter):
            raise UnsupportedError(f"{name} has no stacked {part}: load the source repo instead")
    # Transformers 5.0 has no such argument yet.
    if scheme.gated and getattr(experts, "is_concatenated", not scheme.interleaved) == scheme.interleaved:
        rows = "alternate gate and up" if scheme.interleaved else "are all gate, then all up"
        raise UnsupportedError(f"{name} reads other rows than those of {scheme.label()}, which {rows}")
    if getattr(experts, "has_bias", False) != scheme.bias:
        says = "has none" if scheme.bias else "adds them"
        raise UnsupportedError(f"the stack is stored {'with' if scheme.bias else 'without'} biases, and {name} {says}")


def takes_rows_by_expert(experts: Any) -> bool:
    """Whether a module is one of `ROWS_BY_EXPERT`."""
    return _full_name(experts) in ROWS_BY_EXPERT


def has_identities(experts: Any) -> bool:
    """Whether a module is one of `WITH_IDENTITIES`."""
    return _full_name(experts) in WITH_IDENTITIES


def normalizes_outputs(experts: Any) -> bool:
    """Whether each expert's output is normalized before it is weighed, as Muse Spark's are."""
    declared = getattr(experts, "has_post_expert_norm", False)
    return bool(declared) and isinstance(getattr(experts, "post_expert_norm", None), torch.nn.Module)


def stack_sizes(experts: Any) -> tuple[int, int, int]:
    """E, H and I of the stack."""
    E, first, second = experts.down_proj.shape
    transposed = getattr(experts, "is_transposed", takes_rows_by_expert(experts))
    H, I = (second, first) if transposed else (first, second)
    return E, H, I


def gate_of(experts: Any) -> Gate:
    """What lies between the two matrices, `[m, 2I]` → `[m, I]`, or `[m, I]` without a gate."""
    if takes_rows_by_expert(experts) or has_identities(experts):
        return partial(_gate_then_up, experts.act_fn)
    gate: Gate = experts._apply_gate if getattr(experts, "has_gate", True) else experts.act_fn
    return gate


def _gate_then_up(act_fn: Gate, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return act_fn(gate) * up


def kernel_gate(experts: Any, scheme: Scheme, device: torch.device) -> tuple[str, float | None]:
    """vLLM's name of a module's gate, and where it clamps: found by computing both.

    Raises:
        UnsupportedError: none of those that XPU kernels have.
    """
    limits = {float(v) for v in (getattr(experts, name, None) for name in _LIMITS) if v is not None}
    gate_up = _probe(limits, scheme.interleaved, device)
    actual = gate_of(experts)(gate_up)
    names = ("swigluoai",) if scheme.interleaved else ("silu", "gelu", "gelu_tanh")
    for limit in (None, *sorted(limits)):
        for name in names if scheme.gated else ("relu2_no_mul",):
            if torch.allclose(actual, layers.activated(scheme, name, gate_up, limit), rtol=1e-5, atol=1e-6):
                return name, limit
    function = type(getattr(experts, "act_fn", None)).__name__
    raise UnsupportedError(
        f"no XPU kernel gates as {type(experts).__name__} does, whose activation is {function}: "
        "load the source repo instead"
    )


_LIMITS = ("limit", "swiglu_limit")
"""What classes call the value at which they clamp."""


def _probe(limits: set[float], interleaved: bool, device: torch.device) -> torch.Tensor:
    """`[m, 2]`: every gate with every up, of both signs, small, at the limits, and beyond any."""
    ends = [limit * factor for limit in limits if 0 < limit < 1e4 for factor in (0.9, 1.1, 3.0)]
    values = sorted({0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 6.5, 8.0, 20.0, 1e3, 1e5, *ends})
    # Not the default dtype, which is the model's own while it is made.
    side = torch.tensor(values, dtype=torch.float32, device=device)
    side = torch.cat([-side, side])
    return torch.cartesian_prod(side, side)


def _full_name(experts: Any) -> str:
    return f"{type(experts).__module__}.{type(experts).__qualname__}"


def _is_declared(experts: Any) -> bool:
    return "is_transposed" in vars(experts)


def _declaration() -> dict[str, Any]:
    """Arguments of the installed decorator → what they are where a class gives none."""
    parameters = inspect.signature(use_experts_implementation).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("experts_class", "experts_interface")}
