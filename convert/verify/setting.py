"""When, where and with which versions a verification ran, and of what model: what a reader of a report asks first."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xpuquant.conversion.sizes import counted
from xpuquant.errors import one_line
from xpuquant.kernels.base import Backend
from xpuquant.values import frozen

_TOOLS = ("xpuquant", "numpy", "ml_dtypes")
KERNEL_PACKAGES = {
    "onednn": "onednn",
    "vllm_xpu": "vllm-xpu-kernels",
    "ipex": "intel-extension-for-pytorch",
    "ark": "auto-round-lib",
    "shipped": "vllm-xpu-kernels",
    "torch_native": "torch",
}
"""Backend → the package whose version says which kernels ran. The reference is numpy's arithmetic."""

_PROCESSORS = Path("/proc/cpuinfo")


@frozen(sealed=True)
class Setting:
    """When, where and with what a verification ran.

    date      UTC, `2026-11-27 16:51 UTC`. `SOURCE_DATE_EPOCH`, as reproducible-builds.org defines it, sets it: equal
              conversions then write equal reports
    hardware  the processor, and the devices that kernels ran on
    versions  tool → version
    """

    date: str
    hardware: str
    versions: Mapping[str, str] = field(default_factory=dict)


def setting_of(backends: Sequence[Backend]) -> Setting:
    """The setting of this process, in which these backends are to run."""
    running = [backend for backend in backends if backend.unavailable() is None]
    tools = (*_TOOLS, *(KERNEL_PACKAGES[backend.name] for backend in running if backend.name in KERNEL_PACKAGES))
    return Setting(_date(), _hardware(running), _versions(tools))


def model_of(config: Mapping[str, Any]) -> str:
    """What a config.json calls its model: `Qwen3ForCausalLM, 36 layers`. Empty where it does not say."""
    architectures, text = config.get("architectures"), config.get("text_config")
    named = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    held = text if isinstance(text, Mapping) else config
    layers = held.get("num_hidden_layers")
    said = [one_line(str(named))] if named else []
    if type(layers) is int:
        said.append(counted(layers, "layer"))
    return ", ".join(said)


def _date() -> str:
    wanted = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = int(wanted) if wanted.isdecimal() and len(wanted) < 12 else time.time()
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _hardware(running: Sequence[Backend]) -> str:
    devices = {}
    for backend in running:
        device = getattr(backend, "device", None)
        if callable(device):
            devices[backend.name] = one_line(str(device())).upper()
    said = [f"{_processor()}, {counted(os.cpu_count() or 1, 'core')}", *_gpus()]
    return "; ".join([*said, *(f"{name} on the {device}" for name, device in devices.items())])


def _processor() -> str:
    """As Linux names it; elsewhere as Python does."""
    try:
        with _PROCESSORS.open(encoding="utf-8", errors="replace") as lines:
            named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        named = ""
    return one_line(named or platform.processor() or platform.machine())


def _gpus() -> list[str]:
    """Intel GPUs that torch sees, where something has loaded it."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.xpu.is_available():
            return []
        return list(dict.fromkeys(one_line(torch.xpu.get_device_name(i)) for i in range(torch.xpu.device_count())))
    except Exception:  # a broken installation, of which its own backend says so
        return []


def _versions(tools: Sequence[str]) -> dict[str, str]:
    found = {}
    for tool in dict.fromkeys(tools):
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found | {"Python": platform.python_version()}
