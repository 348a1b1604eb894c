"""An OpenCL CPU device: build a SPIR-V module, launch its kernel over numpy arrays."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from xpuquant.kernels.shipped import spirv

Array = np.ndarray[Any, Any]

# Vector loads of the kernels want more than numpy's 16 bytes.
_ALIGNMENT = 64
_DRIVER = "libintelocl.so"


def unavailable() -> str | None:
    """None where an OpenCL CPU device can be opened; otherwise what is missing and what to run."""
    for package in ("pyopencl", "intel-opencl-rt"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed: scripts/lanes/shipped makes an environment that has it"
    if driver() is None:
        return f"intel-opencl-rt has no {_DRIVER} here: it is made for Linux on x86-64"
    try:
        cpu()
    except Exception as error:
        return f"no OpenCL CPU device opens: {error}"
    return None


def driver() -> Path | None:
    """The OpenCL driver that the package intel-opencl-rt brings."""
    for file in importlib.metadata.files("intel-opencl-rt") or []:
        if file.name == _DRIVER:
            return Path(str(file.locate())).resolve()
    return None


@functools.cache
def cpu() -> Device:
    """The CPU device of intel-opencl-rt, opened once."""
    return Device()


class Device:
    """A context and a queue on the CPU; kernels read and write numpy arrays where they lie."""

    def __init__(self) -> None:
        path = driver()
        if path is None:
            raise OSError(f"{_DRIVER} not found")
        # Its own libraries lie beside it, in a folder that the loader does not search.
        for library in ("libimf.so", "libintlc.so.5", "libirng.so", "libsvml.so", "libtbb.so.12"):
            if (path.parent / library).exists():
                ctypes.CDLL(str(path.parent / library), mode=ctypes.RTLD_GLOBAL)
        folder = Path(tempfile.mkdtemp(prefix="xpuquant-icd-"))
        (folder / "intel-cpu.icd").write_text(f"{path}\n")
        os.environ.setdefault("OCL_ICD_VENDORS", str(folder))
        import pyopencl

        self._cl = pyopencl
        found = [d for p in pyopencl.get_platforms() for d in p.get_devices(pyopencl.device_type.CPU)]
        if not found:
            raise OSError(f"{path} offers no CPU device")
        self.context = pyopencl.Context(found[:1])
        self.queue = pyopencl.CommandQueue(self.context)
        self.name = found[0].name.strip()

    def kernel(self, module: spirv.Module, name: str, *linked: str) -> Any:
        """A kernel, ready to be launched.

        Args:
            module: cut down to this kernel.
            name: its mangled name.
            linked: OpenCL C sources that define what the module imports.
        """
        program = self._cl.Program(self.context, module.write())
        program.build()
        return self._cl.Kernel(program, name)

    def launch(self, kernel: Any, arguments: list[Any], group: int, groups: int) -> None:
        """Run a one-dimensional kernel and wait.

        Args:
            arguments: numpy arrays for pointers (read and written in place), None for a null pointer, numpy scalars for
                values, `local(bytes)` for local memory.
            group: work items to a work group.
            groups: work groups.
        """
        for index, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                argument = self._cl.SVM(argument)
            kernel.set_arg(index, argument)
        self._cl.enqueue_nd_range_kernel(self.queue, kernel, (group * groups,), (group,))
        self.queue.finish()

    def local(self, size: int) -> Any:
        """Local memory of `size` bytes, as an argument."""
        return self._cl.LocalMemory(size)


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros at an address that every vector load takes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def placed(array: Array) -> Array:
    """A copy of an array at such an address."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy
