"""Layout `fp8_linear`: FP8 linears, as oneDNN's fp8 matmul reads them.

    P.weight        F8_E4M3 or F8_E5M2 [N, K]
    P.weight_scale  F32 [1], [N], or [K/128, N/n] where blocks have n rows (`block_n` of the scheme)
    P.input_scale   F32 [1]  where the checkpoint quantizes activations statically

The kernels (`fp8_gemm` for blocks, else `fp8_gemm_w8a16`, vllm-xpu-kernels csrc/xpu/onednn) take `weight.t()`, and want
float32 scales that are contiguous as they lie here; a square contiguous weight is read as `[N, K]`, so it is stored so.
"""

from __future__ import annotations

import numpy as np

from xpuquant.errors import DamagedError
from xpuquant.formats.architecture import is_embedding
from xpuquant.formats.checkpoint import Array, columns, rows, whole
from xpuquant.formats.layouts.base import NO_EMBEDDINGS, Conversion, Layout, Matrix, OutTensor, Piece, Refusal, Stored
from xpuquant.formats.layouts.fillers import FillBlockScales, FillCast, code_pieces
from xpuquant.formats.layouts.modules import Linear, Module
from xpuquant.formats.layouts.scales import block_start, kept
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import Decoded, even_groups
from xpuquant.formats.weights.floats import ELEMENTS, FP8_BLOCK, FloatWeight, block_rows

BLOCK_ROWS = 16
"""vLLM's XPU block kernel repeats scale rows down to blocks of this many rows at the least."""


class Fp8Linear(Layout):
    name = "fp8_linear"
    family = "xpu"
    kernel = "fp8_gemm_w8a16"

    def kernel_of(self, scheme: Scheme, name: str) -> str:
        return "fp8_gemm" if scheme.granularity == "block" else self.kernel

    def offer(self, module: Module, scale_dtype: str | None) -> Conversion | Refusal | None:
        if not isinstance(module, Linear) or not isinstance(module.weight, FloatWeight):
            return None
        name, weight = module.name, module.weight
        if weight.dtype not in ELEMENTS or weight.is_mx:
            return None
        if is_embedding(name):
            return NO_EMBEDDINGS
        granularity = _granularity(weight)
        if granularity is None:
            return Refusal(_too_odd(weight))
        N, K = weight.N, weight.K
        is_block = granularity == "block"
        steps = {"tensor": (N, K), "channel": (1, K), "block": (block_rows(weight), FP8_BLOCK)}[granularity]
        shape = (K // steps[1], N // steps[0]) if is_block else (N // steps[0],)
        scales = FillBlockScales(weight, *steps, "F32").piece()
        tensors = [
            OutTensor(f"{name}.weight", weight.dtype, (N, K), code_pieces(weight)),
            OutTensor(f"{name}.weight_scale", "F32", shape, (scales,)),
        ]
        if weight.input_scale is not None:
            static = Piece((whole(weight.input_scale),), 4, FillCast("F32"))
            tensors.append(OutTensor(f"{name}.input_scale", "F32", (1,), (static,)))
        scheme = Scheme(
            layout=self.name,
            granularity=granularity,
            group_size=FP8_BLOCK if is_block else 0,
            block_n=steps[0] if is_block else 0,
            scale_dtype="F32",
            input_scale=weight.input_scale is not None,
            weight_dtype=weight.dtype,
        )
        expanded = weight.granularity == "block" and granularity == "channel"
        facts = ("one block covers all of K: stored as a scale per row, exactly",) * expanded
        return Conversion(name, scheme, tuple(tensors), (*weight.facts, *facts, *kept("F32", scale_dtype)))

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        return ("weight", "weight_scale", *["input_scale"] * scheme.input_scale)

    def matrices(self, stored: Stored) -> list[Matrix]:
        weight, scheme = stored.tensors["weight"], stored.scheme
        if weight.dtype != scheme.weight_dtype or len(weight.shape) != 2:
            raise DamagedError(
                f"{weight.name} is {weight.dtype} {list(weight.shape)}, config.json says {scheme.weight_dtype} [N, K]"
            )
        N, K = weight.shape
        scales: dict[str, tuple[int, ...]] = {"tensor": (1,), "channel": (N,)}
        if scheme.granularity == "block":
            scales["block"] = (K // scheme.group_size, N // scheme.block_n)
        wanted = {"weight_scale": scales.get(scheme.granularity), "input_scale": (1,)}
        for suffix, shape in wanted.items():
            if suffix in stored.tensors:
                stored.check(suffix, "F32", shape)
        return [Matrix("linear", N, K)]

    def decode(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> Decoded:
        weight, scheme = stored.tensors["weight"], stored.scheme
        codes = stored.load(rows(weight, start, stop)).view(np.uint8)
        scale = stored.array("weight_scale")
        down, across = matrix.N, matrix.K
        if scheme.granularity == "channel":
            down = 1
        elif scheme.granularity == "block":
            down, across = scheme.block_n, scheme.group_size
        return Decoded(
            ELEMENTS[weight.dtype],
            codes,
            scale.T if scale.ndim == 2 else scale.reshape(-1, 1),
            np.arange(start, stop) // down,
            even_groups(matrix.K, across),
        )

    def layer(self, stored: Stored, matrix: Matrix, start: int, stop: int) -> dict[str, Array]:
        """Rows `start:stop`; where scales cover blocks, `start` is a multiple of their rows."""
        scheme, scale = stored.scheme, stored.tensors["weight_scale"]
        part = whole(scale)
        if scheme.granularity == "channel":
            part = rows(scale, start, stop)
        elif scheme.granularity == "block":
            part = columns(scale, block_start(scheme, start), -(-stop // scheme.block_n))
        arrays = {
            "weight": stored.load(rows(stored.tensors["weight"], start, stop)),
            "weight_scale": stored.load(part),
        }
        return arrays | ({"input_scale": stored.array("input_scale")} if scheme.input_scale else {})


def _granularity(weight: FloatWeight) -> str | None:
    """The granularity to store, as the source has it where a kernel takes that; None where no exact one is taken."""
    if weight.granularity != "block":
        return weight.granularity
    fits = weight.block[1] % FP8_BLOCK == 0 and weight.K % FP8_BLOCK == 0
    if fits and block_rows(weight) % BLOCK_ROWS == 0:
        return "block"
    return "channel" if weight.block[1] >= weight.K else None


def _too_odd(weight: FloatWeight) -> str:
    """Why no kernel takes the blocks of a weight."""
    if weight.block[1] % FP8_BLOCK:
        size = f"{weight.block[0]}x{weight.block[1]}"
        return f"fp8 blocks of {size} have no XPU kernel for linears (they take 128 columns each)"
    if weight.K % FP8_BLOCK:
        return f"fp8 blocks need K to be a multiple of {FP8_BLOCK}, K={weight.K}"
    return (
        f"fp8 blocks of {weight.block[0]} rows cannot be cut into equal ones of at least {BLOCK_ROWS} "
        f"rows, N={weight.N}"
    )
