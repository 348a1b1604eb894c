"""Reader for FP8: DeepSeek and Qwen blocks, per-tensor and per-channel, as every producer spells them.

    P.weight            F8_E4M3 (F8_E5M2) [N, K]
    P.weight_scale_inv  [ceil(N/n), ceil(K/k)]   blocks; a multiplier, despite its name
    P.weight_scale      [] or [1]; [N], [N, 1] or [1, N]; [ceil(N/n), ceil(K/k)]
                        [ceil(N/n), 1, ceil(K/k), 1] (ModelOpt)
    P.scale             DeepSeek-V4's name of either, E8M0
                        [2], [3]: one for each part of a fused linear (ModelOpt: q, k and v of a Gated DeltaNet)
    P.input_scale       [] or [1]                static activation scale; AutoFP8 called it act_scale at first

A value is `weight * scale` in every one of them. Scales are F32, BF16, F16 or E8M0, which
files of before that dtype call U8. Written by DeepSeek, Qwen,
compressed-tensors (`float-quantized`, `naive-quantized`), AutoRound (FP8_BLOCK, FP8_STATIC, FPW8A16), ModelOpt, Quark,
FBGEMM and AutoFP8. Fused experts are in formats/readers/fp8_fused.py.
"""

from __future__ import annotations

import numpy as np

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.architecture import expert_of, fused_rows
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.readers.base import Parts, float_scale, need
from xpuquant.formats.readers.compressed_tensors.config import stated_block, weight_args
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.floats import E8M0, ELEMENTS, FloatWeight, FusedWeight, view

SCALES = ("weight_scale_inv", "weight_scale", "scale")
"""Names of the multiplier, each used by some producer."""

STATIC = ("input_scale", "activation_scale", "act_scale")
"""Names of the static scale of the activations. `act_scale` is AutoFP8's of before June 2024 (its pull request 11)."""

_FUSED_COUNTS = (2, 3)

SCALE_DTYPES = (*FLOATS, E8M0, "U8")

_DEFAULT_BLOCK = (128, 128)
_SMALLEST_SIDE = 16


