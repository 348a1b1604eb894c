"""docs/reliability.md, docs/trust.md and SECURITY.md name a test for each promise: each of them exists, and none is
lost when it is renamed; so do the tables of docs/formats.md. The figures of README are those that the pages it links
to have."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
NAMED = re.compile(r"`(\w+/test_\w+\.py)((?:::\w+)+)`")


def rows(page: str) -> list[str]:
    """Rows of the tables of promises, without heads."""
    text = (ROOT / page).read_text().partition("## How")[0]
    return [line for line in text.splitlines() if re.match(r"\| (?!promise |found |--)", line)]


def numbered(page: str, heading: str) -> list[str]:
    """Items of the numbered list below a heading."""
    text = (ROOT / page).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.split(r"^(?=\d\. )", text, flags=re.MULTILINE)[1:]


PROMISES = {
    "docs/reliability.md": rows("docs/reliability.md"),
    "docs/trust.md": rows("docs/trust.md"),
    "SECURITY.md": numbered("SECURITY.md", "What is promised"),
}


def holds(file: str, names: list[str]) -> bool:
    """Whether a test file has a class or function, or one inside the other."""
    inside = ast.parse((TESTS / file).read_text()).body
    for name in names:
        found = [node for node in inside if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        if not found:
            return False
        inside = found[0].body
    return True


@pytest.mark.parametrize(("page", "fewest"), [("docs/reliability.md", 30), ("docs/trust.md", 25), ("SECURITY.md", 6)])
def test_every_promise_names_tests_that_exist(page: str, fewest: int) -> None:
    assert len(PROMISES[page]) >= fewest
    for promise in PROMISES[page]:
        assert NAMED.search(promise), f"no test keeps: {promise}"
    for file, path in NAMED.findall((ROOT / page).read_text()):
        assert (TESTS / file).exists() and holds(file, path.split("::")[1:]), f"{page}: {file}{path} is gone"


CITED = re.compile(r"`(?:(test_\w+)(?:::)?)?((?<=::)\w+…?|…\w+…?)?`")
"""`test_gptq`, `test_gptq::test_bits_come_from_the_shapes`, `test_mx::test_exponents…`; `…of_a_real_file…` is of the
file that was named last."""


def cited(page: str) -> list[tuple[str, str]]:
    """(file, name of a test as the page has it or nothing) of every test that last cells of a page's tables cite."""
    cells = [line.split(" | ")[-1] for line in (ROOT / page).read_text().splitlines() if line.startswith("|")]
    found, file = [], ""
    for match in CITED.finditer("\n".join(cells)):
        file = match[1] or file
        if match[1] or match[2]:
            found.append((file, match[2] or ""))
    return found


def test_the_tests_that_the_tables_of_formats_cite_exist() -> None:
    tests = cited("docs/formats.md")
    assert len(tests) >= 40 and sum("…" in name for _, name in tests) >= 10
    for file, name in tests:
        (path,) = TESTS.glob(f"*/{file}.py")
        names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        pattern = "".join(".*" if part == "…" else part for part in re.split("(…)", name))
        assert not name or any(re.fullmatch(pattern, one) for one in names), f"docs/formats.md: {file}::{name} is gone"


def test_the_lanes_run_all_of_them() -> None:
    lanes = (ROOT / "scripts" / "lanes" / "trust").read_text()
    files = {file for page in PROMISES for file, _ in NAMED.findall((ROOT / page).read_text())}
    assert {file for file in files if f'"{file}"' not in lanes} == set()


def measured(what: str) -> list[str]:
    """Rows of the table of docs/performance.md whose first cell ends so, of conversions to the XPU layout."""
    text = (ROOT / "docs" / "performance.md").read_text()
    found = [line for line in text.splitlines() if re.match(rf"\| \w+ → xpu, {re.escape(what)} \|", line)]
    assert len(found) == 8
    return found


def number(row: str, unit: str) -> float:
    match = re.search(rf"([\d,.]+) {re.escape(unit)}", row)
    assert match is not None, row
    return float(match[1].replace(",", ""))


def test_the_figures_of_the_readme_are_those_of_the_pages() -> None:
    readme = (ROOT / "README.md").read_text()
    checked = measured("verified")
    seconds = [1 / number(row, "GB/s") for row in checked]
    times = [number(row, "× durable copy") for row in checked]
    peak = max(number(row, "MiB") for row in measured("peak memory"))
    assert f"{min(seconds):.1f} to {max(seconds):.1f} s per GB written" in readme
    assert f"{min(times):.1f} to {max(times):.1f} times a durable copy" in readme
    assert f"at most {peak:.0f} MiB there" in readme
    loading = (ROOT / "docs" / "performance.md").read_text().partition("\n## Loading\n")[2]
    rows = [
        re.findall(r"[\d.]+", figures)
        for figures in re.findall(r"^\|[^|]*\| (?:stock|converted) \|(.*)$", loading, re.MULTILINE)
    ]
    (_, experts, experts_mb, _), (_, few, few_mb, _) = rows[2:4]
    stock, mine = (
        re.findall(r"[\d.]+", figures)
        for figures in re.findall(r"^\| (?:stock|converted) \|(.*)$", loading, re.MULTILINE)
    )
    assert f"dense {mine[0]} s of processor time and {mine[1]} MB, stock {stock[0]} s and {stock[1]} MB" in readme
    assert f"experts {few} s and {few_mb} MB, stock {experts} s and {int(experts_mb):,} MB" in readme
    figures = (ROOT / "docs" / "reliability.md").read_text().partition("\n## Figures\n")[2]
    outcomes = re.search(r"\| 20,000: ([\d,]+) verified exact outputs, ([\d,]+) refused .*, ([\d,]+) damaged", figures)
    assert outcomes is not None
    exact, *refused = (int(text.replace(",", "")) for text in outcomes.groups())
    assert (
        f"20,000: {exact:,} verified exact outputs, {sum(refused):,} refusals" in readme
        and exact + sum(refused) == 20_000
    )
    bits = re.search(r"bits flipped, all found; .*?\| ([\d,]+);", figures)
    assert bits is not None and f"{bits[1]} of {bits[1]} found" in readme
