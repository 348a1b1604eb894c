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
    "llmcompressor-llama-nvfp4a16": "nvfp4",
    "llmcompressor-llama-w8a8": "8-bit integers have no XPU kernel",
    "llmcompressor-llama-fp8-block-ragged": "fp8 blocks need K to be a multiple of 128, K=192",
    "llmcompressor-qwen3moe-w4a16-asym": "asymmetric experts have no XPU kernel",
    # Its README row says it converts, but its config quantizes every down_proj to 8 bits.
    "gptq/gptqmodel-qwen3moe-w4g64": "8-bit integers have no XPU kernel",
}
"""Checkpoints that must be refused → a part of the reason. The larger set's README names its own."""

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
        for name, verdict, note in re.findall(r"\| `([^`]+)` \| (\w+) \| ([^|]*)\|", readme.read_text()):
            if verdict in ("refused", "either"):
                expected.setdefault(name, "8-bit" if "8-bit" in note else "no XPU kernel")
    return expected


@cache
def oracles() -> dict[str, dict[str, dict[str, Any]]]:
    """What the producers' own libraries decode: see tests/fixtures/README.md."""
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads((FIXTURES / "oracles.json").read_text())
    return loaded
