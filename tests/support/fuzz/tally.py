"""What the lanes of scripts/lanes/trust did, counted: a JSON line per event, in the file XPUQUANT_TRUST_TALLY names."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path


def count(what: str, number: int = 1) -> None:
    """Note that something was done `number` times. Nothing is noted outside scripts/lanes/trust."""
    path = os.environ.get("XPUQUANT_TRUST_TALLY")
    if path and number:
        with Path(path).open("a") as file:
            file.write(json.dumps([what, number]) + "\n")


def total(path: Path) -> Counter[str]:
    """The sums."""
    sums: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        what, number = json.loads(line)
        sums[what] += number
    return sums
