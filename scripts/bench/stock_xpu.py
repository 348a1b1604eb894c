"""Stock vLLM's own code for Intel GPUs, run on CPU tensors: what load.py compares with."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any


class AsXpu:
    """vLLM's platform object, which says that it is an Intel GPU."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def is_xpu(self) -> bool:
        return True

    def is_cpu(self) -> bool:
        return False


def become_stock_xpu(wheel: Path) -> None:
    """Make stock vLLM choose and run its XPU repacking on CPU tensors."""
    import torch
    import vllm.platforms

    # Everything that is not to be fooled is imported before.
    from vllm.engine import arg_utils  # noqa: F401
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16
    from vllm.model_executor.model_loader import base_loader  # noqa: F401

    real, fake = vllm.platforms.current_platform, AsXpu(vllm.platforms.current_platform)
    sources = wheel.parent / "kernels"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(sources, [n for n in archive.namelist() if n.endswith(".py") or ".dist-info/" in n])
    sys.path.append(str(sources))  # it counts as installed
    # The package's own Python, without its compiled parts, which need an XPU build of torch.
    package = ModuleType("vllm_xpu_kernels")
    package.__path__ = [str(sources / "vllm_xpu_kernels")]
    sys.modules["vllm_xpu_kernels"] = package
    for part in ("_C", "_moe_C", "_xpu_C"):
        sys.modules[f"vllm_xpu_kernels.{part}"] = ModuleType(part)
    torch.ops._xpu_C.is_xe2_arch = lambda: True
    vllm.platforms.current_platform = fake
    import vllm.model_executor.layers.fused_moe.experts.xpu_moe

    vllm.platforms.current_platform = real
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision import xpu
    from vllm.model_executor.layers import linear as unquantized
    from vllm.model_executor.layers import vocab_parallel_embedding

    for module in (int_wna16, unquantized, vocab_parallel_embedding):
        module.current_platform = fake
    xpu.current_platform = fake
    linear._POSSIBLE_KERNELS[real._enum] = [xpu.XPUwNa16LinearKernel]
    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *a, **k: self if a == ("xpu",) else to(self, *a, **k)  # type: ignore[method-assign]
