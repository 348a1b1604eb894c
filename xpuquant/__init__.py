"""Convert quantized LLM checkpoints, once and exactly, into the layouts Intel GPU kernels read."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("xpuquant")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
