"""docs/commands.md is what the command line prints."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from xpuquant.conversion.cli.app import run

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_page_of_commands_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("COLUMNS", "80")
    commands = importlib.import_module("commands")
    try:
        assert commands.page() == commands.PAGE.read_text(), "python scripts/commands.py writes it again"
    finally:
        del sys.modules["commands"]


def test_no_command_is_described_in_half_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """In the list of all, on 80 columns, which the first sentence of each description has to fit."""
    assert run(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]
