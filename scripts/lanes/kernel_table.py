"""Layout × operator × release of vllm-xpu-kernels and of ARK: what stands behind a call, compared with docs/kernels.md.

    kernel_table.py            print the tables; exit status 1 where the page has others, with the cells that are worse
    kernel_table.py --record   write them to the page

executed    the operator's device code out of that wheel was run on a CPU, over stored bytes: `scripts/lanes/shipped`,
            which fails where one no longer is; of ARK's prefill the kernel that widens a stack, not the product
checked     the call is held to the schema and to the checks of that release, by stand-ins that read memory as it does
otherwise   the reason why neither
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from shipped_table import EXECUTED as MARKS

from xpuquant.ark_releases import ARK_FAULTS, ARK_PACKAGE, ArkRelease, released_ark
from xpuquant.formats.layouts import layouts_by_name
from xpuquant.formats.scheme import Scheme
from xpuquant.xpu_releases import FAULTS, Release, operators_of, releases

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
EXECUTED = {word for mark in MARKS["vllm_xpu_kernels"] for word in re.findall(r"\w+", mark)}
"""Operators that `scripts/lanes/shipped` executes, among other words."""
WHEELS = re.findall(r"[a-z][a-z-]*==[\d.]+", (Path(__file__).parent / "shipped").read_text())
"""Those that it executes, as package==version."""
ARK_CALLS = {
    ("uint4_experts", "moe_gemm_decode"): ("ARK: moe_gemm_decode, int4", "executed"),
    ("uint4_experts", "moe_gemm_prefill"): ("ARK: experts widened for prefill", "widening executed"),
    ("int8_experts", "moe_gemm_decode"): (None, "checked"),
    ("int8_experts", "moe_gemm_prefill"): ("ARK: experts widened for prefill", "widening executed"),
    ("fp8_channel_experts", "moe_gemm_decode"): (None, "checked"),
    ("fp8_channel_experts", "moe_gemm_prefill"): ("ARK: experts widened for prefill", "widening executed"),
    ("nvfp4_experts", "moe_gemm_decode"): (None, "checked"),
    ("nvfp4_experts", "moe_gemm_prefill"): ("ARK: experts widened for prefill", "widening executed"),
}
"""(layout, operator) → (the mark of the tests that execute it, what is then said of it)."""
_RANKS = {"executed": 3, "widening executed": 2, "checked": 1}
Rows = list[tuple[str, str, dict[str, str]]]


def cell(operator: str, release: Release) -> str:
    if operator not in release.operators:
        return "absent"
    if release.operators[operator] != releases()[-1].operators[operator]:
        return "other arguments"
    if not release.is_served:
        mine = [fault for fault in FAULTS if fault.operator == operator and fault.in_release(release)]
        wrong = [fault.text for fault in mine if fault.answer == "not served"]
        return wrong[0] if wrong else "not served"
    return "executed" if operator in EXECUTED and f"vllm-xpu-kernels=={release.version}" in WHEELS else "checked"


def ark_cell(layout: str, operator: str, release: ArkRelease) -> str:
    if operator not in release.operators:
        return "absent"
    if not release.is_served:
        wrong = [fault.text for fault in ARK_FAULTS if fault.in_release(release)]
        return wrong[0] if wrong else "not served"
    mark, said = ARK_CALLS[layout, operator]
    is_run = mark in MARKS["auto_round_lib"] and f"{ARK_PACKAGE}=={release.version}" in WHEELS
    return said if is_run else "checked"


def ark_rows() -> Rows:
    """As `rows`, of ARK's releases."""
    return [
        (
            layout,
            operator,
            {release.version: ark_cell(layout, operator, release) for release in released_ark()},
        )
        for layout, operator in ARK_CALLS
    ]


def rows() -> Rows:
    """(layout, operator, version → cell), in the order of the calls."""
    schemes = []
    for name in layouts_by_name("xpu"):
        if name == "fp8_linear":
            schemes += [("fp8_linear, tensor or channel", Scheme(name, "channel"))]
            schemes += [("fp8_linear, block", Scheme(name, "block", 128, 128))]
        else:
            schemes.append((name, Scheme(name)))
    return [
        (label, operator, {release.version: cell(operator, release) for release in releases()})
        for label, scheme in schemes
        for operator in operators_of(scheme)
    ]


def table(found: Rows) -> str:
    """As Markdown; releases that agree in every cell share a column."""
    versions = list(found[0][2])

    def column(version: str) -> tuple[str, ...]:
        return tuple(cells[version] for _, _, cells in found)

    columns = [list(group) for _, group in groupby(versions, column)]
    heads = [group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in columns]
    lines = [["layout", "operator", *heads], ["---"] * (2 + len(heads))]
    lines += [[label, f"`{operator}`", *(cells[group[0]] for group in columns)] for label, operator, cells in found]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def place(page: str, library: str) -> tuple[int, int]:
    """Where on the page the table of a library begins and ends."""
    begin = f"<!-- {library}, by scripts/lanes/kernels --record -->\n"
    start = page.index(begin) + len(begin)
    return start, page.index("<!-- end -->\n", start)


def worse(old: str, new: str) -> list[str]:
    """Cells that were executed or checked, and are less now."""

    def cells(markdown: str) -> dict[tuple[str, str, str], str]:
        heads, _, *lines = [[part.strip() for part in line.split("|")[1:-1]] for line in markdown.strip().splitlines()]
        return {(line[0], line[1], head): c for line in lines for head, c in zip(heads[2:], line[2:], strict=True)}

    before, now = cells(old), cells(new)
    rank = _RANKS.get
    return [
        f"{' '.join(key)}: {text}, now {now.get(key, 'gone')}"
        for key, text in before.items()
        if rank(now.get(key, ""), 0) < rank(text, 0)
    ]


def main(arguments: Sequence[str]) -> int:
    page, status = PAGE.read_text(), 0
    for library, found in (("vllm-xpu-kernels", rows()), ("auto-round-lib", ark_rows())):
        start, stop = place(page, library)
        recorded, made = page[start:stop], table(found)
        if arguments == ["--record"]:
            page = page[:start] + made + page[stop:]
            continue
        print(f"{library}\n{made}")
        if recorded != made:
            print("\n".join(f"WORSE: {text}" for text in worse(recorded, made)))
            print(f"{PAGE.name} has another table of {library}: scripts/lanes/kernels --record")
            status = 1
    if arguments == ["--record"]:
        PAGE.write_text(page)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
