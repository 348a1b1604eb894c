"""Which skips a lane of CI must not have: those that hide a whole library that the lane is there to run.

Every skip is listed with its reason at the end of a run, and of .ci/run. One of these, in its lane, is a failure
besides: an environment that was made wrong would otherwise be green. In any other run nothing here matters.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

LANE = os.environ.get("XPUQUANT_LANE")
"""The lane of .ci/run that this is; None elsewhere."""

_MISSING = r"(?i).*(is not installed|does not load|could not import|no module named)"
TORCH = "(?i)(torch is not installed|could not import '(torch|transformers|safetensors.torch))"
ONEDNN = "(?i)onednn (is not installed|does not load)"
ARK = "(No module named 'auto_round_kernel'|auto-round-lib)"
OTHERS = "could not import '(ray|compressed_tensors)"
WHEEL = "no wheel can be built here"

NEVER: dict[str, tuple[str, ...]] = {
    "test": (TORCH, ONEDNN, ARK, OTHERS, WHEEL),
    "isa": (TORCH, ONEDNN, ARK),
    "newest": (TORCH, ONEDNN, ARK),
    "oldest": ("torch is not installed", "could not import 'torch"),
    "ipex": (".",),  # any skip: there is nothing else in it
    "hub": (".*huggingface_hub",),
    "vllm": (_MISSING,),
    "served": (_MISSING,),
}
"""Lane → what the beginning of a reason must not match.

In no lane's list: an Intel GPU with vllm-xpu-kernels, which CI has not (its calls are checked against stand-ins); the
released device code, which scripts/lanes/shipped runs by hand, for its wheels are gigabytes; a browser."""


def forbidden(reasons: Counter[str]) -> list[str]:
    """The reasons that this lane must not have."""
    return [reason for reason in reasons if any(re.match(rule, reason) for rule in NEVER.get(LANE or "", ()))]


def record(passed: int, failed: int, skipped: Counter[str]) -> None:
    """A line for .ci/table.py."""
    if file := os.environ.get("XPUQUANT_LANE_RESULTS"):
        with Path(file).open("a") as out:
            out.write(json.dumps({"passed": passed, "failed": failed, "skipped": skipped}) + "\n")
