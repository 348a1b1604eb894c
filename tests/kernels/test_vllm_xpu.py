"""The calls into vllm-xpu-kernels against the schemas of every released wheel that serves.

The kernels need an Intel GPU. What can be held to account without one: the operators' names, arguments and
types, read out of the released binaries (`xpuquant/xpu_releases.json`); and what each call of `xpuquant.xpu_ops`
passes, by running it against stand-ins that are registered under those schemas (`tests/support/xpu_stand_ins.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import support.layers as hand

from xpuquant import ark_ops
from xpuquant.kernels.base import Layer, tolerance
from xpuquant.kernels.vllm_xpu import VllmXpu
from xpuquant.xpu_releases import Release, served

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
from support import xpu_stand_ins

# Operator → its arguments, in the order in which `xpuquant.xpu_ops` passes them.
ARGUMENTS = {
    "int4_gemm_w4a16": "A B bias B_scale B_zp group_size g_idx",
    "fp8_gemm_w8a16": "A B B_scale_ bias_",
    "fp8_gemm": "A B out_dtype A_scale_ B_scale_ bias_",
    "fp4_gemm": "A B A_scale B_scale out_dtype bias_",
    "cutlass_grouped_gemm_interface": (
        "ptr_A ptr_A_scale ptr_B ptr_B_scale ptr_bias ptr_D rows_per_expert N K num_experts"
    ),
    "per_token_group_fp8_quant": (
        "input output_q output_s group_size eps fp8_min fp8_max scale_ue8m0 "
        "dummy_is_scale_transposed dummy_is_tma_aligned"
    ),
    "per_token_group_quant_mxfp4": "input output_q output_s group_size eps",
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("version", served(), ids=lambda release: release.version)
def test_arguments_are_those_of_the_released_operator(name, version):
    schema = torch._C.parse_schema(version.operators[name])
    assert " ".join(argument.name for argument in schema.arguments) == ARGUMENTS[name]


@pytest.fixture(scope="module", params=served(), ids=lambda release: release.version)
def release(request) -> Iterator[Release]:
    """Each release that serves, with stand-ins that behave as it does."""
    with xpu_stand_ins.registered(request.param):
        yield request.param


@pytest.fixture
def backend(release, monkeypatch) -> VllmXpu:
    on_cpu = VllmXpu()
    monkeypatch.setattr(on_cpu, "_device", "cpu")
    monkeypatch.setattr(on_cpu, "unavailable", lambda: None)
    from support.ark import moe

    monkeypatch.setattr(ark_ops, "ark", lambda: SimpleNamespace(moe=moe))
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


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4"])
def test_a_single_group_of_columns_is_not_read_as_a_scale_per_token(kind, backend):
    """K = 32, of a whole layer or of a rank's part of one."""
    layer, weight = hand.mx(96, 32, kind)
    x = hand.activations(8, 32, "BF16")
    assert hand.error(backend.linear(layer, x), hand.expected(weight, x, layer)) < tolerance("BF16", 32)


@pytest.mark.parametrize("rows", [64, 16, 128])
def test_blocks_of_any_rows_are_computed_in_every_release(rows, backend):
    """N = 576 in blocks of 64 rows is DeepSeek's and Kimi's `kv_a_proj_with_mqa`."""
    layer, weight = hand.fp8(640 if rows == 128 else 576, 384, "block", rows=rows)
    x = hand.activations(8, 384, "BF16")
    assert hand.error(backend.linear(layer, x), hand.expected(weight, x, layer)) < tolerance("BF16", 384)


def test_w8a16_would_get_such_blocks_wrong_where_it_knows_squares_only(release):
    """Why blocks do not go there: the releases that vLLM 0.32 and 0.33 pin compute something else, or refuse."""
    layer, weight = hand.fp8(576, 384, "block", rows=64)
    x = hand.activations(8, 384, "BF16")
    a = torch.from_numpy(x.astype(np.float32)).bfloat16()
    codes = torch.from_numpy(layer.tensors["weight"].view(np.uint8)).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(layer.tensors["weight_scale"])
    try:
        got = torch.ops._xpu_C.fp8_gemm_w8a16(a, codes.t(), scale, None).float().numpy()
        right = hand.error(got, hand.expected(weight, x, layer)) < tolerance("BF16", 384)
    except RuntimeError:
        right = False
    assert right == release.takes_rectangular_blocks == (release.number >= (0, 1, 16, 1))


REFUSED = [
    (lambda: hand.int4_expert(96, 256, 16), "groups of 32 to 256"),
    (lambda: hand.fp8(96, 256, "channel", experts=True), "no channel scales"),
    (lambda: hand.mx(8, 256, "mxfp8", experts=True), "cannot tell"),
    (lambda: hand.int4_linear(96, 80, 16), "multiples of 32"),
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
