"""The end of .ci/run: a line for each lane, and what was skipped in it and why. Standard library only.

python3 .ci/table.py FOLDER SECONDS
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path


def results(file: Path) -> tuple[int, int, Counter[str]]:
    """(passed, failed, skips by reason) of all runs of pytest in a lane."""
    passed = failed = 0
    skipped: Counter[str] = Counter()
    for line in file.read_text().splitlines() if file.exists() else ():
        run = json.loads(line)
        passed += run["passed"]
        failed += run["failed"]
        skipped.update(run["skipped"])
    return passed, failed, skipped


def main() -> None:
    folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
    total, skips = Counter[str](), []
    print(f"\n{'lane':10}{'passed':>8}{'failed':>8}{'skipped':>9}{'minutes':>9}{'budget':>8}")
    for line in (folder / "lanes").read_text().splitlines():
        name, budget, took, result = line.split(maxsplit=3)
        passed, failed, skipped = results(folder / f"{name}.jsonl")
        total.update(passed=passed, failed=failed, skipped=skipped.total())
        late = "" if int(took) <= 60 * int(budget) else "  over its budget"
        print(
            f"{name:10}{passed:8}{failed:8}{skipped.total():9}{int(took) / 60:9.1f}{budget:>8}"
            f"{'' if result == 'passed' else '  ' + result}{late}"
        )
        skips += [f"{number:5}  {name:8} {reason}" for reason, number in skipped.most_common()]
    print(f"{'all':10}{total['passed']:8}{total['failed']:8}{total['skipped']:9}{seconds / 60:9.1f}{90:8}")
    print("\n" + "\n".join(["skipped, by lane and reason", *skips] if skips else ["nothing was skipped"]))
    print(f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")


main()
