"""The bytes of every conversion are those that were recorded: what is moved or made simpler changes none of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import all_checkpoints
from support.outputs import OPTIONS, outcome, recorded


@pytest.mark.parametrize("name", sorted(all_checkpoints()))
def test_bytes_are_those_recorded(name: str, tmp_path: Path) -> None:
    found = {
        key: outcome(all_checkpoints()[name], options, tmp_path / str(i))
        for i, (key, options) in enumerate(OPTIONS.items())
    }
    assert found == recorded()[name], "on purpose? Record them anew: see support/outputs.py"
