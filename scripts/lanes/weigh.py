"""What the lean install weighs and took, package by package, and whether docs/dependencies.md says so.

python scripts/lanes/weigh.py SECONDS      in the environment that is weighed
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dependencies.md"
NOT_OURS = ("pip", "setuptools")
"""What `python -m venv` puts into an environment itself."""


def weights() -> dict[str, float]:
    """Package → the megabytes of its files, byte code included, heaviest first."""
    found = {}
    for each in distributions():
        files = [Path(str(file.locate())) for file in each.files or ()]
        found[each.name] = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def main() -> int:
    took, found = float(sys.argv[1]), weights()
    ours = {name: weight for name, weight in found.items() if name not in NOT_OURS}
    for name, weight in list(ours.items())[:12]:
        print(f"{weight:8.1f} MB  {name}")
    rest = list(ours.values())[12:]
    total = sum(ours.values())
    print(f"{sum(rest):8.1f} MB  {len(rest)} others")
    print(f"{total:8.1f} MB  in {took:.0f} s")
    said = re.search(r"lean install: at most (\d+) MB, (\d+) seconds", PAGE.read_text())
    assert said is not None, f"{PAGE.name} has no line about the lean install"
    if took > int(said[2]):  # no failure: a busy machine is slower
        print(f"note: {PAGE.name} says at most {said[2]} seconds")
    if total > int(said[1]):
        print(f"error: {PAGE.name} promises at most {said[1]} MB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
