"""The table of docs/kernels.md is the one that is made; what gets worse is named."""

from __future__ import annotations

import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "lanes" / "kernel_table.py"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = util.spec_from_file_location("kernel_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr


def test_what_gets_worse_is_named(made: ModuleType) -> None:
    table = made.table()
    assert not made.worse(table, table)
    unexecuted = table.replace("executed", "checked")
    assert len(made.worse(table, unexecuted)) == table.count("executed") and not made.worse(unexecuted, table)
    without = "".join(line for line in table.splitlines(keepends=True) if "`fp4_gemm`" not in line)
    assert all("`fp4_gemm`" in text and text.endswith("now gone") for text in made.worse(table, without))


def test_every_layout_of_ours_and_every_release_is_in_it(made: ModuleType) -> None:
    cells = {(layout, operator): by_version for layout, operator, by_version in made.rows()}
    assert cells["int4_experts", "cutlass_grouped_gemm_interface"]["0.1.15.4"] == "executed"
    assert cells["int4_experts", "cutlass_grouped_gemm_interface"]["0.1.14.1"] == "reads a counter that nothing has set"
    assert cells["mxfp4_linear", "fp4_gemm"]["0.1.3.1"] == "absent"
    assert cells["fp8_linear, block", "fp8_gemm"]["0.1.15.4"] == "checked"
    assert {len(by_version) for by_version in cells.values()} == {12}
