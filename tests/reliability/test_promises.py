"""docs/reliability.md names a test for each promise: each of them exists, and none is lost when it is renamed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGES = (TESTS.parent / "docs" / "reliability.md").read_text()
PROMISES = [line for line in PAGES.partition("## How")[0].splitlines() if re.match(r"\| (?!promise|--)", line)]


def holds(file: str, names: list[str]) -> bool:
    """Whether a test file has a class or function, or one inside the other."""
    inside = ast.parse((TESTS / file).read_text()).body
    for name in names:
        found = [node for node in inside if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        if not found:
            return False
        inside = found[0].body
    return True


def test_every_promise_names_tests_that_exist() -> None:
    assert len(PROMISES) > 20
    for promise in PROMISES:
        named = re.findall(r"`(\w+/test_\w+\.py)((?:::\w+)+)`", promise)
        assert named, f"no test keeps: {promise}"
        for file, path in named:
            assert (TESTS / file).exists() and holds(file, path.split("::")[1:]), f"{file}{path} is gone: {promise}"


def test_the_lanes_run_all_of_them() -> None:
    lanes = (TESTS.parent / "scripts" / "lanes" / "trust").read_text()
    files = {file for promise in PROMISES for file in re.findall(r"`(\w+/test_\w+\.py)::", promise)}
    assert {file for file in files if f'"{file}"' not in lanes} == set()
