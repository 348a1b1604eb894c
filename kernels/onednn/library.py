"""Find and load oneDNN as PyPI's `onednn` installs it.

The wheel is built for SYCL and lies, with its runtime, in the environment's library folder, which no loader
searches: each library is opened here by the path its own distribution records, dependencies first. All are
opened RTLD_LOCAL: PyTorch links a oneDNN of its own, and a global one would shadow it.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib import metadata
from pathlib import Path

from xpuquant.errors import EnvironmentFault

# What oneDNN links: distribution and library (any version), in the order in which they need each other.
_DEPENDENCIES = (
    ("tbb", "libtbb.so."),
    ("intel-cmplr-lib-rt", "libintlc.so."),
    ("intel-cmplr-lib-rt", "libimf.so"),
    ("intel-cmplr-lib-rt", "libsvml.so"),
    ("intel-cmplr-lib-rt", "libirng.so"),
    ("intel-opencl-rt", "libOpenCL.so."),  # linked by the releases of 2025; links the four above
    ("intel-sycl-rt", "libsycl.so."),
)
_SYCL_CPU_DEVICE = ("intel-opencl-rt", "libintelocl.so")


@cache
def _files(distribution: str) -> tuple[metadata.PackagePath, ...]:
    """The libraries of a distribution, by what pip recorded of it."""
    try:
        files = metadata.files(distribution) or ()
    except metadata.PackageNotFoundError:
        raise EnvironmentFault(f"{distribution} is not installed: pip install 'xpuquant[onednn]'") from None
    return tuple(file for file in files if ".so" in file.name)


def _path(distribution: str, library: str) -> str:
    # The shortest name is the soname itself or its one-number form: both are what dependents ask for.
    found = sorted((f for f in _files(distribution) if f.name.startswith(library)), key=lambda f: len(f.name))
    if not found:
        raise EnvironmentFault(f"{distribution} holds no {library}*: pip install -U 'xpuquant[onednn]'")
    path = Path(str(found[0].locate()))
    return str(path.parent.resolve() / path.name)


def load() -> ctypes.CDLL:
    """oneDNN, ready to call.

    Raises:
        EnvironmentFault: not installed, or the dynamic loader refuses it.
    """
    dnnl = _path("onednn", "libdnnl.so.")
    # Read by the OpenCL loader when SYCL first asks for devices: this is how the CPU becomes one.
    device = _path(*_SYCL_CPU_DEVICE)
    known = os.environ.get("OCL_ICD_FILENAMES", "")
    if device not in known.split(":"):
        os.environ["OCL_ICD_FILENAMES"] = f"{known}:{device}".lstrip(":")
    try:
        for distribution, name in _DEPENDENCIES:
            path = _path(distribution, name)
            try:
                # Another package (an XPU build of PyTorch) may have loaded its own copy: share that one.
                ctypes.CDLL(Path(path).name, mode=os.RTLD_NOLOAD)
            except OSError:
                ctypes.CDLL(path, mode=os.RTLD_LOCAL)
        return ctypes.CDLL(dnnl, mode=os.RTLD_LOCAL)
    except OSError as error:
        raise EnvironmentFault(f"oneDNN does not load: {error}") from None
