"""The operators of vllm-xpu-kernels, launched as its host code launches them.

Each function names the source file (repository vllm-xpu-kernels, `csrc/`) whose dispatch it repeats: which instance for
which dtype and shape, how many work items, which arguments. The kernels themselves are the wheel's. Arrays are numpy's,
bfloat16 and fp8 from ml_dtypes; M rows, H hidden, I intermediate, E experts, k experts per token.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.shipped.device import aligned, cpu, placed
from xpuquant.kernels.shipped.portable import imported, make_portable
from xpuquant.kernels.shipped.wheel import Wheel

Array = np.ndarray[Any, Any]

# Mangled names of the 16-bit types: PyTorch's and SYCL's; kernels are instantiated for the one or the other.
_TORCH = {"float32": "f", "float16": "N3c104HalfE", "bfloat16": "N3c108BFloat16E"}
SYCL = {
    "float32": "f",
    "float16": "N4sycl3_V16detail9half_impl4halfE",
    "bfloat16": "N4sycl3_V13ext6oneapi8bfloat16E",
}
_FP8 = {"F8_E4M3": "13Float8_e4m3fn", "F8_E5M2": "11Float8_e5m2"}
_FP8_DTYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
# The B_DTYPE of gemm_xe2.hpp by layout and granularity.
_KINDS = {("int4_experts", ""): 1, ("mxfp4_experts", ""): 2, ("mxfp8_experts", ""): 4}
_FP8_KINDS = {"tensor": 3, "block": 5}
_CUTLASS = {"float16": "6half_t", "bfloat16": "10bfloat16_t"}
_CUTLASS_FP8 = {"float8_e4m3fn": "12float_e4m3_t", "float8_e5m2": "12float_e5m2_t"}
_POSITION_OF_GROUP = 7
_GEMM = "libgrouped_gemm_xe_2"
_EPSILON = np.float32(1e-10)

GATED = ("silu", "gelu", "gelu_tanh")
"""Activations of `gated` that read their input as two halves."""


@functools.cache
def _kernel(wheel: Wheel, library: str, name: str, group: int) -> Any:
    """A kernel, built once; the grouped GEMM's for one group size, which cuts the time to build it to a quarter."""
    module = wheel.module(library, name)
    source = imported(module)
    if group:
        module = module.specialized(name, {_POSITION_OF_GROUP: group})
    if library == _GEMM:
        module, source = make_portable(module)
    return cpu().kernel(module, name, source)


def launch(
    wheel: Wheel, library: str, name: str, arguments: list[Any], items: int, *groups: int, group: int = 0
) -> None:
    """`Device.launch`, after checking the number of arguments against the kernel's own signature."""
    expected = wheel.module(library, name).parameters(name)
    if len(expected) != len(arguments):
        raise TypeError(f"{name} of {wheel} takes {len(expected)} arguments, not {len(arguments)}: {expected}")
    cpu().launch(_kernel(wheel, library, name, group), arguments, items, *groups)


