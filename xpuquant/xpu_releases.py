"""What each released vllm-xpu-kernels offers, and what is known to be wrong in it.

`xpu_releases.json` beside this module was read out of the released wheels by `scripts/lanes/kernels`, which also
compares it with them. Here is what follows for a stored layout: which operators compute it, since which release they
do, and what a model asks for that no release, or not the installed one, has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from xpuquant.errors import EnvironmentFault
from xpuquant.formats.scheme import Scheme
from xpuquant.values import frozen

PACKAGE = "vllm-xpu-kernels"
OLDEST_RELEASE = (0, 1, 15)
"""Before it the grouped GEMM read a counter that nothing had set."""
BEYOND_RELEASES = (0, 1, 17)
"""Not read yet: how `XpuFusedMoe` takes int4 is no public interface, and marked there to be moved."""

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
"""What a model's config calls the number of experts per token."""


@frozen
class Release:
    """One wheel.

    sha256       of the wheel
    operators    name → schema
    top_k        numbers of experts per token that `moe_gather` has instances for
    activations  names that `XpuFusedMoe` knows
    arguments    of its constructor
    switches     environment variables that it reads
    """

    version: str
    sha256: str
    operators: Mapping[str, str]
    top_k: tuple[int, ...]
    activations: tuple[str, ...]
    arguments: tuple[str, ...]
    switches: tuple[str, ...]
    clears_its_counter: bool
    takes_rectangular_blocks: bool
    zeroes_rows_without_experts: bool

    @property
    def number(self) -> tuple[int, ...]:
        return number(self.version)

    @property
    def is_served(self) -> bool:
        return OLDEST_RELEASE <= self.number < BEYOND_RELEASES


class Fault(NamedTuple):
    """Something wrong in some releases. `answer` is what this package does about it."""

    operator: str
    text: str
    answer: str
    in_release: Callable[[Any], bool]


FAULTS = (
    Fault(
        "cutlass_grouped_gemm_interface",
        "reads a counter that nothing has set",
        "not served",
        lambda release: not release.clears_its_counter,
    ),
    Fault(
        "fp8_gemm_w8a16",
        "takes blocks for square: others are silently wrong",
        "blocks go to fp8_gemm",
        lambda release: not release.takes_rectangular_blocks,
    ),
    Fault(
        "XpuFusedMoe",
        "gives rows without an expert (padding of data parallelism) to expert 0 as they are",
        "the rows are set to zero",
        lambda release: not release.zeroes_rows_without_experts,
    ),
)


def number(version: str) -> tuple[int, ...]:
    """`0.1.15.4+xpu` → (0, 1, 15, 4)."""
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdecimal())


@cache
def releases() -> tuple[Release, ...]:
    """Every release that has operators, oldest first."""
    stored = json.loads((Path(__file__).parent / "xpu_releases.json").read_text())
    versions = [version for version, wheel in stored["releases"].items() if not wheel.get("empty")]
    found = []
    now: dict[str, Any] = {}
    for version in versions:
        for table in ("schemas", "facts"):
            now |= {name: since[version] for name, since in stored[table].items() if version in since}
        found.append(
            Release(
                version,
                stored["releases"][version]["sha256"],
                {name: now[name] for name in stored["schemas"] if now[name] is not None},
                tuple(now["top_k"]),
                tuple(now["activations"]),
                tuple(now["xpu_fused_moe"] or ()),
                tuple(now["switches"]),
                now["grouped_gemm_clears_its_counter"],
                now["w8a16_takes_rectangular_blocks"],
                now["zeroes_rows_without_experts"],
            )
        )
    return tuple(found)


def served() -> tuple[Release, ...]:
    """The releases that this package serves with, oldest first."""
    return tuple(release for release in releases() if release.is_served)


def release_of(version: str) -> Release:
    """The release of that version; for one that is not on record, the newest before it."""
    return [release for release in releases() if release.number <= number(version)][-1]


def operators_of(scheme: Scheme) -> tuple[str, ...]:
    """What computes a module that is stored so, in the order of the calls; nothing for layouts of other loaders."""
    if scheme.layout in ("int4_experts", "fp8_experts", "mxfp4_experts", "mxfp8_experts"):
        return ("remap_hidden_states", "cutlass_grouped_gemm_interface", "moe_gather")
    if scheme.layout in ("uint4_experts", "int8_experts", "fp8_channel_experts", "nvfp4_experts"):
        return ("remap_hidden_states", "moe_gather")  # with ARK's GEMM between them
    if scheme.layout == "fp8_linear" and scheme.granularity == "block":
        return ("per_token_group_fp8_quant", "fp8_gemm")
    return {
        "int4_linear": ("int4_gemm_w4a16",),
        "int8_linear": ("int4_gemm_w4a16",),
        "nvfp4_linear": ("int4_gemm_w4a16",),
        "fp8_linear": ("fp8_gemm_w8a16",),
        "mxfp4_linear": ("per_token_group_quant_mxfp4", "fp4_gemm"),
        "mxfp8_linear": ("per_token_group_fp8_quant", "fp8_gemm"),
    }.get(scheme.layout, ())


