"""An OpenCL CPU device: build a SPIR-V module, launch its kernel over numpy arrays."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import tempfile
import threading
import warnings
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
            return f"{package} is not installed: pip install 'xpuquant[shipped]'"
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


def cache() -> Path:
    """Where built kernels are kept: $XPUQUANT_SHIPPED_CACHE, or a folder below the user's cache."""
    chosen = os.environ.get("XPUQUANT_SHIPPED_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "xpuquant" / "shipped"


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
        self._lock = threading.Lock()
        self._identity = f"{found[0].name} {found[0].driver_version}"

    def kernel(self, module: spirv.Module, name: str, source: str = "") -> Any:
        """A kernel, ready to be launched.

        Args:
            module: cut down to this kernel.
            name: its mangled name.
            source: OpenCL C that defines what the module imports.
        """
        data = module.write()
        key = hashlib.sha256(b"\0".join([data, source.encode(), self._identity.encode()])).hexdigest()
        cached = cache() / f"{key}.bin"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's notes on vectorization
            if cached.exists():
                program = self._cl.Program(self.context, self.context.devices, [cached.read_bytes()]).build()
            else:
                program = self._built(data, source)
                cached.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
                    file.write(program.binaries[0])
                Path(file.name).replace(cached)
        return self._cl.Kernel(program, name)

    def _built(self, data: bytes, source: str) -> Any:
        program = self._cl.Program(self.context, data)
        if not source:
            return program.build()
        parts = [program.compile(), self._cl.Program(self.context, source).compile("-cl-std=CL3.0")]
        return self._cl.link_program(self.context, parts)

    def launch(self, kernel: Any, arguments: list[Any], items: int, *groups: int) -> None:
        """Run a kernel and wait.

        Args:
            arguments: numpy arrays for pointers (read and written in place), None for a null pointer, numpy scalars for
                values, `local(bytes)` for local memory.
            items: work items to a work group, in the first dimension.
            groups: work groups in each dimension; SYCL numbers dimensions the other way round.
        """
        with self._lock:  # arguments belong to the kernel object
            for index, argument in enumerate(arguments):
                kernel.set_arg(index, self._cl.SVM(argument) if isinstance(argument, np.ndarray) else argument)
            self._cl.enqueue_nd_range_kernel(
                self.queue, kernel, (items * groups[0], *groups[1:]), (items, 1, 1)[: len(groups)]
            )
            self.queue.finish()

    def local(self, size: int) -> Any:
        """Local memory of `size` bytes, as an argument."""
        return self._cl.LocalMemory(size)


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros at an address that every vector load takes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    zeros: Array = raw[start : start + size].view(dtype).reshape(shape)
    return zeros


def placed(array: Array) -> Array:
    """A copy of an array at such an address."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy
