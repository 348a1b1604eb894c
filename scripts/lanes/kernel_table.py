"""Layout × operator × release of vllm-xpu-kernels: what stands behind each call; compared with docs/kernels.md.

    kernel_table.py            print the table; exit status 1 where the page has another, with the cells that are worse
    kernel_table.py --record   write it to the page

executed    the operator's device code out of that wheel was run on a CPU, over stored bytes: `scripts/lanes/shipped`,
            which fails where one no longer is
checked     the call is held to the schema and to the checks of that release, by stand-ins that read memory as it does
otherwise   the reason why neither
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from xpuquant.formats.layouts import layouts_by_name
from xpuquant.formats.scheme import Scheme
from xpuquant.xpu_releases import FAULTS, Release, operators_of, releases

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- by scripts/lanes/kernels --record -->\n", "<!-- end -->\n"
EXECUTED = {
    "remap_hidden_states",
    "cutlass_grouped_gemm_interface",
    "moe_gather",
    "per_token_group_fp8_quant",
    "per_token_group_quant_mxfp4",
}
"""Those of the operators that layouts need which `scripts/lanes/shipped` executes, out of the wheels below."""
WHEELS = ("0.1.15.4", "0.1.16.2")
_RANKS = {"executed": 2, "checked": 1}


def cell(operator: str, release: Release) -> str:
    if operator not in release.operators:
        return "absent"
    if release.operators[operator] != releases()[-1].operators[operator]:
        return "other arguments"
    if not release.is_served:
        mine = [fault for fault in FAULTS if fault.operator == operator and fault.in_release(release)]
        wrong = [fault.text for fault in mine if fault.answer == "not served"]
        return wrong[0] if wrong else "not served"
    return "executed" if operator in EXECUTED and release.version in WHEELS else "checked"


def rows() -> list[tuple[str, str, dict[str, str]]]:
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


def table() -> str:
    """As Markdown; releases that agree in every cell share a column."""
    found = rows()

    def column(release: Release) -> tuple[str, ...]:
        return tuple(cells[release.version] for _, _, cells in found)

    columns = [[release.version for release in group] for _, group in groupby(releases(), column)]
    heads = [group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in columns]
    lines = [["layout", "operator", *heads], ["---"] * (2 + len(heads))]
    lines += [[label, f"`{operator}`", *(cells[group[0]] for group in columns)] for label, operator, cells in found]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def on_page(text: str) -> str:
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


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


def main() -> int:
    page, made = PAGE.read_text(), table()
    recorded = on_page(page)
    if sys.argv[1:] == ["--record"]:
        PAGE.write_text(page.replace(BEGIN + recorded, BEGIN + made))
        return 0
    print(made)
    if recorded == made:
        return 0
    print("\n".join(f"WORSE: {text}" for text in worse(recorded, made)))
    print(f"{PAGE.name} has another table: scripts/lanes/kernels --record")
    return 1


if __name__ == "__main__":
    sys.exit(main())
