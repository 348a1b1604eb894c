"""Operator × wheel × (executed here | reason), from the results of tests/kernels/test_shipped*.py.

usage: shipped_table.py RESULTS.xml PACKAGE-VERSION...

Exit status 1 where a test failed or was skipped, or an operator was not executed.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict

EXECUTED = {
    "vllm_xpu_kernels": (
        "all of XpuFusedMoe",
        "cutlass_grouped_gemm_interface (Xe2)",
        "per_token_group_fp8_quant",
        "per_token_group_quant_mxfp4",
        "per_token_group_quant_mxfp4 and _fp8_quant",
        "relu2_no_mul",
        "remap_hidden_states, moe_gather",
        "reorder_mxfp_scales",
        "silu, gelu, gelu_tanh, swigluoai _and_mul",
        "swiglustep_and_mul",
    ),
    "auto_round_lib": ("ARK: experts widened for prefill", "ARK: moe_gemm_decode, int4"),
}
"""What has been executed once must go on being executed: package → the tests' `operator` marks."""

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
    for wheel in wheels:
        for operator in EXECUTED[wheel.split("-")[0]]:
            count = cells[operator][wheel]
            good = count["passed"] and count.total() == count["passed"]
            bad |= not good
            outcome = f"executed, {count['passed']} tests" if good else f"WORSE: {dict(count) or 'not executed'}"
            print(f"{wheel:28} {operator:46} {outcome}")
    for operator in cells.keys() - {name for names in EXECUTED.values() for name in names}:
        bad = True
        print(f"{operator} is not in the list of this script")
    for operator, reason in NOT_EXECUTED.items():
        print(f"\nnot executed: {operator}\n    {reason}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
