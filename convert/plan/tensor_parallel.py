"""Will the converted model split over several GPUs? Found out before the download, not at server start.

vLLM splits q, k, v, gate and up along N and o, down along K. Along K every rank needs whole groups of scales (and whole
words); along N, whole words of zero points. A permutation of K (act-order) crosses ranks. The groups of states of a
Mamba 2 model are dealt out; vLLM repeats one that several ranks share, which is not done for stored layouts.
"""

from __future__ import annotations

from collections.abc import Iterable

from xpuquant.conversion.plan.survey import PlannedModule
from xpuquant.formats.architecture import is_mixer_input, layer_of, splits_along_k
from xpuquant.formats.layouts.modules import ExpertStack, LooseExperts
from xpuquant.formats.scheme import Scheme, columns_multiple

_WORD = 8


def split_problem(planned: PlannedModule, ranks: int) -> str | None:
    """Why a module cannot be split over `ranks` GPUs, or None."""
    scheme = planned.conversion.scheme
    if scheme is None or isinstance(planned.source, LooseExperts) or layer_of(planned.conversion.name).whole:
        return None
    if isinstance(planned.source, ExpertStack):
        upper, down = (planned.source.weights[role][0] for role in (next(iter(planned.source.weights)), "down"))
        rows = upper.N // (2 if "gate_up" in planned.source.weights else 1)
        return _along_n(scheme, rows, ranks) or _along_k(scheme, down.K, ranks)
    weight = planned.source.weight
    along = _along_k if splits_along_k(planned.conversion.name) else _along_n
    size = weight.K if along is _along_k else weight.N
    return along(scheme, size, ranks)


def problems(modules: Iterable[PlannedModule], ranks: int, state_groups: int | None = None) -> dict[str, str]:
    """Module → why it cannot be split over `ranks` GPUs.

    Args:
        state_groups: of a Mamba 2 model (`architecture.state_groups`).
    """
    found = {}
    for planned in modules:
        name = planned.conversion.name
        problem = split_problem(planned, ranks)
        if state_groups is not None and state_groups % ranks and planned.conversion.scheme and is_mixer_input(name):
            problem = f"{state_groups} group{'s' * (state_groups > 1)} of states for {ranks} GPUs"
        if problem is not None:
            found[name] = problem
    return found


def _along_n(scheme: Scheme, N: int, ranks: int) -> str | None:
    words = not scheme.symmetric or scheme.layout == "int8_linear"
    unit = scheme.block_n if scheme.granularity == "block" else _WORD if words else 1
    if N % (ranks * max(unit, 1)):
        return (
            f"N={N} does not split into {ranks} parts of whole {unit}s"
            if unit > 1
            else f"N={N} does not split by {ranks}"
        )
    return None


def _along_k(scheme: Scheme, K: int, ranks: int) -> str | None:
    if scheme.act_order:
        return "the act-order permutation of K crosses ranks"
    unit = scheme.group_size or columns_multiple(scheme) or _WORD
    if scheme.group_size == K and scheme.layout not in ("int8_linear", "nvfp4_linear"):
        return None if K % (ranks * _WORD) == 0 else f"K={K} does not split by {ranks}"
    if K % (ranks * unit):
        what = f"whole groups of {unit}" if scheme.group_size else f"multiples of {unit}"
        return f"K={K} does not split into {ranks} parts of {what}"
    return None
