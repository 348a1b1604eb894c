"""The calls into vllm-xpu-kernels against the schemas of the released wheel.

The kernels need an Intel GPU. What can be held to account without one: the operators' names, arguments and
types, read out of the released binary; and what each call of `xpuquant.xpu_ops` passes, by running it against stand-ins
that are registered under those very schemas, check what the C++ checks, and read the memory as it does.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import support.layers as hand

from xpuquant.kernels.base import Layer, tolerance
from xpuquant.kernels.vllm_xpu import VllmXpu

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
pytestmark = pytest.mark.network

# Operator → its arguments, in the order in which `xpuquant.xpu_ops` passes them.
ARGUMENTS = {
    "int4_gemm_w4a16": "A B bias B_scale B_zp group_size g_idx",
    "fp8_gemm_w8a16": "A B B_scale_ bias_",
    "fp8_gemm": "A B out_dtype A_scale_ B_scale_ bias_",
    "fp4_gemm": "A B A_scale B_scale out_dtype bias_",
    "cutlass_grouped_gemm_interface": (
        "ptr_A ptr_A_scale ptr_B ptr_B_scale ptr_bias ptr_D rows_per_expert N K num_experts"
    ),
}


@pytest.fixture(scope="session")
def schemas(tmp_path_factory) -> dict[str, str]:
    """Operator → schema string, from the newest vllm-xpu-kernels wheel of the package index."""
    folder = tmp_path_factory.mktemp("wheel")
    platforms = [f"--platform={p}_x86_64" for p in ("manylinux_2_28", "manylinux_2_39", "manylinux2014", "linux")]
    wanted = ["vllm-xpu-kernels", "--no-deps", "--only-binary=:all:", "--python-version=3.12", *platforms]
    command = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        if "No matching distribution" in done.stderr and "Retrying" not in done.stderr:
            pytest.fail(done.stderr)
        pytest.skip(f"the package index is out of reach: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (binary,) = (name for name in wheel.namelist() if Path(name).name.startswith("_xpu_C."))
        strings = wheel.read(binary).split(b"\0")
    found = {}
    for name in ARGUMENTS:
        (found[name],) = {s.decode() for s in strings if s.startswith(name.encode() + b"(") and b" -> " in s}
    return found


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_those_of_the_released_operator(name, schemas):
    schema = torch._C.parse_schema(schemas[name])
    assert " ".join(argument.name for argument in schema.arguments) == ARGUMENTS[name]


def as_stored(tensor: torch.Tensor) -> hand.Array:
    """Raw bytes of a contiguous tensor."""
    assert tensor.is_contiguous()
    return tensor.view(torch.uint8).numpy() if tensor.dtype != torch.uint8 else tensor.numpy()


def nibbles(octets: hand.Array) -> hand.Array:
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1).astype(np.int64)


def e8m0(tensor: torch.Tensor) -> hand.Array:
    return 2.0 ** (as_stored(tensor).astype(np.float64) - 127)


def e2m1(tensor: torch.Tensor) -> hand.Array:
    assert tensor.dtype == torch.float4_e2m1fn_x2
    return np.array(hand.E2M1)[nibbles(as_stored(tensor))]


def wide(tensor: torch.Tensor) -> hand.Array:
    return tensor.to(torch.float32).numpy().astype(np.float64)


def finish(y: hand.Array, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    assert bias is None or bias.dtype == dtype
    return torch.from_numpy(y if bias is None else y + wide(bias)).to(dtype)


# Stand-ins: csrc/xpu/onednn/*.h and csrc/xpu/grouped_gemm/, in float64.


def int4_gemm_w4a16(A, B, bias, B_scale, B_zp, group_size, g_idx):
    assert A.dtype in (torch.float16, torch.bfloat16) and B.dtype == torch.int32 and B.stride(-2) == 1
    assert B_scale.is_contiguous() and (B_zp.dim() == 2 or (B_zp.dtype == torch.int8 and B_zp.numel() == 1))
    x = wide(A if g_idx is None else A.index_select(-1, g_idx))
    codes = nibbles(as_stored(B.t()))
    zeros = np.repeat(nibbles(as_stored(B_zp)), group_size, axis=0).T if B_zp.dim() == 2 else B_zp.item()
    weight = (codes - zeros) * np.repeat(wide(B_scale), group_size, axis=0).T
    return finish(x @ weight.T, bias, A.dtype)


def fp8_gemm_w8a16(A, B, B_scale_, bias_):
    assert A.dtype in (torch.float16, torch.bfloat16) and B_scale_.is_contiguous()
    assert B_scale_.dtype == torch.float32 and B.stride(-2) == 1
    (K, N), scales = B.shape, wide(B_scale_)
    if scales.ndim == 2 and (len(scales) > 1 or 1 < scales.size < N):  # blocks; one row of N is a scale per channel
        scales = np.kron(scales, np.ones((K // scales.shape[0], N // scales.shape[1])))
    else:
        assert scales.size in (1, N)
    return finish(wide(A) @ (wide(B) * scales.reshape(-1, N if scales.size > 1 else 1)), bias_, A.dtype)


def fp8_gemm(A, B, out_dtype, A_scale_, B_scale_, bias_):
    assert A.dtype == B.dtype == torch.float8_e4m3fn and A_scale_.shape[1] == B_scale_.shape[0] > 1
    assert A_scale_.dtype == B_scale_.dtype == torch.float8_e8m0fnu
    assert A_scale_.is_contiguous() and B_scale_.is_contiguous() and len(A_scale_) == len(A)
    x = wide(A) * np.repeat(e8m0(A_scale_), 32, axis=1)
    return finish(x @ (wide(B) * np.repeat(e8m0(B_scale_), 32, axis=0)), bias_, out_dtype)


def fp4_gemm(A, B, A_scale, B_scale, out_dtype, bias_):
    assert A_scale.dtype == B_scale.dtype == torch.float8_e8m0fnu and B.stride(-2) == 1
    x = e2m1(A) * np.repeat(e8m0(A_scale), 32, axis=1)
    weight = e2m1(B.t()) * np.repeat(e8m0(B_scale), 32, axis=0).T
    return finish(x @ weight.T, bias_, out_dtype)


def cutlass_grouped_gemm_interface(
    ptr_A, ptr_A_scale, ptr_B, ptr_B_scale, ptr_bias, ptr_D, rows_per_expert, N, K, num_experts
):
    assert ptr_A.is_contiguous() and ptr_B.is_contiguous() and ptr_B_scale.is_contiguous()
    assert rows_per_expert.dtype == torch.int32 and rows_per_expert.tolist() == [len(ptr_A)]
    assert num_experts == 1 == len(ptr_B) and N % 8 == 0
    if ptr_B.dtype in (torch.int8, torch.float4_e2m1fn_x2):
        assert ptr_B_scale.dim() == 3 and ptr_B_scale.shape[1] == N and ptr_A.shape[1] == 2 * ptr_B.shape[2]
        size = K // ptr_B_scale.shape[2]
        if ptr_B.dtype == torch.int8:
            assert ptr_B_scale.dtype == ptr_A.dtype  # its pointer is read as A's
            values, scales = (nibbles(as_stored(ptr_B)) ^ 8) - 8, wide(ptr_B_scale)
        else:
            values, scales = e2m1(ptr_B), e8m0(ptr_B_scale)
        weight = (values * np.repeat(scales, size, axis=2))[0]
    else:
        assert tuple(ptr_B.shape) == (1, K, N)
        weight = wide(ptr_B)[0].T
        if ptr_B_scale.dtype == torch.uint8:
            weight = weight * np.repeat(e8m0(ptr_B_scale)[0], 32, axis=1)
        elif ptr_B_scale.dim() == 1:
            weight = weight * wide(ptr_B_scale)[0]
        else:
            weight = weight * np.kron(wide(ptr_B_scale)[0], np.ones((128, 128))).T
    ptr_D.copy_(finish(wide(ptr_A) @ weight.T, ptr_bias, ptr_A.dtype))
    return ptr_D.clone()


STAND_INS: list[Callable[..., torch.Tensor]] = [
    int4_gemm_w4a16,
    fp8_gemm_w8a16,
    fp8_gemm,
    fp4_gemm,
    cutlass_grouped_gemm_interface,
]


@pytest.fixture(scope="module")  # other tests of the process register the same names
def _registered(schemas):
    library = torch.library.Library("_xpu_C", "FRAGMENT")
    for stand_in in STAND_INS:
        library.define(schemas[stand_in.__name__])
        library.impl(stand_in.__name__, stand_in, "CPU")
    yield
    library._destroy()


@pytest.fixture
def backend(_registered, monkeypatch) -> VllmXpu:
    on_cpu = VllmXpu()
    monkeypatch.setattr(on_cpu, "_device", "cpu")
    monkeypatch.setattr(on_cpu, "unavailable", lambda: None)
    return on_cpu


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("case", hand.CASES)
def test_calls_pass_what_the_operators_read(case, dtype, backend):
    for layer, weight in hand.layers(case):
        x = hand.activations(8, layer.K, dtype)
        difference = hand.error(backend.linear(layer, x), hand.expected(weight, x, layer))
        assert difference < tolerance(dtype, layer.K)


def test_a_single_row_of_blocks_is_not_read_as_channels(backend):
    layer, weight = hand.fp8(256, 128, "block")
    x = hand.activations(8, 128, "BF16")
    assert hand.error(backend.linear(layer, x), hand.expected(weight, x, layer)) < tolerance("BF16", 128)


REFUSED = [
    (lambda: hand.int4_expert(96, 256, 16), "groups of 32 to 256"),
    (lambda: hand.fp8(96, 256, "channel", experts=True), "no channel scales"),
    (lambda: hand.mx(8, 256, "mxfp8", experts=True), "cannot tell"),
    (lambda: hand.int4_linear(96, 80, 16), "multiples of 32"),
    (lambda: hand.mx(96, 32, "mxfp8"), "K must exceed 32"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_operators_cannot_take_is_refused(make, reason, backend):
    layer: Layer = make()[0]
    assert reason in (backend.refuses(layer.scheme, layer.N, layer.K) or "")


def test_refuses_float32_and_ragged_blocks(backend):
    layer, _ = hand.fp8(128, 256, "block")
    assert "16-bit" in backend.refuses(layer.scheme, 128, 256, "F32")
    assert "must divide" in backend.refuses(layer.scheme, 200, 256)


def test_without_an_xpu_it_says_so():
    if VllmXpu().unavailable() is None:
        pytest.skip("there is an XPU here")
    assert "Intel GPU" in (VllmXpu().unavailable() or "")
