"""What each released vllm-xpu-kernels offers, and what is known to be wrong in it.

`xpu_releases.json` beside this module was read out of the released wheels by `scripts/lanes/kernels`, which also
compares it with them. Here is what follows for a stored layout: which operators compute it, since which release they
do, and what a model asks for that no release, or not the installed one, has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from xpuquant.formats.scheme import Scheme

PACKAGE = "vllm-xpu-kernels"
OLDEST_RELEASE = (0, 1, 15)
"""Before it the grouped GEMM read a counter that nothing had set."""
BEYOND_RELEASES = (0, 1, 17)
"""Not read yet: how `XpuFusedMoe` takes int4 is no public interface, and marked there to be moved."""


@dataclass(frozen=True)
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
    in_release: Callable[[Release], bool]


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
    if scheme.layout == "fp8_linear" and scheme.granularity == "block":
        return ("per_token_group_fp8_quant", "fp8_gemm")
    return {
        "int4_linear": ("int4_gemm_w4a16",),
        "fp8_linear": ("fp8_gemm_w8a16",),
        "mxfp4_linear": ("per_token_group_quant_mxfp4", "fp4_gemm"),
        "mxfp8_linear": ("per_token_group_fp8_quant", "fp8_gemm"),
    }.get(scheme.layout, ())
