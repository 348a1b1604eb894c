"""ARK's expert kernels for XPU, out of a released auto-round-lib wheel: int4 and int8 with or without zero points, FP8.

Its library holds what vllm-xpu-kernels lacks: `(code − zero) · scale` for experts. Prefill widens a stack to 16 bits
and multiplies that; decoding multiplies the codes. Source of the launches: repository auto-round of 2026-08-22,
`auto_round_extension/ark/auto_round_kernel/wrapper/include/`, `sycl_tla_moe_mixed.hpp` and `sycl_tla_moe_decode.hpp`.
Release 0.16.0 takes one argument more where there are zero points, sums of activations: read from the kernel itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xpuquant.kernels.shipped.device import aligned, placed
from xpuquant.kernels.shipped.operators import SYCL, Array, launch
from xpuquant.kernels.shipped.wheel import Wheel

_LIBRARY = "auto_round_kernel_xpu"
_STORE = 32  # columns that a work group of the widening kernels writes side by side
_LANES = 16


def _name(wheel: Wheel, kernel: str, scales: Array, flag: bool, more: str = "") -> str:
    """The instance for scales of this dtype with a first flag: zero points or not; of FP8, E4M3 or E5M2."""
    instance = f"{len(kernel)}{kernel}I{SYCL[scales.dtype.name]}Lb{int(flag)}E{more}"
    return wheel.named(_LIBRARY, instance, "_ZTSN3ark")


def widen(wheel: Wheel, weight: Array, scales: Array, zeros: Array | None = None, bits: int = 4) -> Array:
    """What prefill multiplies: a stack of experts in 16 bits.

    Args:
        wheel: whose kernel.
        weight: uint8 `[E, N, K/2]` (the even column in the low nibble) or, for 8 bits, `[E, N, K]`; codes are signed
            without `zeros`, unsigned with them. Or FP8 `[E, N, K]`.
        scales: float16 or bfloat16 `[E, N, K/g]`.
        zeros: true zero points in the dtype of the scales, `[E, N, K/g]`.
        bits: 4 or 8.

    Returns:
        `[E, K, N]` in the dtype of the scales.
    """
    E, N, groups = scales.shape
    fp8 = weight.dtype.kind not in "iu"
    K = weight.shape[2] * (2 if bits == 4 and not fp8 else 1)
    out = aligned((E, K, N), scales.dtype)
    stored = [placed(scales)] if zeros is None else [placed(scales), placed(zeros)]
    sizes = [np.int32(N), np.int32(K // groups), np.int32(groups)]
    arguments: list[Any]
    if fp8:
        # Its codes are read out of a table, as by default (ARK_FP8_DECODE_USE_LUT).
        name = _name(wheel, "MoEDequantKernelFP8", scales, weight.dtype.name == "float8_e4m3fn", "Lb1E")
        arguments = [None, np.int32(N), np.int32(K), *sizes[1:], *stored, placed(weight.view(np.uint8)), out]
        launch(wheel, _LIBRARY, name, arguments, _STORE, -(-N // _STORE), K // 4, E)
        return out
    if bits == 4:
        kernel, words = "MoEDequantKernelInt4Fast", K // 8
        arguments = [None, *sizes, *stored, np.int32(K // 2), placed(weight), np.int32(K), out]
    else:
        kernel, words = "MoEDequantKernelInt8", K // 4
        arguments = [None, np.int32(N), np.int32(K), *sizes[1:], *stored, placed(weight), out]
    name = _name(wheel, kernel, scales, zeros is not None)
    launch(wheel, _LIBRARY, name, arguments, _STORE, -(-N // _STORE), words, E)
    return out


def decode(wheel: Wheel, x: Array, expert: Array, weight: Array, scales: Array, zeros: Array | None = None) -> Array:
    """`moe_gemm_decode` of int4 experts: each row times the matrix of its expert.

    Args:
        wheel: whose kernels.
        x: `[M, K]` in the dtype of the scales.
        expert: int32 `[M]`.
        weight: uint8 `[E, N, K/2]`, N a multiple of 16; see `widen`.
        scales: `[E, N, K/g]`.
        zeros: see `widen`.

    Returns:
        `[M, N]` in the dtype of x.
    """
    (M, K), (_, N, groups) = x.shape, scales.shape
    out, x, sizes = aligned((M, N), x.dtype), placed(x), [np.int32(K // groups)]
    extra: list[Any] = []
    if zeros is not None:
        sums = aligned((M, groups), np.float32)
        name = wheel.named(_LIBRARY, f"_ZTSN3ark17moe_decode_detail20MoEDecodeActGroupSumI{SYCL[x.dtype.name]}E")
        launch(wheel, _LIBRARY, name, [x, np.int32(K), np.int32(K // groups), sums, np.int32(groups)], 1, groups, M)
        extra = [placed(zeros), sums]
    name = _name(wheel, "MoEDecodeKernelInt4", scales, zeros is not None)
    arguments = [placed(expert.astype(np.int32)), x, np.int32(K), placed(weight), np.int32(N), np.int32(K // 2)]
    arguments += [placed(scales), np.int32(groups), *extra, *sizes, out]
    launch(wheel, _LIBRARY, name, arguments, _LANES, N // _LANES, M)
    return out
