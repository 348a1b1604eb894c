"""`doctor`: what of the machinery runs on this machine, and what would make the rest of it run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from xpuquant.ark_releases import ARK_FAULTS, ARK_PACKAGE, ark_release, check_ark
from xpuquant.errors import EnvironmentFault, one_line
from xpuquant.kernels import backends
from xpuquant.values import frozen
from xpuquant.xpu_releases import FAULTS, PACKAGE, Fault, check_release, release_of

PACKAGES = (
    "xpuquant",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "huggingface_hub",
    "torch",
    "onednn",
    "vllm",
    "vllm-xpu-kernels",
    "transformers",
    "compressed-tensors",
    "auto-round-lib",
    "intel-extension-for-pytorch",
    "ray",
)

_DRM = Path("/sys/class/drm")
_INTEL = "0x8086"


@frozen(sealed=True)
class BackendHealth:
    """One kernel library. `problem`: None where it runs here; otherwise why not, and what would change that."""

    name: str
    problem: str | None
    device: str = ""


@frozen(sealed=True)
class Diagnosis:
    """What was found.

    versions  package → version; None where it is not installed
    devices   Intel GPUs, as torch or the kernel's driver name them
    remarks   what else is worth knowing, with the fix
    """

    backends: Sequence[BackendHealth]
    versions: Mapping[str, str | None]
    devices: Sequence[str]
    remarks: Sequence[str]
    system: str


def examine() -> Diagnosis:
    """Look at everything. Imports torch where it is installed; runs no kernel."""
    devices, remarks = _render_nodes(_DRM)
    devices = _torch_devices() or devices
    if not devices:
        remarks.append("no Intel GPU here: converting and verifying need none, serving does")
    elif not _torch_devices():
        remarks.append(
            "torch sees no Intel GPU: install its XPU build, "
            "pip install torch --index-url https://download.pytorch.org/whl/xpu"
        )
    found = versions()
    for package in _KERNELS:
        remarks += _kernel_release(package, found[package])
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    return Diagnosis([_backend(name) for name in backends()], found, devices, remarks, system)


_KERNELS: Mapping[str, tuple[Callable[[str], None], Callable[[str], Any], tuple[Fault, ...]]] = {
    PACKAGE: (check_release, release_of, FAULTS),
    ARK_PACKAGE: (check_ark, ark_release, ARK_FAULTS),
}
"""Kernel library → what refuses a version of it, the release of that version, what releases get wrong."""


def _kernel_release(package: str, version: str | None) -> list[str]:
    """What is worth knowing of an installed kernel library: whether it is served with, and what it gets wrong."""
    if version is None:
        return []
    check, release_of_version, faults = _KERNELS[package]
    try:
        check(version)
    except EnvironmentFault as error:
        return [str(error)]
    release = release_of_version(version)
    wrong = [f"its {fault.operator} {fault.text}: {fault.answer}" for fault in faults if fault.in_release(release)]
    return [f"{package} {version} is one that xpuquant serves with", *wrong]


def versions() -> dict[str, str | None]:
    """package → version, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _backend(name: str) -> BackendHealth:
    backend = backends()[name]
    try:
        problem = backend.unavailable()
    except Exception as error:  # a broken installation must not hide the other backends
        return BackendHealth(name, one_line(f"fails while it is loaded: {type(error).__name__}: {error}"))
    device = getattr(backend, "device", None)
    where = device() if problem is None and callable(device) else ""
    return BackendHealth(name, None if problem is None else one_line(problem), str(where))


def _torch_devices() -> list[str]:
    """XPU devices that torch can use."""
    try:
        import torch

        if not torch.xpu.is_available():
            return []
        return [f"xpu:{i} {torch.xpu.get_device_name(i)}" for i in range(torch.xpu.device_count())]
    except Exception:  # not installed, or installed and broken: its own backend says so
        return []


def _render_nodes(drm: Path) -> tuple[list[str], list[str]]:
    """(Intel GPUs that the kernel's driver knows, what hinders their use)."""
    devices: list[str] = []
    remarks: list[str] = []
    for node in sorted(drm.glob("renderD*")):
        try:
            vendor = (node / "device" / "vendor").read_text().strip()
        except OSError:
            continue
        if vendor != _INTEL:
            continue
        devices.append(f"Intel GPU at /dev/dri/{node.name}")
        device = Path("/dev/dri") / node.name
        if device.exists() and not os.access(device, os.R_OK | os.W_OK):
            remarks.append(f"{device} may not be opened: sudo usermod -aG render $USER, then log in again")
    return devices, remarks
