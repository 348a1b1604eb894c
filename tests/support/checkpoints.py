"""The real checkpoints the tests run on: those of tests/fixtures, and a larger set where it is present."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
FIXTURES = TESTS / "fixtures"
LARGER = Path(os.environ.get("XPUQUANT_CHECKPOINTS", ROOT.parent / "shared" / "checkpoints"))

REFUSED = {
    "llmcompressor-llama-fp8-block-ragged": "fp8 blocks need K to be a multiple of 128, K=192",
}
"""Checkpoints that must be refused → a part of the reason. The larger set's README names its own."""

LAID_OUT = {
    "gptq/gptqmodel-qwen3moe-w4g64",
    "gptq/gptqmodel-qwen3-w8g64-asym",
    "autoround/qwen3-mixed-bits",
    "compressed-tensors/llama-w8a8",
    "compressed-tensors/llama-nvfp4a16",
    "autoround/qwen3-nvfp4",
}
"""Those of the larger set that 0.1.0 refused for want of a kernel, and that convert since."""

SPOILT = {"autoround-0.15-qwen3-w3g32-asym-v1": "spoils the neighbours of a zero point of 0"}
"""Checkpoints whose producer lost information: refused whatever the options → a part of the reason."""


@cache
def all_checkpoints() -> dict[str, Path]:
    """Name → folder; names of the larger set have a slash."""
    found = {path.parent.name: path.parent for path in sorted(FIXTURES.glob("*/config.json"))}
    if LARGER.is_dir():
        found |= {
            f"{path.parent.parent.name}/{path.parent.name}": path.parent
            for path in sorted(LARGER.glob("*/*/config.json"))
        }
    return found


@cache
def refused() -> dict[str, str]:
    """Name → expected part of the refusal."""
    expected = dict(REFUSED)
    readme = LARGER / "README.md"
    if readme.exists():
        for name, verdict in re.findall(r"\| `([^`]+)` \| (\w+) \|", readme.read_text()):
            if verdict == "refused" or (verdict == "either" and name not in LAID_OUT):
                expected.setdefault(name, "no XPU kernel")
    return expected


@cache
def oracles() -> dict[str, dict[str, dict[str, Any]]]:
    """What the producers' own libraries decode: see tests/fixtures/README.md."""
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads((FIXTURES / "oracles.json").read_text())
    return loaded
