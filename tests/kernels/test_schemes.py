"""docs/schemes.md is made from the registries and the tests' own cases, and leaves nothing out."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

import support.layers as by_hand
from support.models import EXPERTS, SCHEMES

from xpuquant.formats.layouts import layouts_by_name
from xpuquant.formats.scheme import ARK_LAYOUTS
from xpuquant.kernels import backends

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "lanes" / "scheme_table.py"


@pytest.fixture(scope="module")
def made() -> Iterator[ModuleType]:
    before = list(sys.path)
    spec = util.spec_from_file_location("scheme_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_the_page_has_the_tables(made: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert made.main([]) == 0, capsys.readouterr().out


def test_every_layout_and_scheme_has_a_row(made: ModuleType) -> None:
    rows = [scheme for row in made.ROWS for _, scheme in made.schemes_of(row)]
    kinds = [made.kind(scheme) for scheme in rows]
    assert len(kinds) == len(set(kinds)), "two rows of one kind"
    assert {scheme.layout for scheme in rows} == set(layouts_by_name("xpu"))
    assert {made.kind(scheme) for scheme in (*SCHEMES.values(), *EXPERTS.values())} == set(kinds)
    assert {made.kind(layer.scheme) for case in by_hand.CASES for layer, _ in by_hand.layers(case)} <= set(kinds)
    assert made.converted().keys() <= set(kinds)


def test_every_row_was_computed_and_served_from_a_release_on(made: ModuleType) -> None:
    for row in made.ROWS:
        for of, scheme in made.schemes_of(row):
            libraries = made.libraries(scheme)
            assert "None" not in libraries and ("auto-round-lib" in libraries) == (scheme.layout in ARK_LAYOUTS)
            assert made.under_transformers(scheme), (row.scheme, of)
            ranks = made.under_vllm(scheme)
            assert ranks["1"] and ranks["TP 2"] and (of == "linear" or ranks["EP 2"]), (row.scheme, of)


def test_what_is_said_to_run_on_a_cpu_is_not_refused_there(made: ModuleType) -> None:
    """In float32, which every processor has."""
    for name in ("onednn", "ark"):
        backend = backends()[name]
        if backend.unavailable() is not None:
            continue
        said = {
            case for row in made.ROWS for _, scheme in made.schemes_of(row) for case in made.by_library(scheme, name)
        }
        assert said
        for case in (case.removeprefix(f"{name}-") for case in said):
            layer, _ = next(by_hand.layers(case))
            assert backend.refuses(layer.scheme, layer.N, layer.K, "F32") is None, case


def test_every_refusal_has_a_row_and_a_test_of_its_message(made: ModuleType) -> None:
    assert made.messages() == set(made.REFUSED.values())
    assert [said for said in made.REFUSED.values() if made.test_of(said) is None] == []


def test_experts_without_a_gate_were_computed_in_every_kind(made: ModuleType) -> None:
    experts = [scheme for row in made.ROWS for of, scheme in made.schemes_of(row) if of == "experts"]
    assert " ".join(made.gateless()).count(f"{len(experts)} of {len(experts)} kinds") == 2


def test_tests_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "schemes.md").read_text()))
    assert len(named) > 10
    for file, function in named:
        tree = ast.parse((ROOT / file).read_text())
        assert not function or function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, file


def test_a_case_that_is_gone_takes_its_entry_with_it(made: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    table = made.main_table()
    module = sys.modules["test_parallel"]
    for name in list(module.CASES)[:2]:
        others = {other: case for other, case in module.CASES.items() if other != name}
        with monkeypatch.context() as patched:
            patched.setattr(module, "CASES", others)
            assert made.main_table() != table, name


def test_no_other_page_says_that_something_has_no_kernel() -> None:
    """Reasons change: they stand in one table, which is made."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if page.name not in ("schemes.md", "commands.md"):
            assert "no XPU kernel" not in page.read_text(), page.name
