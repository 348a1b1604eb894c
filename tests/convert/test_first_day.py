"""Every line on which a first-time user stumbled does what `scripts/first-day` says of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "first-day"


@pytest.mark.slow
def test_every_line_does_what_it_says() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), sys.executable], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
