"""Backends that compute a quantized layer from its XPU layout. They know arithmetic, never files.

A new backend is a file with a class that meets `base.Backend`, and a line below.
"""

from xpuquant.kernels.ark import Ark
from xpuquant.kernels.base import Backend
from xpuquant.kernels.ipex import Ipex
from xpuquant.kernels.onednn.backend import OneDNN
from xpuquant.kernels.reference import Reference
from xpuquant.kernels.shipped.backend import Shipped
from xpuquant.kernels.torch_native import TorchNative
from xpuquant.kernels.vllm_xpu import VllmXpu

BACKENDS: tuple[Backend, ...] = (Reference(), OneDNN(), VllmXpu(), Ipex(), Ark(), Shipped(), TorchNative())
"""Every backend, whether or not it can run here. None of them imports a heavy library before it is asked to."""


def backends() -> dict[str, Backend]:
    """Every backend by name."""
    return {backend.name: backend for backend in BACKENDS}
