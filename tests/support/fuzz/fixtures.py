"""Where cases are played: for the tests that scripts/lanes/trust runs by the thousand."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.fuzz.places import Prepared


@contextmanager
def folder_in_memory(otherwise: Path | None) -> Iterator[Path]:
    """A folder in memory where that is possible, so that fsync costs nothing; else below the given one."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="xpuquant-", dir=memory if os.access(memory, os.W_OK) else otherwise))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible."""
    with folder_in_memory(tmp_path) as folder:
        yield folder


@pytest.fixture(scope="module")
def prepared() -> Iterator[Prepared]:
    """A source, its output and a stopped one, in memory where that is possible."""
    with folder_in_memory(None) as folder:
        yield Prepared(folder)