def since(scheme: Scheme, top_k: int | None = None) -> str | None:
    """The oldest release that serves a module stored so, and all after it do; None: none does, or it is not ours.

    Args:
        top_k: experts per token, of a stack of experts.
    """
    operators = operators_of(scheme)
    fit = [
        bool(operators)
        and all(operator in release.operators for operator in operators)
        and (top_k is None or not scheme.experts or top_k in release.top_k)
        for release in served()
    ]
    if not fit[-1]:
        return None
    first = max((i + 1 for i, fits in enumerate(fit) if not fits), default=0)
    return served()[first].version


def check_release(version: str | None) -> None:
    """Raise EnvironmentFault, in one line, where vllm-xpu-kernels is missing (None) or not one that is served with."""
    least, most = (".".join(map(str, bound)) for bound in (OLDEST_RELEASE, BEYOND_RELEASES))
    fix = f"pip install '{PACKAGE}>={least},<{most}'"
    if version is None:
        raise EnvironmentFault(f"{PACKAGE} is not installed: {fix}")
    # A build from a checkout calls itself 0.1.dev…: whoever runs one knows what it is.
    if ".dev" in version:
        return
    if number(version)[:3] < OLDEST_RELEASE:
        raise EnvironmentFault(f"{PACKAGE} {version} is too old for xpuquant: {fix}")
    if number(version)[:3] >= BEYOND_RELEASES:
        raise EnvironmentFault(
            f"{PACKAGE} {version} is newer than this xpuquant knows: {fix} or pip install -U xpuquant"
        )


_GATES = ("silu", "gelu", "gelu_tanh", "swigluoai")
"""What both `XpuFusedMoe` and `layers.gated` compute, by vLLM's names."""


_GATELESS = ("relu2_no_mul",)
"""The same of experts without a gate: `XpuFusedMoe` takes `[E, I, H]` for it alone."""


def refusal_of_experts(
    release: Release,
    scheme: Scheme,
    top_k: int | None,
    activation: str,
    limit: float | None,
    environment: Mapping[str, str],
) -> str | None:
    """What would fail, or be silently wrong, at the first forward of a stack of experts; None where nothing would.

    Args:
        release: that is installed.
        top_k: experts per token; None: not known yet.
        activation: vLLM's name.
        limit: where gate and up are clamped; None: nowhere.
        environment: of the process.
    """
    if top_k is not None and top_k not in release.top_k:
        better = since(scheme, top_k)
        fix = f"; {better} does" if better is not None else ""
        return f"{PACKAGE} {release.version} gathers {_listed(release.top_k)} experts per token, not {top_k}{fix}"
    known = _GATES if scheme.gated else _GATELESS
    if activation not in known or activation not in release.activations:
        without = "" if scheme.gated else " without a gate"
        return f"no XPU kernel computes '{activation}' experts{without}: {', '.join(known)}"
    if (activation == "swigluoai") != scheme.interleaved:
        rows = "alternate gate and up" if scheme.interleaved else "are all gate, then all up"
        return f"the kernel of '{activation}' reads other rows than the stored ones, which {rows}"
    if limit and (scheme.interleaved or not scheme.gated):
        what = "gate and up that alternate" if scheme.interleaved else "experts without a gate"
        return f"{what} cannot be clamped at {limit}: the kernel would clamp the wrong rows"
    for switch, is_on in (
        ("VLLM_XPU_FUSED_MOE_USE_REF", scheme.layout in ("int4_experts", "mxfp8_experts")),
        ("VLLM_XPU_FUSED_MOE_NATIVE_MXFP8", scheme.layout == "mxfp8_experts"),
    ):
        value = environment.get(switch, "").strip().upper()
        off = value in ("0", "OFF", "FALSE", "NO", "N")
        chosen = value in ("1", "ON", "TRUE", "YES", "Y") if switch.endswith("REF") else off
        if is_on and chosen and switch in release.switches:
            return (
                f"{switch}={environment[switch]} chooses code that reads other experts than {scheme.layout}: unset it"
            )
    return None


def _listed(numbers: tuple[int, ...]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}"
