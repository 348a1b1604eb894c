"""README's row of conversions, of the table's lines; `tests/reliability/test_promises.py` holds one to the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.measure import Line

_ROW = re.compile(r"^\| convert and verify \|.*\n\| memory \|[^|]*\|", re.MULTILINE)
_NUMBERS = {6: "six", 7: "seven", 8: "eight", 9: "nine"}


def renew(readme: Path, lines: Sequence[Line], conditions: str) -> None:
    """Put the figures of every format into README.

    Args:
        lines: of a whole run.
        conditions: the machine, the version and the day.
    """
    text = readme.read_text()
    assert _ROW.search(text), f"{readme} has no row of conversions"
    row = f"{_row(lines, conditions)}\n| memory | {_memory(lines)} |"
    readme.write_text(_ROW.sub(lambda _: row, text))


def _row(lines: Sequence[Line], conditions: str) -> str:
    checked = [line for line in lines if line.what.endswith("→ xpu, verified")]
    seconds = [1 / float(_found(r"([\d.]+) GB/s", line.detail)) for line in checked]
    written = [float(_found(r" to ([\d.]+) GB:", line.detail)) for line in checked]
    # As the table shows them.
    ratios = [float(f"{line.figure:.2f}") for line in checked]
    figures = f"{_range(seconds)} s per GB written, {_range(ratios)} times a durable copy of that (`cp` and `sync`)"
    count = _NUMBERS.get(len(checked), str(len(checked)))
    where = f"{count} formats, {_range(written)} GB, source in the page cache, {conditions}"
    links = "`scripts/bench/convert.py`, [performance](docs/performance.md)"
    return f"| convert and verify | {figures} | {where}: {links} |"


def _memory(lines: Sequence[Line]) -> str:
    peak = max(line.figure for line in lines if line.what.endswith("→ xpu, peak memory"))
    return f"at most {peak:.0f} MiB there; it does not grow with the model"


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.1f}", f"{max(values):.1f}"
    return least if least == most else f"{least} to {most}"
