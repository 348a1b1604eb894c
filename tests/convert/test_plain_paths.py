"""What Linux has and macOS or another C library may not: without it the same bytes, by the plain way.

There is no such system here. All of it is taken away at the boundary, before the package is imported, in a process of
its own: the names of `os` that other systems' Python does not have, and the functions that glibc exports.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "fixtures" / "gptqmodel-qwen3moe-w4g32"
OS = (
    "O_DIRECT",
    "O_PATH",
    "preadv",
    "pwritev",
    "sched_getaffinity",
    "sched_setaffinity",
    "posix_fallocate",
    "posix_fadvise",
)
"""Not in Python's `os` on macOS, or not in every release."""
GLIBC = ("mallopt", "sync_file_range")

PROGRAM = """
import ctypes, os, sys
gone = sys.argv[1].split(",")
for name in gone:
    if hasattr(os, name):
        delattr(os, name)

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name in gone and self._name is None:
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library
from xpuquant.conversion.cli.app import run
source, out = sys.argv[2:]
for arguments in (["convert", source, out], ["verify", out, "--source", source]):
    code = run(arguments)
    if code:
        sys.exit(code)
"""


def converted(out: Path, gone: tuple[str, ...]) -> dict[str, str]:
    """File → digest of a conversion that passed, and was verified again, without these."""
    subprocess.run([sys.executable, "-P", "-c", PROGRAM, ",".join(gone), str(SOURCE), str(out)], check=True)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


def test_the_same_bytes_without(tmp_path: Path) -> None:
    assert converted(tmp_path / "plain", (*OS, *GLIBC)) == converted(tmp_path / "usual", ())


def test_they_are_what_linux_has() -> None:
    """A name that no Linux has would make the test above say nothing."""
    if sys.platform == "linux":
        assert all(hasattr(os, name) for name in OS)
