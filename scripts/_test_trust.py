"""The lanes of scripts/test-trust and their table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.fuzz.tally import total  # noqa: E402

LANES: dict[str, tuple[list[str], dict[str, str]]] = {
    "hostile": (
        [
            "reliability/test_hostile.py",
            "formats/test_safetensors.py",
            "formats/test_patterns.py",
            "convert/test_repo_files.py",
        ],
        {"XPUQUANT_TRUST_VALUES": "20", "XPUQUANT_TRUST_TENSORS": "1000000"},
    ),
    "fuzz": (["reliability/test_fuzz.py"], {"XPUQUANT_TRUST_CASES": os.environ.get("XPUQUANT_TRUST_CASES", "20000")}),
    "faults": (["reliability/test_faults.py", "convert/test_convert.py"], {"XPUQUANT_TRUST_ROUNDS": "25"}),
    "integrity": (
        ["convert/test_integrity.py", "reliability/test_injected_faults.py", "convert/test_kernel_agreement.py"],
        {"XPUQUANT_TRUST_PLACES": "2000", "XPUQUANT_TRUST_ROUNDS": "25"},
    ),
    "supply": (["reliability/test_supply_chain.py", "reliability/test_promises.py"], {}),
}
"""Lane → test files, and what makes them longer than in the default suite."""


def main(chosen: list[str]) -> int:
    unknown = set(chosen) - set(LANES)
    if unknown:
        print(f"error: no lane {', '.join(sorted(unknown))}; lanes: {', '.join(LANES)}", file=sys.stderr)
        return 2
    workers = os.environ.get("XPUQUANT_TEST_WORKERS", "2")
    rows: list[tuple[str, str]] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally"
        tally.touch()
        for lane in chosen or LANES:
            files, longer = LANES[lane]
            began = time.monotonic()
            print(f"{lane}: {' '.join(files)}", flush=True)
            process = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "-n",
                    workers,
                    "--dist",
                    "worksteal",
                    "-p",
                    "no:cacheprovider",
                    *(f"tests/{name}" for name in files),
                ],
                cwd=ROOT,
                env=os.environ | longer | {"XPUQUANT_TRUST_TALLY": str(tally)},
                text=True,
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            passed, bad, skipped = (_number(process.stdout, word) for word in ("passed", "failed|error", "skipped"))
            if process.returncode:
                failed += max(bad, 1)
                print(process.stdout, flush=True)
            rows.append((f"{lane}: tests passed, failed, skipped", f"{passed}, {bad}, {skipped}"))
            rows.append((f"{lane}: minutes", f"{(time.monotonic() - began) / 60:.1f}"))
        sums = total(tally)
    rows += [(what, f"{number:,}") for what, number in sorted(sums.items())]
    rows.append(("fuzz: cases in all", f"{sum(n for what, n in sums.items() if _is_verdict(what)):,}"))
    rows.append(("tracebacks, internal errors, third outcomes", f"{failed}"))
    width = max(len(what) for what, _ in rows)
    for what, figure in rows:
        print(f"{what:<{width}}  {figure:>16}")
    return 1 if failed else 0


def _number(output: str, word: str) -> int:
    found = re.findall(rf"(\d+) (?:{word})", output.strip().rpartition("\n")[2])
    return int(found[0]) if found else 0


def _is_verdict(what: str) -> bool:
    return what.startswith("fuzz: ") and "guard" not in what


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
