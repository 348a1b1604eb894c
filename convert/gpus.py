"""Intel GPUs that the XPU kernels serve on, by name, their generation and their memory. The one table of it."""

from __future__ import annotations

from typing import NamedTuple

GIB = 1 << 30
USED = 0.9
"""Part of the memory that vLLM takes by default (`--gpu-memory-utilization`)."""

KEPT_FREE = GIB
"""Bytes of that for activations and the runtime; what they really take depends on the batch."""

EXPERT_GENERATIONS = ("Xe2", "Xe3")
"""Those whose grouped GEMM is given the scales of a stack of experts."""


class Gpu(NamedTuple):
    """A card. One that carries two GPUs counts as two.

    generation  of its architecture, as Intel calls it: `Xe-HPG`, `Xe-HPC`, `Xe2`, `Xe3`
    """

    name: str
    gib: int
    generation: str

    @property
    def computes_experts(self) -> bool:
        """Whether the kernels for stacks of experts run there: see `xpu_ops.check_experts`."""
        return self.generation in EXPERT_GENERATIONS

    @property
    def usable(self) -> int:
        """Bytes for weights and KV cache."""
        return int(self.gib * GIB * USED) - KEPT_FREE


# Sizes: https://huggingface.co/hardware, and for Data Center GPUs
# https://www.intel.com/content/www/us/en/developer/articles/technical/intel-data-center-gpu-max-series-overview.html.
# The Max 1550 is two stacks, which are two devices by default, of 64 GiB each. Arc Pro B60: 24 GiB a GPU (48 on the
# cards with two). Generations: Alchemist (A) is Xe-HPG, Ponte Vecchio (Max) Xe-HPC, Battlemage (B) Xe2.
GPUS = (
    Gpu("Arc B570", 10, "Xe2"),
    Gpu("Arc B580", 12, "Xe2"),
    Gpu("Arc A770", 16, "Xe-HPG"),
    Gpu("Arc Pro B50", 16, "Xe2"),
    Gpu("Arc Pro B60", 24, "Xe2"),
    Gpu("Arc Pro B70", 32, "Xe2"),
    Gpu("Data Center GPU Max 1100", 48, "Xe-HPC"),
    Gpu("Data Center GPU Max 1550, one stack", 64, "Xe-HPC"),
)
