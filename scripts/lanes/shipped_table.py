"""Operator × wheel × (executed here | reason), from the results of tests/kernels/test_shipped*.py.

usage: shipped_table.py RESULTS.xml PACKAGE-VERSION...

Exit status 1 where a test failed or was skipped, or an operator was not executed.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict

NOT_EXECUTED = {
    "int4_gemm_w4a16, int4_gemm_w4a8, fp8_gemm, fp8_gemm_w8a16, fp4_gemm": (
        "oneDNN makes GPU machine code when it is called; the wheel has no SPIR-V of it"
    ),
    "cutlass_grouped_gemm_interface before Xe2": "its kernels are given no scales: nothing quantized goes there",
    "topk_softmax and its like, attention, norms, rotary embeddings": "take no quantized layer",
}


def main() -> int:
    results, *wheels = sys.argv[1:]
    cells: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for case in ElementTree.parse(results).iter("testcase"):
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        cells[properties.get("operator") or "?"][properties.get("wheel") or "?"][outcome] += 1
    bad = False
    for operator, row in sorted(cells.items()):
        packages = {wheel.split("-")[0] for wheel in row}
        for wheel in (wheel for wheel in wheels if wheel.split("-")[0] in packages):
            count = row[wheel]
            good = count["passed"] and count.total() == count["passed"]
            bad |= not good
            outcome = f"executed, {count['passed']} tests" if good else f"WORSE: {dict(count) or 'not executed'}"
            print(f"{operator:46} {wheel:28} {outcome}")
    for operator, reason in NOT_EXECUTED.items():
        print(f"\nnot executed: {operator}\n    {reason}")
    return int(bad or not cells)


if __name__ == "__main__":
    sys.exit(main())
