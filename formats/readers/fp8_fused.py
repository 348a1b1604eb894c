"""Reader for FP8 experts that are one 3-D tensor per layer, as Transformers and Qwen store them.

    P.gate_up_proj            F8 [E, 2I, H]   all gate rows, then all up (gpt-oss alternates)
    P.gate_up_proj_scale_inv  [E, ceil(2I/n), ceil(H/k)]; [E, 1, 1], [E] or [1] per tensor; [E, 2I, 1] per channel
    P.down_proj               F8 [E, H, I]
    P.down_proj_scale_inv     likewise
    P.*_activation_scale      static activation scales

Some files have the last two axes the other way round, weight and scales alike, which is the XPU layout already
(Qwen3-VL-MoE FP8). Shapes tell: gate_up_proj has twice the I of down_proj, and they share H.
"""

from __future__ import annotations

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers.base import STACKS, Parts, both_quantized, float_scale, need
from xpuquant.formats.readers.fp8 import SCALE_DTYPES, block_of_shapes, block_size, exponents
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.floats import ELEMENTS, FloatWeight, view

SCALE_ENDS = ("_scale_inv", "_scale", "_weight_scale")
STATIC_ENDS = ("_activation_scale", "_input_scale")


class Fp8Fused:
    name = "fp8"
    methods = frozenset({"fp8"})
    suffixes = frozenset(part + end for part in STACKS for end in ("", *SCALE_ENDS, *STATIC_ENDS))

    def claims(self, parts: Parts) -> bool:
        return any(parts[part].dtype.startswith("F8") for part in STACKS if part in parts)

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        both_quantized(parts)
        stacks = [need(parts, part, name, dims=3) for part in STACKS]
        transposed = is_transposed(name, *stacks)
        weights: list[Weight] = []
        for part, tensor in zip(STACKS, stacks, strict=True):
            if tensor.dtype not in ELEMENTS:
                raise UnsupportedError(f"{tensor.dtype} has no XPU kernel (want {' or '.join(ELEMENTS)})")
            weights += self._experts(checkpoint, name, parts, part, tensor, transposed)
        return weights

    def _experts(
        self, checkpoint: Checkpoint, name: str, parts: Parts, part: str, tensor: Tensor, transposed: bool
    ) -> list[Weight]:
        scale = exponents(float_scale(fused_scale(parts, name, part), SCALE_DTYPES))
        E = tensor.shape[0]
        N, K = tensor.shape[:0:-1] if transposed else tensor.shape[1:]
        granularity, block = _granularity(scale, E, N, K, block_size(checkpoint, name) or (128, 128), transposed)
        grid = (-(-N // block[0]), -(-K // block[1]))
        facts = [f"fused experts, {'[E, K, N]' if transposed else '[E, N, K]'}, from the shapes"]
        static = [parts[part + end] for end in STATIC_ENDS if part + end in parts]
        if static:
            facts.append("static activation scales of experts dropped: their kernel takes 16-bit activations")
        shared = scale.shape in ((), (1,), (1, 1, 1))
        return [
            FloatWeight(
                name=f"{name}.{expert}.{part}",
                format=self.name,
                N=N,
                K=K,
                tensors=(tensor, scale, *static),
                facts=tuple(facts),
                element=ELEMENTS[tensor.dtype],
                granularity=granularity,
                block=block,
                codes=view(tensor, tensor.dtype, tensor.shape[1:], expert),
                scale=view(scale, scale.dtype, grid[::-1] if transposed else grid, 0 if shared else expert),
                transposed=transposed,
                stack=tensor.name,
            )
            for expert in range(E)
        ]


def is_transposed(name: str, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the stacks are `[E, K, N]`.

    Raises:
        DamagedError: shapes that fit neither way.
    """
    (E, a, b), (experts, c, d) = gate_up.shape, down.shape
    if experts == E and a == 2 * d and b == c:
        return False
    if experts == E and b == 2 * c and a == d:
        return True
    raise DamagedError(f"{name}: gate_up_proj {[E, a, b]} and down_proj {[experts, c, d]} do not belong together")


def fused_scale(parts: Parts, name: str, part: str) -> Tensor:
    """The multipliers of one stack.

    Raises:
        DamagedError: there are none.
    """
    found = [parts[part + end] for end in SCALE_ENDS if part + end in parts]
    if not found:
        raise DamagedError(f"{name}.{part}_scale_inv is missing; is a shard incomplete? Download it again")
    return found[0]


def _granularity(
    scale: Tensor, E: int, N: int, K: int, block: tuple[int, int], transposed: bool
) -> tuple[str, tuple[int, int]]:
    blocks = (-(-N // block[0]), -(-K // block[1]))
    if scale.shape == (E, *(blocks[::-1] if transposed else blocks)) and blocks != (1, 1):
        return "block", block
    if scale.shape in ((), (1,), (1, 1, 1), (E,), (E, 1), (E, 1, 1)):
        return "tensor", (N, K)
    if scale.shape in ((E, N), (E, 1, N) if transposed else (E, N, 1)):
        return "channel", (1, K)
    told = (
        block_of_shapes(scale.shape[:0:-1] if transposed else scale.shape[1:], N, K)
        if scale.shape[:1] == (E,)
        else None
    )
    if told is not None:
        return "block", told
    raise DamagedError(
        f"{scale.name} has shape {list(scale.shape)}; experts of {[N, K]} in blocks of {list(block)} need "
        f"{[E, *blocks]}"
    )
