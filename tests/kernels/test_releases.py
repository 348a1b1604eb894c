"""The tables of docs/kernels.md are those that are made; what gets worse is named."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

from xpuquant.formats.scheme import ARK_LAYOUTS

SCRIPT = Path(__file__).parents[2] / "scripts" / "lanes" / "kernel_table.py"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = util.spec_from_file_location("kernel_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stdout + done.stderr


def test_what_gets_worse_is_named(made: ModuleType) -> None:
    for table in (made.table(made.rows()), made.table(made.ark_rows())):
        assert not made.worse(table, table)
        unexecuted = table.replace("widening executed", "checked").replace("executed", "checked")
        assert len(made.worse(table, unexecuted)) == table.count("executed") and not made.worse(unexecuted, table)
    table = made.table(made.rows())
    without = "".join(line for line in table.splitlines(keepends=True) if "`fp4_gemm`" not in line)
    assert all("`fp4_gemm`" in text and text.endswith("now gone") for text in made.worse(table, without))


def test_what_is_no_longer_executed_fails(
    made: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operators are those of the lane that executes them: one left out there is a worse cell here."""
    monkeypatch.setattr(made, "EXECUTED", made.EXECUTED - {"moe_gather"})
    monkeypatch.setitem(made.MARKS, "auto_round_lib", ("ARK: experts widened for prefill",))
    assert made.main([]) == 1
    said = capsys.readouterr().out
    assert "WORSE: int4_experts `moe_gather` 0.1.15.4: executed, now checked" in said
    assert "WORSE: uint4_experts `moe_gemm_decode` 0.16.0: executed, now checked" in said
    assert "fp4_gemm" not in said.partition("WORSE")[2]


def test_every_layout_of_ours_and_every_release_is_in_it(made: ModuleType) -> None:
    cells = {(layout, operator): by_version for layout, operator, by_version in made.rows()}
    assert cells["int4_experts", "cutlass_grouped_gemm_interface"]["0.1.15.4"] == "executed"
    assert cells["int4_experts", "cutlass_grouped_gemm_interface"]["0.1.14.1"] == "reads a counter that nothing has set"
    assert cells["mxfp4_linear", "fp4_gemm"]["0.1.3.1"] == "absent"
    assert cells["fp8_linear, block", "fp8_gemm"]["0.1.15.4"] == "checked"
    assert {len(by_version) for by_version in cells.values()} == {12}
    ark = {(layout, operator): by_version for layout, operator, by_version in made.ark_rows()}
    assert {layout for layout, _ in ark} == set(ARK_LAYOUTS)
    assert ark["uint4_experts", "moe_gemm_decode"]["0.16.0"] == "executed"
    assert ark["uint4_experts", "moe_gemm_decode"]["0.15.0"].startswith("refuses rows of other ranks' experts")
    assert (
        ark["int8_experts", "moe_gemm_decode"] | {"0.14.2": "absent", "0.16.0": "checked"}
        == ark["int8_experts", "moe_gemm_decode"]
    )
