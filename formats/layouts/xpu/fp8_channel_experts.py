"""Layout `fp8_channel_experts`: FP8 experts with a scale per channel, or per group of it, as ARK's kernels read them.

    P.gate_up_proj        F8_E4M3 or F8_E5M2 [E, 2I, H]
    P.gate_up_proj_scale  [E, 2I], or [E, 2I, H/g]
    P.down_proj           F8_E4M3 or F8_E5M2 [E, H, I]
    P.down_proj_scale     [E, H], or [E, H, I/g]

P ends in `.experts`; rows of gate_up_proj are all gate, then all up. It is for what the grouped GEMM of
vllm-xpu-kernels (`fp8_experts`) does not take: scales per channel or group, blocks that are not 128 x 128 or do not
divide the matrices, and per-tensor scales that differ between gate and up where blocks do not fit. All of them are
scales per row, or per group of columns of a row, if they are repeated: exact.

The kernels are those of `ark_experts.py`, which take FP8 as `[E, N, K]` and scales `[E, N, K/g]` in the dtype of the
activations, g = K for channels (auto_round_kernel 0.16, `_validate_moe_quant_args`). The file keeps the source's
dtype, and the loader casts: float32 scales are rounded to 16 bits once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.layouts.base import Conversion, Layout, Matrix, OutTensor, Piece, Refusal, Stored
from xpuquant.formats.layouts.fillers import FillBlockScales, code_pieces
from xpuquant.formats.layouts.modules import ExpertStack, Module
from xpuquant.formats.layouts.scales import rounded
from xpuquant.formats.layouts.stacks import (
    float_members,
    fp8_stack,
    part_rows,
    roles_of_stacks,
    several_dtypes,
    stack_suffixes,
    stored_matrices,
)
from xpuquant.formats.layouts.xpu.ark_experts import ARK_GROUP_SIZES, ark_refusal
from xpuquant.formats.layouts.xpu.fp8_experts import grouped_gemm_refusal
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded, even_groups
from xpuquant.formats.weights.floats import ELEMENTS, FloatWeight


class Fp8ChannelExperts(Layout):
    name = "fp8_channel_experts"
    family = "xpu"
    kernel = "ARK 0.16 moe, fp8"

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if (floats := fp8_stack(module)) is None:
            return None
        stack, sources = floats
        if (unfit := grouped_gemm_refusal(stack, sources)) is None:
            return None
        if (reason := several_dtypes(sources)) is not None:
            return Refusal(reason)
        size = _group_size(sources)
        if (reason := ark_refusal(stack) or _no_group(size)) is not None:
            return Refusal(f"{unfit}; {reason}")
        labels = {source.scale.dtype for source in sources}
        kept = next(iter(labels)) if len(labels) == 1 and labels <= set(FLOATS) else "F32"
        dtype = scale_dtype or kept
        tensors = [
            tensor
            for name, roles in roles_of_stacks(stack)
            for tensor in _tensors(stack, name, roles, size or 0, dtype)
        ]
        scheme = Scheme(
            layout=self.name,
            granularity="group" if size else "channel",
            group_size=size or 0,
            scale_dtype=dtype,
            weight_dtype=tensors[0].dtype,
            gated=stack.gated,
        )
        facts = (*stack.facts, f"{unfit}: scales per {'group' if size else 'channel'}, for ARK")
        if dtype == "F32":
            facts += (
                "scales are float32; the kernel reads them in the activations' 16 bits, rounded once when loaded",
            )
        return Conversion(stack.name, scheme, tuple(tensors), facts, rounded([kept], scale_dtype))

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return stack_suffixes(scheme)

    def matrices(self, stored: Stored) -> list[Matrix]:
        scheme = stored.scheme
        for part in stored.scheme.stacks:
            weight = stored.tensors[part]
            if weight.dtype != scheme.weight_dtype or len(weight.shape) != 3:
                raise DamagedError(
                    f"{weight.name} is {weight.dtype} {list(weight.shape)}, "
                    f"config.json says {scheme.weight_dtype} [E, N, K]"
                )
            E, N, K = weight.shape
            shapes = {"channel": (E, N), "group": (E, N, K // max(scheme.group_size, 1))}
            stored.check(f"{part}_scale", scheme.scale_dtype, shapes.get(scheme.granularity))
        return stored_matrices(stored)

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        part, rows = part_rows(stored, matrix, start, stop)
        scale = rows(f"{part}_scale").reshape(stop - start, -1)
        return Decoded(
            ELEMENTS[stored.scheme.weight_dtype],
            rows(part).view(np.uint8),
            scale,
            np.arange(stop - start),
            even_groups(matrix.K, matrix.K // scale.shape[1]),
        )

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        part, rows = part_rows(stored, matrix, start, stop)
        return {"weight": rows(part), "weight_scale": rows(f"{part}_scale")}


def _group_size(sources: Sequence[FloatWeight]) -> int | None:
    """Columns to a scale that every matrix can have: 0 where a scale covers a row, None where there is no such size."""
    if all(source.block[1] >= source.K for source in sources):
        return 0
    steps = [step for source in sources for step in (source.K, min(source.block[1], source.K))]
    return next((size for size in ARK_GROUP_SIZES if not any(step % size for step in steps)), None)


def _no_group(size: int | None) -> str | None:
    return f"no group size of {list(ARK_GROUP_SIZES)} divides the columns of every scale" if size is None else None


def _tensors(stack: ExpertStack, name: str, roles: tuple[str, ...], size: int, dtype: str) -> list[OutTensor]:
    """`gate_up_proj` or `down_proj`, and its scales, `size` columns to each; 0: a row."""
    codes: list[Piece] = []
    scales: list[Piece] = []
    for expert in range(stack.experts):
        members = float_members(stack, roles, expert)
        for weight in members:
            codes += code_pieces(weight)
            scales.append(FillBlockScales(weight, 1, size or weight.K, dtype, by_row=True).piece())
    N, K = sum(weight.N for weight in members), members[0].K
    groups = (K // size,) if size else ()
    return [
        OutTensor(f"{stack.name}.{name}", members[0].dtype, (stack.experts, N, K), tuple(codes)),
        OutTensor(f"{stack.name}.{name}_scale", dtype, (stack.experts, N, *groups), tuple(scales)),
    ]
