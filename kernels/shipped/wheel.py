"""Finding kernels in a released wheel."""

from __future__ import annotations

import functools
import os
import shlex
import sys
import zipfile
from pathlib import Path

from xpuquant.kernels.shipped import spirv


class Wheel:
    """A wheel file, and the SPIR-V modules of its libraries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = path.name.split("-")[1]
        self._libraries: dict[str, dict[str, bytes]] = {}

    def __repr__(self) -> str:
        return "-".join(self.path.name.split("-")[:2])

    def kernels(self, library: str) -> dict[str, bytes]:
        """Mangled name → module of every kernel of a library, which is named by its file up to the first dot."""
        if library not in self._libraries:
            self._libraries[library] = self._read(library)
        return self._libraries[library]

    def _read(self, library: str) -> dict[str, bytes]:
        with zipfile.ZipFile(self.path) as archive:
            names = [n for n in archive.namelist() if n.split("/")[-1].split(".")[0] == library and n.endswith(".so")]
            if not names:
                raise KeyError(f"{self.path.name} has no library {library}")
            data = archive.read(names[0])
        found: dict[str, bytes] = {}
        for start, stop in spirv.find(data):
            module = data[start:stop]
            for name in spirv.entry_names(module):
                found[name] = module
        return found

    def named(self, library: str, *parts: str) -> str:
        """The one kernel whose mangled name contains all `parts`. Raise KeyError where there is none, or more."""
        fitting = [name for name in self.kernels(library) if all(part in name for part in parts)]
        if len(fitting) != 1:
            raise KeyError(f"{len(fitting)} kernels of {library} {self.version} are named {' … '.join(parts)}")
        return fitting[0]

    @functools.cache  # noqa: B019 - as long-lived as the wheel
    def module(self, library: str, kernel: str) -> spirv.Module:
        """The module of a kernel, cut down to it."""
        return spirv.Module.read(self.kernels(library)[kernel]).only(kernel)


def missing(requirement: str) -> str:
    """That there is no wheel of a package, and how to get one.

    Args:
        requirement: name of the package, then which of its releases.
    """
    package = requirement.partition("<")[0]
    command = shlex.join(["pip", "download", "--no-deps", "-d", str(folder()), requirement])
    return f"no wheel of {package} in {folder()}: {command}"


def folder() -> Path:
    """Where downloaded wheels lie: $XPUQUANT_SHIPPED_WHEELS, or `wheels` in the environment's own folder."""
    return Path(os.environ.get("XPUQUANT_SHIPPED_WHEELS") or Path(sys.prefix) / "wheels")


@functools.cache
def found(package: str = "vllm_xpu_kernels") -> tuple[Wheel, ...]:
    """The wheels of a package in `folder`, oldest version first."""
    wheels = [Wheel(path) for path in folder().glob(f"{package}-*.whl")]
    return tuple(sorted(wheels, key=lambda wheel: [int(part) for part in wheel.version.split(".")]))
