"""Releases of auto-round-lib, whose expert kernels (ARK) compute what vllm-xpu-kernels has no kernel for.

`ark_releases.json` beside this module was read out of the released wheels by `scripts/lanes/kernels`, which also
compares it with them. What the two libraries have in common stands in `xpu_releases.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from xpuquant.errors import EnvironmentFault
from xpuquant.values import frozen
from xpuquant.xpu_releases import Fault, number

ARK_PACKAGE = "auto-round-lib"
OLDEST_ARK = (0, 16)
"""0.15, the first whose expert kernels take zero points, refuses what expert parallelism hands over."""
BEYOND_ARK = (0, 17)
"""Not read yet: between 0.15 and 0.16 `moe` came to choose its kernel otherwise, and to check otherwise."""

COUNTS_ROWS = "ARK_MOE_VALIDATE_ROUTING"
"""The environment variable by which `moe` insists that every row of the activations belongs to an expert."""


@frozen
class ArkRelease:
    """One release.

    sha256        of its wheel for Python 3.11 on Linux
    operators     name → arguments with their defaults, of the Python functions
    zero_points   device kernels that have an instance with zero points for float16 and bfloat16
    counts_rows   when `moe` refuses activations with rows of no expert: `always`, `COUNTS_ROWS`, or None: never
    decodes_nan_as_480  FP8 E4M3's two codes of no number, in `moe_gemm_decode`, which moves bits
    """

    version: str
    sha256: str
    operators: Mapping[str, str]
    zero_points: tuple[str, ...]
    counts_rows: str | None
    decodes_nan_as_480: bool

    @property
    def number(self) -> tuple[int, ...]:
        return number(self.version)

    @property
    def is_served(self) -> bool:
        return OLDEST_ARK <= self.number < BEYOND_ARK


ARK_FAULTS = (
    Fault(
        "moe",
        "refuses rows of other ranks' experts, and waits for the GPU to count them",
        "not served",
        lambda release: release.counts_rows == "always",
    ),
    Fault(
        "moe",
        f"does not take rows of other ranks' experts while {COUNTS_ROWS} is set",
        "refused with expert parallelism while it is set",
        lambda release: release.counts_rows == COUNTS_ROWS,
    ),
    Fault(
        "moe_gemm_decode",
        "reads the two NaN codes of FP8 E4M3 as 480 and -480",
        "verification warns of such codes",
        lambda release: release.decodes_nan_as_480,
    ),
)


@cache
def released_ark() -> tuple[ArkRelease, ...]:
    """Every release that has libraries, oldest first."""
    stored = json.loads((Path(__file__).parent / "ark_releases.json").read_text())
    found = []
    now: dict[str, Any] = {}
    for version, wheel in stored["releases"].items():
        for table in ("schemas", "facts"):
            now |= {name: since[version] for name, since in stored[table].items() if version in since}
        operators = {name: now[name] for name in stored["schemas"] if now[name] is not None}
        facts = tuple(now["zero_points"]), now["counts_rows"], now["decodes_nan_as_480"]
        found.append(ArkRelease(version, wheel["sha256"], operators, *facts))
    return tuple(found)


def ark_release(version: str) -> ArkRelease:
    """The release of that version; for one that is not on record, the newest before it."""
    return [release for release in released_ark() if release.number <= number(version)][-1]


def serving_ark() -> str:
    """The releases that this package serves with, e.g. `0.16.x`."""
    return " to ".join(dict.fromkeys(f"{r.number[0]}.{r.number[1]}.x" for r in released_ark() if r.is_served))


def check_ark(version: str | None) -> None:
    """Raise EnvironmentFault, in one line, where auto-round-lib is missing (None) or not one that is served with."""
    least, most = (".".join(map(str, bound)) for bound in (OLDEST_ARK, BEYOND_ARK))
    fix = f"pip install '{ARK_PACKAGE}>={least},<{most}'"
    if version is None:
        raise EnvironmentFault(f"{ARK_PACKAGE} is not installed: {fix}")
    if number(version)[:2] < OLDEST_ARK:
        raise EnvironmentFault(f"{ARK_PACKAGE} {version} is too old: {fix}")
    if number(version)[:2] >= BEYOND_ARK:
        raise EnvironmentFault(
            f"{ARK_PACKAGE} {version} is newer than this xpuquant knows: {fix} or pip install -U xpuquant"
        )


def refusal_of_switches(ranks: int, environment: Mapping[str, str]) -> str | None:
    """What would fail at the first forward; None where nothing would.

    Args:
        ranks: of expert parallelism.
        environment: of the process.
    """
    value = environment.get(COUNTS_ROWS)
    if ranks > 1 and value is not None and value.strip().lower() not in ("0", "false", "off", "no"):
        return f"{COUNTS_ROWS}={value} makes ARK refuse the rows of other ranks' experts: unset it"
    return None
