"""Layout of a module that was asked to be dequantized: plain bf16, under the names of the unquantized model.

    P.weight  BF16 [N, K], or all experts of a layer in the tensor that the source has for them, its axes as there:
              [E, N, K] or [E, K, N]

Values are rounded to nearest even from the exact product of code and scale. Only used with `--on-unsupported
dequantize`; it is the one lossy step, so plan, card and report name every module that took it.
"""

from __future__ import annotations

from collections.abc import Sequence

from xpuquant.errors import UnsupportedError
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.layouts.base import Conversion, OutTensor, Piece
from xpuquant.formats.layouts.fillers import FillDequantized
from xpuquant.formats.layouts.modules import Linear, Module
from xpuquant.formats.weights.base import CACHED_CODES, Weight, row_blocks
from xpuquant.formats.weights.floats import is_upended
from xpuquant.formats.weights.parts import FloatRows, IntRows


def can_dequantize(module: Module) -> bool:
    """Whether it is known in which tensors the unquantized model has the matrices of a module. It is not for gpt-oss,
    whose axes it has the other way round, nor for gate and up in one matrix, or one expert of a stack, alone."""
    if isinstance(module, Linear):
        expert = expert_of(module.name)
        is_part = isinstance(module.weight, IntRows | FloatRows) or bool(module.weight.stack)
        return not is_part and (expert is None or expert[2] != "gate_up")
    if module.interleaved:
        return False
    return all(weight.stack or role != "gate_up" for role, _, weight in module.matrices())


def convert_to_bf16(module: Module, reason: str) -> Conversion:
    """Every matrix of a module as the unquantized model has it.

    Raises:
        UnsupportedError: it is not known how that is.
    """
    if not can_dequantize(module):
        raise UnsupportedError(
            f"{module.name}: {reason}; nor can they be dequantized, because the unquantized model has all experts "
            "of a layer in one tensor"
        )
    stacks: dict[str, list[Weight]] = {}
    for _, _, weight in module.matrices():
        stacks.setdefault(weight.stack or f"{weight.name}.weight", []).append(weight)
    tensors = tuple(_tensor(name, members) for name, members in stacks.items())
    return Conversion(module.name, None, tensors, (f"dequantized to bf16: {reason}",))


def _tensor(name: str, members: Sequence[Weight]) -> OutTensor:
    """`[N, K]`, or the members of a stack one after the other."""
    first = members[0]
    if not first.stack:
        return OutTensor(name, "BF16", (first.N, first.K), _pieces(first))
    shape = (first.K, first.N) if is_upended(first) else (first.N, first.K)
    return OutTensor(name, "BF16", (len(members), *shape), tuple(piece for each in members for piece in _pieces(each)))


def _pieces(weight: Weight) -> tuple[Piece, ...]:
    if is_upended(weight):
        return (FillDequantized(weight, 0, weight.N, upended=True).piece(),)
    blocks = row_blocks(weight.N, weight.K, limit=4 * CACHED_CODES)
    return tuple(FillDequantized(weight, start, stop).piece() for start, stop in blocks)