def mxfp4_quantize(wheel: Wheel, x: Array, *, vectorized: bool = True) -> tuple[Array, Array]:
    """`per_token_group_quant_mxfp4` (quantization/fp4/mxfp4_quant.cpp): groups of 32 along H.

    Args:
        wheel: whose kernel.
        x: `[M, H]`, H a multiple of 32.
        vectorized: False for the instance that the host takes where H is no multiple of 32.

    Returns:
        Codes uint8 `[M, H/2]`; scales float32 `[M, H/32]`, powers of two.
    """
    M, H = x.shape
    codes, scales = aligned((M, H // 2), np.uint8), aligned((M, H // 32), np.float32)
    kind = _TORCH[x.dtype.name]
    if vectorized:
        name = wheel.named("_C", f"mxfp4_vec_kernelI{kind}EE")
        chunks = H * x.dtype.itemsize // 16
        values = [np.int32(H), np.int32(32), _EPSILON, np.int64(H // 32), np.int64(1)]
        launch(wheel, "_C", name, [codes, scales, placed(x), *values], _work_items(chunks), M)
    else:
        name = wheel.named("_C", f"34per_token_group_quant_mxfp4_kernelI{kind}EE")
        groups = M * H // 32
        block = next(n for n in (16, 8, 4, 2, 1) if groups % n == 0)
        values = [np.int32(32), np.int32(block), _EPSILON, np.int32(H // 32), np.int32(1), np.int8(0)]
        launch(wheel, "_C", name, [codes, scales, placed(x), *values], 32 * block, groups // block)
    return codes, scales


def fp8_quantize(
    wheel: Wheel, x: Array, group: int = 32, *, element: str = "F8_E4M3", powers: bool = True, vectorized: bool = True
) -> tuple[Array, Array]:
    """`per_token_group_fp8_quant` (quantization/fp8/fp8_quant.cpp): MXFP8 where `group` is 32 and `powers` is set.

    Args:
        wheel: whose kernel.
        x: `[M, H]`, H a multiple of `group`.
        group: columns to a scale.
        element: "F8_E4M3" or "F8_E5M2".
        powers: scales are rounded up to powers of two.
        vectorized: False for the instance that the host takes where 16 bytes do not divide a group.

    Returns:
        Codes `[M, H]`; scales float32 `[M, H/group]`.
    """
    M, H = x.shape
    codes = aligned((M, H), _FP8_DTYPES[element])
    scales = aligned((M, H // group), np.float32)
    kind, columns = f"kernelI{_TORCH[x.dtype.name]}", np.int32(H // group)
    # DPC++ mangles the second type with a substitution where the first has named its namespace.
    fp8 = _FP8[element]
    if vectorized:
        name = wheel.named("_C", f"group_quant_8bit_vec_{kind}", fp8)
        chunks = H * x.dtype.itemsize // 16
        values = [np.int32(group), np.int32(H), columns, _EPSILON, np.int8(powers), columns, np.int32(1), np.int8(0)]
        launch(wheel, "_C", name, [codes, scales, placed(x), *values], _work_items(chunks), M)
    else:
        name = wheel.named("_C", f"group_quant_8bit_{kind}", fp8)
        groups = M * H // group
        block = next(n for n in (16, 8, 4, 2, 1) if groups % n == 0)
        values = [np.int32(group), np.int32(block), _EPSILON, np.int8(powers), columns, np.int32(1), np.int8(0)]
        launch(wheel, "_C", name, [codes, scales, placed(x), *values], 32 * block, groups // block)
    return codes, scales


def _work_items(chunks: int) -> int:
    """Of a row whose chunks of 16 bytes are spread over whole subgroups of 32."""
    return max(32, min(-(-chunks // 32) * 32, 1024))


def gated(wheel: Wheel, name: str, gate_up: Array) -> Array:
    """The gated activation of an expert (activation.cpp): `[M, 2I]` → `[M, I]`.

    Args:
        wheel: whose kernel.
        name: "silu", "gelu", "gelu_tanh"; "swigluoai" (with 1.702 and 7.0), "swiglustep" (with 7.0).
        gate_up: in the dtype of the model.
    """
    M, I = gate_up.shape[0], gate_up.shape[1] // 2
    out = aligned((M, I), gate_up.dtype)
    if name in GATED:
        kind, vector = SYCL[gate_up.dtype.name], _vector(I, gate_up.dtype.itemsize)
        tag = f"{len(name) + 7}{name}_kernel"
        kernel = wheel.named("_C", f"act_and_mul_vec_kernelI{kind}Xad", tag, f"ELb1ELi{vector}E")
        launch(wheel, "_C", kernel, [out, placed(gate_up), np.int32(I)], min(I // vector, 1024), M)
        return out
    kernel = wheel.named("_C", f"{len(name) + 15}{name}_and_mul_kernelI{_TORCH[gate_up.dtype.name]}Xad")
    limits = [np.float32(1.702), np.float32(7.0)] if name == "swigluoai" else [np.float32(7.0)]
    launch(wheel, "_C", kernel, [out, placed(gate_up), np.int32(I), *limits], min(I, 1024), M)
    return out


def _vector(I: int, itemsize: int) -> int:
    """Elements that one work item of a gated activation takes at a time."""
    vector, items = 16 // itemsize, min(I, 1024)
    while vector > 1 and (vector // 2) * items >= I:
        vector //= 2
    return vector if I % vector == 0 else 1


def relu2(wheel: Wheel, x: Array) -> Array:
    """`relu2_no_mul` (activation.cpp), the activation of experts without a gate: `[M, I]` → `[M, I]`."""
    M, I = x.shape
    out = aligned((M, I), x.dtype)
    kernel = wheel.named("_C", f"10act_kernelI{SYCL[x.dtype.name]}Xad", "relu2_no_mul_kernel")
    launch(wheel, "_C", kernel, [out, placed(x), np.int32(I)], min(I, 1024), M)
    return out


def remap(wheel: Wheel, x: Array, ids: Array, E: int, *, expert_map: Array | None = None) -> tuple[Array, Array, Array]:
    """`remap_hidden_states` (moe/remap_hidden_states.cpp): rows sorted by expert.

    Args:
        wheel: whose kernels.
        x: `[M, H]`, H a multiple of 16 bytes.
        ids: the experts of each token, int32 or int64 `[M, k]`; -1 after `expert_map`: not on this rank.
        E: experts of this rank.
        expert_map: int32, global id → id of this rank or -1.

    Returns:
        Rows `[M·k, H]`, those of expert 0 first; how many there are of each expert, int32 `[E]`; where the row of each
        token and slot went, int32 `[M, k]`, -1 where it went nowhere.
    """
    (M, H), k, local = x.shape, ids.shape[1], cpu().local(4 * E)
    rows, counts, where = aligned((M * k, H), x.dtype), aligned((E,), np.int32), aligned((M, k), np.int32)
    ids, narrow = placed(ids), np.int8(ids.dtype == np.int32)
    mapping = None if expert_map is None else placed(expert_map.astype(np.int32))
    count = wheel.named("_moe_C", "18RowsPerExpertCount")
    sizes = [np.int32(M), np.int32(k), np.int32(E)]
    launch(wheel, "_moe_C", count, [mapping, counts, ids, narrow, where, *sizes, local], 256, -(-M * k // 256))
    move = wheel.named("_moe_C", f"17RemapHiddenStatesI{SYCL[x.dtype.name]}fLi{k}EEE")
    items = min(256, -(-H * x.dtype.itemsize // 16))
    arguments = [local, placed(x), None, rows, None, mapping, where, counts, ids, narrow]
    launch(wheel, "_moe_C", move, [*arguments, np.int32(H), np.int32(1), np.int32(E)], items, M)
    return rows, counts, where


def gather(wheel: Wheel, rows: Array, weights: Array, where: Array) -> Array:
    """`moe_gather` (moe/moe_gather.cpp): the weighted sum of each token's rows.

    Args:
        wheel: whose kernel.
        rows: `[M·k, H]`, as `remap` ordered them.
        weights: float32 `[M, k]`.
        where: int32 `[M, k]`, from `remap`.

    Returns:
        `[M, H]` in the dtype of `rows`. KeyError where the wheel has no instance for k.
    """
    (M, k), H = weights.shape, rows.shape[1]
    out, elements = aligned((M, H), rows.dtype), 16 // rows.dtype.itemsize
    while H % elements:
        elements //= 2
    name = wheel.named("_moe_C", f"9MoeGatherI{SYCL[rows.dtype.name]}Li{k}ELi{elements}EEE")
    arguments = [out, placed(rows), placed(weights.astype(np.float32)), placed(where), np.int32(H)]
    launch(wheel, "_moe_C", name, arguments, 256, M)
    return out


def gather_instances(wheel: Wheel) -> list[int]:
    """Every k that `moe_gather` was built for."""
    names = (n.split("9MoeGather")[1] for n in wheel.kernels("_moe_C") if "9MoeGatherIf" in n)
    return sorted({int(name.split("Li")[1].split("E")[0]) for name in names})


def reorder_mx_scales(wheel: Wheel, scales: Array, rows_per_expert: Array) -> Array:
    """`reorder_mxfp_scales` (moe/reorder_mxfp_scales.cpp): activation exponents for the Xe3 mainloop.

    Args:
        wheel: whose kernels.
        scales: uint8 `[rows, K/32]`, the rows of expert 0 first.
        rows_per_expert: int32 `[E]`.

    Returns:
        uint8, one block `[K/32, m]` after the other, m the expert's rows rounded up to 4; zeros where no row is.
    """
    E, columns = len(rows_per_expert), scales.shape[1]
    padded = int(((rows_per_expert + 3) // 4 * 4).sum())
    out, first, to = aligned((padded * columns,), np.uint8), aligned((E,), np.int32), aligned((E,), np.int32)
    counts = placed(rows_per_expert.astype(np.int32))
    prefix = wheel.named("_moe_C", "23ReorderMxfpScalesPrefix")
    launch(wheel, "_moe_C", prefix, [counts, first, to, np.int32(E)], 1, 1)
    copy = wheel.named("_moe_C", "21ReorderMxfpScalesCopy")
    arguments = [placed(scales), out, counts, first, to, np.int32(columns), np.int32(E)]
    launch(wheel, "_moe_C", copy, arguments, 256, -(-padded // 64))
    return out


def grouped_gemm(
    wheel: Wheel, scheme: Scheme, x: Array, weight: Array, scale: Array, rows: Array, bias: Array | None = None
) -> Array:
    """`cutlass_grouped_gemm_interface` (xpu/grouped_gemm/xe_2/grouped_gemm_xe2_interface.hpp) on the bytes of a stack.

    Args:
        wheel: whose kernel.
        scheme: of the experts.
        x: float16 or bfloat16 `[M, K]`, the rows of expert 0 first.
        weight: as stored: uint8 `[E, N, K/2]`, or fp8 `[E, K, N]`.
        scale: as stored; for int4 in the dtype of x.
        rows: int32 `[E]`, how many rows each expert has.
        bias: `[E, N]` in the dtype of x.

    Returns:
        `[M, N]` in the dtype of x. KeyError where the wheel has no instance.
    """
    E, (M, K) = len(weight), x.shape
    packed = weight.dtype == np.uint8
    N = weight.shape[1] if packed else weight.shape[2]
    policy, items = _policy(packed, M // E)
    kind = _FP8_KINDS[scheme.granularity] if scheme.layout == "fp8_experts" else _KINDS[scheme.layout, ""]
    element = "tEh" if packed else _CUTLASS_FP8[weight.dtype.name]
    parts = (_CUTLASS[x.dtype.name], element, f"ENS_{len(policy)}{policy}E", f"B_DTYPEE{kind}E")
    name = wheel.named(_GEMM, *parts)
    group = scheme.group_size if kind != _FP8_KINDS["tensor"] else 0
    out, counter = aligned((M, N), x.dtype), aligned((1,), np.int32)
    pointers = [placed(x), placed(weight), placed(scale), None if bias is None else placed(bias), out]
    sizes = [np.int32(E), *([np.int32(group)] if group else []), np.int32(N), np.int32(K)]
    arguments = [*pointers, placed(rows.astype(np.int32)), *sizes, counter, cpu().local(4)]
    # One work group walks all tiles: with more, the first resets the counter that the others may have used by then.
    launch(wheel, _GEMM, name, arguments, items, 1, group=group)
    return out


def _policy(packed: bool, average: int) -> tuple[str, int]:
    """The tile that the host chooses by the average number of rows, and its work items."""
    if packed:
        limits, last = (
            [(4, "w4a16_policy_m_8"), (8, "w4a16_policy_m_16"), (128, "w4a16_policy_m_32")],
            ("w4a16_policy", 512),
        )
    else:
        limits, last = [(8, "w8a16_policy_m_16"), (32, "w8a16_policy_m_32")], ("w8a16_policy", 128)
    return next(((name, 64) for limit, name in limits if average <= limit), last)
