"""Which tests may be skipped in which lane of CI, by the reason that they give. In any other run nothing here matters.

A skip hides what it skips. So in CI every skip must be foreseen: it is for what the lane is not for, and below stands
where that is run, or why nowhere.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

LANE = os.environ.get("XPUQUANT_LANE")
"""The lane of .ci/run that this is; None elsewhere."""

ANYWHERE = (
    "needs an Intel GPU and vllm-xpu-kernels",  # nowhere: CI has none. Its calls are checked against stand-ins
    "there is an XPU here",
    "the other transport's endpoint",  # half of a matrix that does not exist
    "no producer's library was asked about this checkpoint",
    "refused",  # of a matrix of layouts and dtypes: refusals have tests of their own
    "no Chromium here",  # browsers are looked at by hand, before a release
    "the package index is out of reach",
    "only when every fault has been injected in this process",  # pytest-xdist spreads them
    "this file system keeps files in memory",
    "the file system has no sparse files",
    "mounting needs root",
)
IPEX = ("intel-extension-for-pytorch is not installed",)  # lane ipex
SHIPPED = ("pyopencl is not installed", "no .* wheel in")  # lane shipped, by hand: its wheels are gigabytes
TORCH = (
    "torch is not installed",
    "could not import 'torch'",
    "could not import 'transformers'",
    "could not import 'safetensors.torch'",
)
ONEDNN = ("(?i)onednn is not installed",)
ARK = ("No module named 'auto_round_kernel'",)
OTHERS = ("could not import 'ray'", "could not import 'compressed_tensors'")

ALLOWED: dict[str, tuple[str, ...]] = {
    "test": (*ANYWHERE, *IPEX, *SHIPPED),
    "isa": (*ANYWHERE, *IPEX, *SHIPPED),
    "newest": (*ANYWHERE, *IPEX, *SHIPPED),
    "oldest": (*ANYWHERE, *SHIPPED, *ONEDNN, *ARK, *OTHERS),
    "lean": (*ANYWHERE, *IPEX, *SHIPPED, *TORCH, *ONEDNN, *ARK, *OTHERS),
    "ipex": (),
    "hub": ANYWHERE,
    "vllm": ANYWHERE,
}
"""Lane → patterns that the beginning of a reason must match."""


def unforeseen(reasons: Counter[str]) -> list[str]:
    """The reasons that this lane has no rule for."""
    rules = ALLOWED.get(LANE or "")
    return [] if rules is None else [reason for reason in reasons if not any(re.match(rule, reason) for rule in rules)]


def record(passed: int, failed: int, skipped: Counter[str]) -> None:
    """A line for .ci/table.py."""
    if file := os.environ.get("XPUQUANT_LANE_RESULTS"):
        with Path(file).open("a") as out:
            out.write(json.dumps({"passed": passed, "failed": failed, "skipped": skipped}) + "\n")
