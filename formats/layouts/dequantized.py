"""Layout of a module that was asked to be dequantized: plain bf16, under the names of the unquantized model.

    P.weight  BF16 [N, K]

Values are rounded to nearest even from the exact product of code and scale. Only used with `--on-unsupported
dequantize`; it is the one lossy step, so plan, card and report name every module that took it.
"""

from __future__ import annotations

from xpuquant.errors import UnsupportedError
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.layouts.base import Conversion, OutTensor
from xpuquant.formats.layouts.fillers import FillDequantized
from xpuquant.formats.layouts.modules import ExpertStack, LooseExperts, Module
from xpuquant.formats.weights.base import CACHED_CODES, row_blocks
from xpuquant.formats.weights.parts import FloatRows, IntRows


def can_dequantize(module: Module) -> bool:
    """Whether the unquantized model has each matrix of a module in a tensor of its own. It has not where the source
    has gate and up of all experts in one, or a part of such a tensor."""
    if isinstance(module, ExpertStack):
        return "gate_up" not in module.weights and not module.interleaved
    if isinstance(module, LooseExperts):
        return all(role != "gate_up" for role, _ in module.members)
    expert = expert_of(module.name)
    is_part = isinstance(module.weight, IntRows | FloatRows)
    return not is_part and (expert is None or expert[2] != "gate_up")


def convert_to_bf16(module: Module, reason: str) -> Conversion:
    """Every matrix of a module as its own bf16 tensor.

    Raises:
        UnsupportedError: experts that the unquantized model does not have one by one.
    """
    if not can_dequantize(module):
        raise UnsupportedError(
            f"{module.name}: {reason}; nor can they be dequantized, because the unquantized model has all experts "
            "of a layer in one tensor"
        )
    tensors = [
        OutTensor(
            f"{weight.name}.weight",
            "BF16",
            (weight.N, weight.K),
            tuple(
                FillDequantized(weight, start, stop).piece()
                for start, stop in row_blocks(weight.N, weight.K, limit=4 * CACHED_CODES)
            ),
        )
        for _, _, weight in module.matrices()
    ]
    return Conversion(module.name, None, tuple(tensors), (f"dequantized to bf16: {reason}",))
