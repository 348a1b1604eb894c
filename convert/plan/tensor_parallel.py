"""Will the converted model split over several GPUs? Found out before the download, not at server start.

vLLM splits q, k, v, gate and up along N and o, down along K. Along K every rank needs whole groups of scales (and whole
words); along N, whole words of zero points: `formats/splits.py`, where the plugin that loads the model asks too. The
groups of states of a Mamba 2 model are dealt out; vLLM repeats one that several ranks share, which is not done for
stored layouts.
"""

from __future__ import annotations

from collections.abc import Iterable

from xpuquant.conversion.plan.survey import PlannedModule
from xpuquant.formats.architecture import is_mixer_input, layer_of, splits_along_k
from xpuquant.formats.layouts.modules import ExpertStack, LooseExperts
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.splits import columns_step, intermediate_step, rows_step


def split_problem(planned: PlannedModule, ranks: int) -> str | None:
    """Why a module cannot be split over `ranks` GPUs, or None."""
    scheme = planned.conversion.scheme
    if scheme is None or isinstance(planned.source, LooseExperts) or layer_of(planned.conversion.name).whole:
        return None
    if isinstance(planned.source, ExpertStack):
        return _uneven("I", planned.source.weights["down"][0].K, ranks, intermediate_step(scheme), scheme)
    N, K = planned.source.weight.N, planned.source.weight.K
    if splits_along_k(planned.conversion.name):
        return _uneven("K", K, ranks, columns_step(scheme, K, K // ranks), scheme)
    return _uneven("N", N, ranks, rows_step(scheme), scheme)


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


def _uneven(what: str, size: int, ranks: int, step: int, scheme: Scheme) -> str | None:
    """Why `size` (N, K, or I of experts) does not split into `ranks` parts of whole steps, or None."""
    if size % ranks:
        return f"{what}={size} does not split by {ranks}"
    if size // ranks % step:
        parts = f"whole groups of {step}" if step == scheme.group_size and what != "N" else f"multiples of {step}"
        return f"{what}={size} does not split into {ranks} parts of {parts}"
    return None
