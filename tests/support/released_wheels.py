"""Single files of released wheels, without the wheels: a wheel is a zip, and package indices answer ranges of bytes."""

from __future__ import annotations

import io
import json
import os
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from xpuquant.xpu_releases import PACKAGE, Release

_INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")


class _Remote(io.RawIOBase):
    """A file on a server, read where it is asked for."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.at = url, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        stop = self.size if size < 0 else min(self.at + size, self.size)
        if stop <= self.at:
            return b""
        wanted = urllib.request.Request(self.url, headers={"Range": f"bytes={self.at}-{stop - 1}"})
        with urllib.request.urlopen(wanted) as answer:
            data: bytes = answer.read()
        self.at += len(data)
        return data


def python_of(release: Release, folder: Path) -> Path:
    """The Python files of a release, in a folder below `folder`; skips the test where no index is in reach."""
    root = folder / release.version
    if root.exists():
        return root
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{_INDEX.rstrip('/')}/{PACKAGE}/", headers=accept)
        ) as answer:
            files = json.load(answer)["files"]
        (file,) = (one for one in files if one["hashes"].get("sha256") == release.sha256)
        with zipfile.ZipFile(_Remote(file["url"], file["size"])) as wheel:
            wheel.extractall(root, [name for name in wheel.namelist() if name.endswith(".py")])
    except urllib.error.URLError as error:
        pytest.skip(f"the package index is out of reach: {error.reason}")
    return root


def package_without_libraries(root: Path) -> dict[str, ModuleType]:
    """Modules under which the wheel's Python finds itself and, in place of its libraries, nothing."""
    package = ModuleType("vllm_xpu_kernels")
    package.__path__ = [str(root / "vllm_xpu_kernels")]
    libraries = {f"vllm_xpu_kernels.{name}": ModuleType(name) for name in ("_C", "_moe_C", "_xpu_C")}
    for name, module in libraries.items():
        setattr(package, name.rpartition(".")[2], module)
    return {"vllm_xpu_kernels": package, **libraries}
