"""Layers made by hand from random codes, with the float64 weight they stand for.

Written from the on-disk contract alone: nothing here uses the package's own packing or decoding, so that a
mistake there cannot hide here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from support.packers import pack_bytes, pack_words
from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.base import Layer

Array = np.ndarray[Any, Any]

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def int4_linear(
    N: int,
    K: int,
    g: int,
    *,
    scale: str = "BF16",
    symmetric: bool = True,
    act_order: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> tuple[Layer, Array]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (N, K))
    scales = (rng.uniform(0.002, 0.02, (N, K // g)) * rng.choice([-1, 1], (N, K // g))).astype(DTYPES[scale])
    zeros = np.full((N, K // g), 8) if symmetric else rng.integers(0, 16, (N, K // g))
    weight = np.empty((N, K))
    for column in range(K):
        group = column // g
        weight[:, column] = (codes[:, column] - zeros[:, group]) * scales[:, group].astype(np.float64)
    tensors = {"qweight": pack_words(codes), "scales": np.ascontiguousarray(scales.T)}
    if not symmetric:
        tensors["qzeros"] = pack_words(zeros.T)
    if act_order:
        order = rng.permutation(K).astype(np.int32)
        tensors["g_idx"] = order
        weight[:, order] = weight.copy()
    if bias:
        tensors["bias"] = rng.normal(size=N).astype(DTYPES[scale])
    scheme = Scheme("int4_linear", group_size=g, scale_dtype=scale, symmetric=symmetric, act_order=act_order)
    return Layer(scheme, N, K, tensors), weight


def int8_linear(
    N: int,
    K: int,
    g: int,
    *,
    scale: str = "BF16",
    symmetric: bool = True,
    act_order: bool = False,
    bits: int = 8,
    seed: int = 0,
) -> tuple[Layer, Array]:
    """Two planes of nibbles, group by group; codes of `bits` lie about 128."""
    rng = np.random.default_rng(seed)
    reach = 1 << bits - 1
    codes, zeros = rng.integers(128 - reach, 128 + reach, (N, K)), rng.integers(0, 256, (N, K // g))
    if symmetric:
        zeros[:] = 128
    scales = (rng.uniform(0.002, 0.02, (N, K // g)) * rng.choice([-1, 1], (N, K // g))).astype(DTYPES[scale])
    weight = (codes - np.repeat(zeros, g, axis=1)) * np.repeat(scales.astype(np.float64), g, axis=1)
    planes = np.concatenate([plane for at in range(0, K, g) for plane in np.divmod(codes[:, at : at + g], 16)], axis=1)
    rows_of_zeros = np.array([row for group in zeros.T for row in np.divmod(group, 16)])
    rows_of_scales = np.array([row for group in scales.T for row in (group * DTYPES[scale](16), group)])
    tensors = {"qweight": pack_words(planes), "scales": rows_of_scales, "qzeros": pack_words(rows_of_zeros)}
    if act_order:
        order = rng.permutation(K).astype(np.int32)
        tensors["g_idx"] = order
        weight[:, order] = weight.copy()
    scheme = Scheme("int8_linear", group_size=g, scale_dtype=scale, symmetric=symmetric, act_order=act_order)
    return Layer(scheme, N, K, tensors), weight


def int4_expert(
    N: int, K: int, g: int, *, scale: str = "BF16", bias: bool = False, seed: int = 0
) -> tuple[Layer, Array]:
    rng = np.random.default_rng(seed)
    values = rng.integers(-8, 8, (N, K))
    scales = rng.uniform(0.002, 0.02, (N, K // g)).astype(DTYPES[scale])
    tensors: dict[str, Array] = {"weight": pack_bytes(values & 15), "weight_scale": scales}
    if bias:
        tensors["bias"] = rng.normal(size=N).astype(DTYPES[scale])
    weight = values * np.repeat(scales.astype(np.float64), g, axis=1)
    return Layer(Scheme("int4_experts", group_size=g, scale_dtype=scale, bias=bias), N, K, tensors), weight


def ark_expert(
    N: int, K: int, g: int, bits: int, *, symmetric: bool = False, scale: str = "BF16", seed: int = 0
) -> tuple[Layer, Array]:
    """An expert of `uint4_experts` (4 bits, with zero points) or `int8_experts`."""
    rng = np.random.default_rng(seed)
    top = 1 << bits
    codes = rng.integers(0, top, (N, K))
    zeros = np.full((N, K // g), top // 2) if symmetric else rng.integers(0, top, (N, K // g))
    scales = (rng.uniform(0.002, 0.02, (N, K // g)) * rng.choice([-1, 1], (N, K // g))).astype(DTYPES[scale])
    stored = (codes - top // 2).astype(np.int8) if symmetric else codes.astype(np.uint8)
    tensors: dict[str, Array] = {"weight": pack_bytes(codes) if bits == 4 else stored, "weight_scale": scales}
    if not symmetric:
        tensors["weight_zero_point"] = zeros.astype(np.uint8)
    weight = (codes - np.repeat(zeros, g, axis=1)) * np.repeat(scales.astype(np.float64), g, axis=1)
    layout = "uint4_experts" if bits == 4 else "int8_experts"
    return Layer(Scheme(layout, group_size=g, scale_dtype=scale, symmetric=symmetric), N, K, tensors), weight


def nvfp4(
    N: int, K: int, *, experts: bool = False, divides: bool = True, bias: bool = False, seed: int = 0
) -> tuple[Layer, Array]:
    """Twice E2M1 as bytes (experts), or as two planes of nibbles, group by group of 16 columns."""
    rng = np.random.default_rng(seed)
    twice = (2 * np.array(E2M1)).astype(int)[rng.integers(0, 16, (N, K))]
    scales = (rng.integers(8, 16, (N, K // 16)) * 2.0 ** rng.integers(-12, -6, (N, K // 16))).astype(DTYPES["BF16"])
    number = np.array([rng.uniform(0.5, 1) if divides else rng.uniform(1, 2)], np.float32)
    weight = twice * np.repeat(scales.astype(np.float64), 16, axis=1)
    weight = weight / np.float64(number[0]) if divides else weight * np.float64(number[0])
    tensors: dict[str, Array] = {"weight": twice.astype(np.int8), "weight_scale": scales, "global_scale": number}
    if not experts:
        high = rng.integers(np.maximum(twice - 7, -8), np.minimum(twice + 8, 7) + 1)  # any two nibbles with that sum
        planes = [plane[:, at : at + 16] + 8 for at in range(0, K, 16) for plane in (high, twice - high)]
        words = pack_words(np.concatenate(planes, axis=1))
        tensors = {"qweight": words, "scales": np.ascontiguousarray(scales.T), "global_scale": number}
    if bias:
        tensors["bias"] = rng.normal(size=N).astype(DTYPES["BF16"])
    layout = "nvfp4_experts" if experts else "nvfp4_linear"
    return Layer(Scheme(layout, group_size=16, divides=divides), N, K, tensors), weight


def fp8(
    N: int,
    K: int,
    granularity: str,
    *,
    experts: bool = False,
    dtype: Any = ml_dtypes.float8_e4m3fn,
    block: int = 128,
    rows: int | None = None,
    bias: bool = False,
    seed: int = 0,
) -> tuple[Layer, Array]:
    """`block`: columns of a block; `rows`: its rows, where they are not as many."""
    rows = rows or block
    rng = np.random.default_rng(seed)
    codes = rng.normal(scale=60, size=(N, K)).astype(dtype)
    shape = {"tensor": (1,), "channel": (N,), "block": (K // block, N // rows)}[granularity]
    scales = rng.uniform(1e-4, 1e-3, shape).astype(np.float32)
    wide: Array = scales.astype(np.float64)
    if granularity == "channel":
        wide = wide[:, None]
    elif granularity == "block":
        wide = np.kron(wide, np.ones((block, rows))).T
    sizes: dict[str, Any] = {"group_size": block, "block_n": rows} if granularity == "block" else {}
    scheme = Scheme("fp8_experts" if experts else "fp8_linear", granularity, scale_dtype="F32", **sizes)
    stored = np.ascontiguousarray(codes.T) if experts else codes
    tensors: dict[str, Array] = {"weight": stored, "weight_scale": scales}
    if bias:
        tensors["bias"] = rng.normal(size=N).astype(ml_dtypes.bfloat16)
    return Layer(scheme, N, K, tensors), codes.astype(np.float64) * wide


def fp8_channel_expert(
    N: int, K: int, g: int = 0, *, scale: str = "F32", dtype: Any = ml_dtypes.float8_e4m3fn, seed: int = 0
) -> tuple[Layer, Array]:
    """An expert of `fp8_channel_experts`; g = 0: a scale per channel."""
    rng = np.random.default_rng(seed)
    codes = rng.normal(scale=60, size=(N, K)).astype(dtype)
    scales = rng.uniform(1e-4, 1e-3, (N, K // (g or K))).astype(DTYPES[scale])
    granularity = "group" if g else "channel"
    label = "F8_E4M3" if dtype is ml_dtypes.float8_e4m3fn else "F8_E5M2"
    scheme = Scheme("fp8_channel_experts", granularity, g, scale_dtype=scale, weight_dtype=label)
    weight = codes.astype(np.float64) * np.repeat(scales.astype(np.float64), g or K, axis=1)
    return Layer(scheme, N, K, {"weight": codes, "weight_scale": scales if g else scales[:, 0]}), weight


def mx(N: int, K: int, kind: str, *, experts: bool = False, seed: int = 0) -> tuple[Layer, Array]:
    """`kind`: "mxfp4" or "mxfp8"."""
    rng = np.random.default_rng(seed)
    exponents = rng.integers(116, 122, (N, K // 32)).astype(np.uint8)
    if kind == "mxfp4":
        codes = rng.integers(0, 16, (N, K))
        values, stored = np.array(E2M1)[codes], pack_bytes(codes)
    else:
        elements = rng.normal(scale=60, size=(N, K)).astype(ml_dtypes.float8_e4m3fn)
        values, stored = elements.astype(np.float64), elements
        stored = np.ascontiguousarray(stored.T) if experts else stored
    weight = values * np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 32, axis=1)
    scales = exponents if experts else np.ascontiguousarray(exponents.T)
    layout = f"{kind}_{'experts' if experts else 'linear'}"
    scheme = Scheme(layout, group_size=32, scale_dtype="U8")
    return Layer(scheme, N, K, {"weight": stored, "weight_scale": scales}), weight


def activations(M: int, K: int, dtype: str, seed: int = 1) -> Array:
    """`[M, K]` as they come out of an RMS norm: unit rows, one channel in 64 ten times the others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(M, K))
    x[:, rng.permutation(K)[: max(1, K // 64)]] *= 10
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True))
    return x.astype(DTYPES[dtype])


def expected(weight: Array, x: Array, layer: Layer) -> Array:
    """float64 `x · Wᵀ + bias` by numpy alone."""
    y = np.einsum("mk,nk->mn", x.astype(np.float64), weight)
    return y + layer.tensors["bias"].astype(np.float64) if "bias" in layer.tensors else y


def error(actual: Array, truth: Array) -> float:
    """Relative Frobenius error."""
    return float(np.linalg.norm(actual.astype(np.float64) - truth) / np.linalg.norm(truth))


# What every backend is asked to run. N = 96 or 128 and K = 256 keep every kernel's alignment rules.
_INT4: dict[str, Callable[[str], tuple[Layer, Array]]] = {
    "int4": lambda scale: int4_linear(96, 256, 64, scale=scale),
    "int4 bias": lambda scale: int4_linear(96, 256, 32, scale=scale, bias=True),
    "int4 asym": lambda scale: int4_linear(96, 256, 32, scale=scale, symmetric=False),
    "int4 channel": lambda scale: int4_linear(96, 256, 256, scale=scale),
    "int4 act-order": lambda scale: int4_linear(96, 256, 64, scale=scale, act_order=True),
    "int4 asym act-order bias": lambda scale: int4_linear(
        96, 256, 64, scale=scale, symmetric=False, act_order=True, bias=True
    ),
    "int8": lambda scale: int8_linear(96, 256, 64, scale=scale),
    "int8 asym": lambda scale: int8_linear(96, 256, 32, scale=scale, symmetric=False),
    "int8 act-order": lambda scale: int8_linear(96, 256, 64, scale=scale, act_order=True),
    "int4 expert": lambda scale: int4_expert(128, 256, 64, scale=scale),
    "int4 expert bias": lambda scale: int4_expert(128, 256, 32, scale=scale, bias=True),
    "uint4 expert": lambda scale: ark_expert(128, 256, 64, 4, scale=scale),
    "int8 expert": lambda scale: ark_expert(128, 256, 64, 8, scale=scale, symmetric=True),
    "int8 expert asym": lambda scale: ark_expert(128, 256, 32, 8, scale=scale),
}
_FLOAT: dict[str, Callable[[], tuple[Layer, Array]]] = {
    "fp8 tensor": lambda: fp8(96, 256, "tensor"),
    "fp8 channel bias": lambda: fp8(96, 256, "channel", bias=True),
    "fp8 block": lambda: fp8(128, 256, "block"),
    "fp8 e5m2 tensor": lambda: fp8(96, 256, "tensor", dtype=ml_dtypes.float8_e5m2),
    "fp8 expert tensor": lambda: fp8(128, 256, "tensor", experts=True),
    "fp8 expert block": lambda: fp8(128, 256, "block", experts=True),
    "fp8 expert channel": lambda: fp8_channel_expert(128, 256),
    "fp8 expert group": lambda: fp8_channel_expert(128, 256, 64, scale="BF16"),
    "fp8 expert e5m2 channel": lambda: fp8_channel_expert(128, 256, dtype=ml_dtypes.float8_e5m2),
    "mxfp8": lambda: mx(96, 256, "mxfp8"),
    "mxfp8 expert": lambda: mx(128, 256, "mxfp8", experts=True),
    "mxfp4": lambda: mx(96, 256, "mxfp4"),
    "mxfp4 expert": lambda: mx(128, 256, "mxfp4", experts=True),
    "nvfp4": lambda: nvfp4(96, 256),
    "nvfp4 factor bias": lambda: nvfp4(96, 256, divides=False, bias=True),
    "nvfp4 expert": lambda: nvfp4(128, 256, experts=True),
    "nvfp4 expert factor": lambda: nvfp4(128, 256, experts=True, divides=False),
}
CASES = (*_INT4, *_FLOAT)


def layers(case: str) -> Iterator[tuple[Layer, Array]]:
    """The layers of a case: int4 with bfloat16, float16 and float32 scales, others as they are."""
    if case in _INT4:
        yield from (_INT4[case](scale) for scale in DTYPES)
    else:
        yield _FLOAT[case]()