class Fp8:
    name = "fp8"
    methods = frozenset(
        {
            *("fp8", "fp8-e4m3", "fp8-e5m2", "deepseek-v4-fp8", "fbgemm-fp8", "ptpc-fp8", "autofp8", "auto-fp8"),
            *("w8a8-fp8", "blockwise-fp8", "finegrained-fp8", "fp8-per-tensor", "fp8-per-block", "fp8-per-channel"),
            *("modelopt", "modelopt-fp8", "modelopt-mixed", "quark"),
        }
    )
    suffixes = frozenset(
        {
            *SCALES,
            *STATIC,
            "input_zero_point",
            "weight_zero_point",
            "input_scale_ub",
        }
    )

    def claims(self, parts: Parts) -> bool:
        weight = parts.get("weight")
        return weight is not None and weight.dtype.startswith("F8") and not is_mxfp8(parts)

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        weight = fp8_weight(parts, name)
        N, K = weight.shape
        scale = without_unit_axes(exponents(float_scale(scale_of(parts, name), SCALE_DTYPES)))
        parts_of = _fused_parts(checkpoint, name, scale, N, K)
        if parts_of is None:
            granularity, block, fact = _granularity(checkpoint, name, scale, N, K)
        else:
            granularity, block = "channel", (1, K)
            fact = f"fp8 with a scale for each of {len(parts_of)} fused linears, of {parts_of} rows: a scale per row"
        grid = (-(-N // block[0]), -(-K // block[1]))
        used = [weight, scale, *_no_zero_points(checkpoint, parts)]
        facts = [fact]
        input_scale = _input_scale(parts)
        if input_scale is not None and parts_of and input_scale.shape == scale.shape:
            used.append(input_scale)
            facts.append("static activation scales, one for each fused linear: dropped")
            input_scale = None
        elif input_scale is not None:
            used.append(_one_number(input_scale))
            if expert_of(name) is not None:
                # The expert kernel takes 16-bit activations.
                facts.append("static activation scales of experts dropped: their kernel takes 16-bit activations")
                input_scale = None
        read = FloatWeight(
            name=name,
            format=self.name,
            N=N,
            K=K,
            tensors=tuple(used),
            facts=tuple(facts),
            element=ELEMENTS[weight.dtype],
            granularity=granularity,
            block=block,
            codes=weight,
            scale=scale if parts_of else view(scale, scale.dtype, grid),
            input_scale=input_scale,
            scale_value=_value(checkpoint, name, scale) if granularity == "tensor" else None,
        )
        return [read if parts_of is None else FusedWeight(**vars(read), parts=parts_of)]


def is_mxfp8(parts: Parts) -> bool:
    """FP8 with one exponent byte per 32 columns: formats/readers/mxfp8.py reads it."""
    weight = parts.get("weight")
    if weight is None or weight.dtype not in ELEMENTS or len(weight.shape) != 2:
        return False
    scale = next((parts[suffix] for suffix in SCALES if suffix in parts), None)
    groups = (weight.shape[0], -(-weight.shape[1] // 32))
    return scale is not None and scale.dtype in ("U8", E8M0) and scale.shape == groups


def fp8_weight(parts: Parts, name: str) -> Tensor:
    """`P.weight`, an fp8 type that kernels know, a matrix."""
    weight = need(parts, "weight", name)
    if len(weight.shape) > 2:
        raise UnsupportedError(f"{weight.name} {list(weight.shape)} is no matrix (a convolution?): no XPU kernel")
    need(parts, "weight", name, dims=2)
    if weight.dtype not in ELEMENTS:
        raise UnsupportedError(f"{weight.dtype} has no XPU kernel (want {' or '.join(ELEMENTS)})")
    return weight


def scale_of(parts: Parts, name: str) -> Tensor:
    """The one multiplier of a module.

    Raises:
        DamagedError: none, or two of them.
    """
    found = [parts[suffix] for suffix in SCALES if suffix in parts]
    if not found:
        raise DamagedError(f"{name}.weight is {parts['weight'].dtype} without a scale; is a shard incomplete?")
    if len(found) > 1:
        raise DamagedError(f"{name} has both {found[0].name} and {found[1].name}; which one scales the weight?")
    return found[0]


def exponents(scale: Tensor) -> Tensor:
    """The scale, its bytes as the exponents that they are: beside FP8, integers are nothing else."""
    return view(scale, E8M0, scale.shape) if scale.dtype == "U8" else scale


def without_unit_axes(scale: Tensor) -> Tensor:
    """The scale of a matrix as at most two axes: ModelOpt keeps `[N/128, 1, K/128, 1]` (`FP8_PB_WO`)."""
    shape = scale.shape
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        shape = (shape[0], shape[2])
    while len(shape) > 2 and 1 in (shape[0], shape[-1]):
        shape = shape[:-1] if shape[-1] == 1 else shape[1:]
    return view(scale, scale.dtype, shape)


def block_size(checkpoint: Checkpoint, name: str) -> tuple[int, int] | None:
    """(rows, columns) of a block as the config says: `weight_block_size`, or `block_structure` of the group."""
    stated = stated_block(checkpoint)
    return stated or next((args.block for args in weight_args(checkpoint, name) if args.block is not None), None)


def _granularity(checkpoint: Checkpoint, name: str, scale: Tensor, N: int, K: int) -> tuple[str, tuple[int, int], str]:
    """(granularity, rows and columns per scale, the fact), from the shape of the scale; the size of ragged blocks
    cannot be told from it and comes from the config."""
    stated = block_size(checkpoint, name)
    block = stated or _DEFAULT_BLOCK
    blocks = (-(-N // block[0]), -(-K // block[1]))
    named = scale.name.endswith("_inv") or scale.dtype == E8M0
    if scale.shape == blocks and (stated is not None or named or blocks != (1, 1)):
        said = "as the config says" if stated else "the default"
        return "block", block, f"fp8 in blocks of {block[0]}x{block[1]}, {said}"
    if scale.shape in ((), (1,), (1, 1)):
        return "tensor", (N, K), "fp8 with one scale, from the shapes"
    if scale.shape in ((N,), (N, 1), (1, N)):
        return "channel", (1, K), "fp8 with a scale per row, from the shapes"
    if len(scale.shape) == 2 and scale.shape[0] == N and K % scale.shape[1] == 0:
        # compressed-tensors' group strategy: sound, but kernels have blocks only.
        return "block", (1, K // scale.shape[1]), "fp8 in groups along K, from the shapes"
    told = block_of_shapes(scale.shape, N, K)
    if told is not None:
        said = f"the config says {block[0]}x{block[1]}" if stated else "the config says none"
        return "block", told, f"fp8 in blocks of {told[0]}x{told[1]}, from the shapes; {said}"
    raise DamagedError(
        f"{scale.name} has shape {list(scale.shape)}; a weight of {[N, K]} in blocks of {list(block)} needs "
        f"{list(blocks)}"
    )


def block_of_shapes(scales: tuple[int, ...], N: int, K: int) -> tuple[int, int] | None:
    """(rows, columns) of a block where scales `[N/n, K/k]` show it: powers of two, as all producers have. A short last
    block of another size never looks like it."""
    if len(scales) != 2 or N % scales[0] or K % scales[1]:
        return None
    rows, columns = N // scales[0], K // scales[1]
    return (
        (rows, columns) if all(side >= _SMALLEST_SIDE and side.bit_count() == 1 for side in (rows, columns)) else None
    )


def _fused_parts(checkpoint: Checkpoint, name: str, scale: Tensor, N: int, K: int) -> tuple[int, ...] | None:
    """Rows of each linear of a fused one that has a scale for each (vllm-project/vllm#47396); None for any other.

    Raises:
        UnsupportedError: it has one for each, of rows that nobody here knows.
    """
    if len(scale.shape) != 1 or scale.shape[0] not in _FUSED_COUNTS or scale.shape[0] == N:
        return None
    parts = fused_rows(checkpoint, name, N, scale.shape[0])
    if parts is None:
        raise UnsupportedError(
            f"{scale.name} has {scale.shape[0]} numbers, one for each linear that is fused here, of rows which the "
            "config does not tell"
        )
    return parts


def _input_scale(parts: Parts) -> Tensor | None:
    scale = next((parts[suffix] for suffix in STATIC if suffix in parts), None)
    if scale is not None and scale.dtype not in FLOATS:
        raise UnsupportedError(f"{scale.name} is {scale.dtype}; kernels take one static scale per tensor")
    return scale


def _one_number(scale: Tensor) -> Tensor:
    if scale.shape not in ((), (1,), (1, 1)):
        raise UnsupportedError(
            f"{scale.name} is {scale.dtype} {list(scale.shape)}; kernels take one static scale per tensor"
        )
    return scale


def _no_zero_points(checkpoint: Checkpoint, parts: Parts) -> list[Tensor]:
    """Zero points that are all zero, and the activation bounds of FBGEMM, which mean nothing offline.

    Raises:
        UnsupportedError: a zero point that is not.
    """
    used = [parts["input_scale_ub"]] if "input_scale_ub" in parts else []
    for suffix in ("weight_zero_point", "input_zero_point"):
        if suffix in parts:
            values = checkpoint.peek(parts[suffix])
            if values is not None and values.astype(np.float64).any():
                raise UnsupportedError("fp8 with zero points has no XPU kernel")
            used.append(parts[suffix])
    return used


def _value(checkpoint: Checkpoint, name: str, scale: Tensor) -> float | None:
    """Only of experts: whether gate and up share a scale decides their layout."""
    expert = expert_of(name)
    if expert is None or expert[2] == "down":
        return None
    values = checkpoint.peek(scale)
    return None if values is None else float(values.reshape(-1)[0])
