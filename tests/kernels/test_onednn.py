"""oneDNN reads the converted bytes as the contract says, and would notice if they were anything else."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import support.layers as hand

from xpuquant.errors import DamagedError, EnvironmentFault
from xpuquant.kernels import backends
from xpuquant.kernels.base import Layer, tolerance
from xpuquant.kernels.onednn import api
from xpuquant.kernels.onednn import library as _dnnl_library
from xpuquant.kernels.onednn.backend import OneDNN

BACKEND = OneDNN()


@pytest.fixture(autouse=True)
def _installed():
    missing = BACKEND.unavailable()
    if missing is not None:
        pytest.skip(missing)


def narrowest(layer: Layer) -> str:
    """The activation dtype of the fewest bits that this processor has an int4 matmul for: BF16, F16 or F32."""
    (first, *_) = (dtype for dtype in hand.DTYPES if not BACKEND.refuses(layer.scheme, layer.N, layer.K, dtype))
    return first


def difference(layer: Layer, weight: hand.Array, M: int = 8) -> float:
    x = hand.activations(M, layer.K, "F32")
    return hand.error(BACKEND.linear(layer, x), hand.expected(weight, x, layer))


def test_weights_zero_to_seven_come_out_in_order():
    layer, _ = hand.int4_linear(8, 32, 32, scale="F32")
    layer.tensors["qweight"][:] = 0x76543210
    layer.tensors["scales"][:] = 1
    x = np.eye(32, dtype=np.float32)[:8]  # row k picks column k of the weight
    assert BACKEND.linear(layer, x)[:, 0].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1]


def test_signed_weights_of_an_expert_come_out_in_order():
    layer, _ = hand.int4_expert(8, 32, 32, scale="F32")
    layer.tensors["weight_scale"][:] = 1
    layer.tensors["weight"][:] = np.tile(np.array([0x98, 0xBA, 0xDC, 0xFE, 0x10, 0x32, 0x54, 0x76], np.uint8), 2)
    x = np.eye(32, dtype=np.float32)[:16]
    assert BACKEND.linear(layer, x)[:, 0].tolist() == list(range(-8, 8))


# Each of these is a conversion gone wrong. The unbroken layer is within tolerance; none of these may be.
def _swapped_nibbles(t):
    octets = t["qweight"].view(np.uint8)
    return {**t, "qweight": (octets >> 4 | octets << 4).view(np.int32)}


def _transposed_scales(t):
    return {**t, "scales": np.ascontiguousarray(t["scales"].T).reshape(t["scales"].shape)}


def _signed_nibbles(t):
    return {**t, "qweight": t["qweight"] ^ np.int32(-0x77777778)}


def _words_transposed(t):
    return {**t, "qweight": np.ascontiguousarray(t["qweight"].T).reshape(t["qweight"].shape)}


def _zeros_minus_one(t):
    fields = np.ascontiguousarray(t["qzeros"]).view(np.uint32) - np.uint32(0x11111111)
    return {**t, "qzeros": fields.view(np.int32)}


def _zeros_transposed(t):
    return {**t, "qzeros": np.ascontiguousarray(t["qzeros"].T).reshape(t["qzeros"].shape)}


def _order_shifted(t):
    return {**t, "g_idx": np.roll(t["g_idx"], 1)}


def _order_inverted(t):
    return {**t, "g_idx": np.argsort(t["g_idx"]).astype(np.int32)}


def _one_nibble(t):
    broken = t["qweight"].copy()
    broken[5, 3] ^= 0x7 << 8
    return {**t, "qweight": broken}


def _one_scale(t):
    broken = t["scales"].copy()
    broken[1, 5] *= 1.01
    return {**t, "scales": broken}


BREAKS = [
    _swapped_nibbles,
    _transposed_scales,
    _signed_nibbles,
    _words_transposed,
    _zeros_minus_one,
    _zeros_transposed,
    _order_shifted,
    _order_inverted,
    _one_nibble,
    _one_scale,
]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__.strip("_").replace("_", " "))
def test_a_broken_layout_is_noticed(break_it):
    layer, weight = hand.int4_linear(96, 256, 32, scale="F32", symmetric=False, act_order=True)
    assert difference(layer, weight) < tolerance("F32", 256)
    broken = replace(layer, tensors=break_it(layer.tensors))
    assert difference(broken, weight) > 100 * tolerance("F32", 256)


def test_unsigned_nibbles_in_an_expert_are_noticed():
    layer, weight = hand.int4_expert(96, 256, 32, scale="F32")
    assert difference(layer, weight) < tolerance("F32", 256)
    broken = replace(layer, tensors={**layer.tensors, "weight": layer.tensors["weight"] ^ np.uint8(0x88)})
    assert difference(broken, weight) > 0.1


def test_up_and_gate_swapped_are_noticed():
    layer, weight = hand.int4_expert(96, 256, 32, scale="F32")
    stored = layer.tensors["weight"]
    broken = replace(layer, tensors={**layer.tensors, "weight": np.concatenate([stored[48:], stored[:48]])})
    assert difference(broken, weight) > 0.1


@pytest.mark.parametrize("role", ["qweight", "scales", "qzeros"])
def test_a_short_tensor_is_refused_not_read_beyond(role):
    layer, weight = hand.int4_linear(96, 256, 32, scale="F32", symmetric=False)
    cut = replace(layer, tensors={**layer.tensors, role: layer.tensors[role][:-1]})
    with pytest.raises(DamagedError, match="where the kernel reads"):
        difference(cut, weight)


@pytest.mark.parametrize(("N", "K", "g"), [(8, 32, 32), (24, 96, 32), (500, 4096, 128), (17, 160, 160)])
def test_odd_and_large_shapes(N, K, g):
    layer, weight = hand.int4_linear(N, K, g, scale="F16")
    assert difference(layer, weight, M=33) < tolerance("F32", K)


def test_reason_of_a_refusal_is_onednn_s_own():
    layer, _ = hand.fp8(96, 256, "channel")
    reason = BACKEND.refuses(layer.scheme, 96, 256, "F32")
    if reason is None:
        pytest.skip("oneDNN multiplies FP8 here")
    assert reason.startswith("no oneDNN matmul of F8_E4M3 weights with F32 activations") and "unsupported" in reason


def test_reasons_that_a_verification_asks_for_are_asked_together(monkeypatch):
    """A process answers in a third of a second: one for a model's linears and experts, in all activations. Each says
    what it says when it is asked alone."""
    linear = hand.int4_linear(96, 256, 32, scale="F16")[0].scheme
    schemes = [linear, replace(linear, layout="int4_experts")]
    asked: list[list[api.Matmul]] = []
    dispatched = api._dispatched

    def counted(matmuls):
        asked.append(matmuls)
        return dispatched(matmuls)

    monkeypatch.setattr(api, "_dispatched", counted)
    monkeypatch.setattr(api, "_told", {})
    said = [BACKEND.refuses(scheme, 96, 256, dtype) for scheme in schemes for dtype in ("F32", "F16", "BF16")]
    if not any(said):
        pytest.skip("oneDNN multiplies int4 in every activation here")
    assert len(asked) == 1
    assert [api._told[matmul] for matmul in asked[0]] == [dispatched([matmul])[0] for matmul in asked[0]]
    assert all("unsupported" in reason or "isa" in reason for reason in said if reason is not None)


def test_groups_that_do_not_divide_k_are_refused_by_every_release():
    """oneDNN 2025.2 takes them."""
    layer, _ = hand.int4_linear(96, 256, 32)
    reason = BACKEND.refuses(replace(layer.scheme, group_size=96), 96, 256, "F32")
    assert reason == "groups of 96 do not divide K=256"


def test_a_missing_distribution_is_named_with_the_fix():
    with pytest.raises(EnvironmentFault, match=r"no-such is not installed: pip install 'xpuquant\[onednn\]'"):
        _dnnl_library._path("no-such", "libno.so")


def test_implementation_is_named():
    layer, _ = hand.int4_linear(96, 256, 32)
    assert ":" in BACKEND.implementation(layer.scheme, 96, 256, "F32")


@pytest.mark.parametrize("dtype", hand.DTYPES)
def test_reference_code_is_too_slow_for_whole_linears(dtype, monkeypatch):
    layer, _ = hand.int4_linear(96, 256, 32)
    monkeypatch.setattr(BACKEND, "refuses", lambda scheme, N, K, asked: None if asked == dtype else "not this one")
    for name, fast in (("brg_matmul:avx2", True), ("jit:gemm:any", True), ("ref:any", False), ("ref_int8:any", False)):
        monkeypatch.setattr(BACKEND, "implementation", lambda scheme, N, K, asked, name=name: f"{name} {asked}")
        assert BACKEND.is_fast(layer.scheme, 96, 256) is fast
    monkeypatch.setattr(BACKEND, "refuses", lambda *_: "none of them")
    assert not BACKEND.is_fast(layer.scheme, 96, 256)


def test_memory_is_given_back():
    layer, _ = hand.int4_linear(1024, 1024, 64)  # 0.5 MB of weights
    x = hand.activations(1, 1024, narrowest(layer))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(20):
        BACKEND.linear(layer, x)
    before = resident()
    for _ in range(100):
        BACKEND.linear(layer, x)
    assert resident() - before < 20e6  # 50 MB if each call kept its copy


RUN = """
import support.layers as hand
from xpuquant.kernels.onednn.backend import OneDNN
BACKEND = OneDNN()
layer, weight = hand.int4_linear(96, 256, 32)
for dtype in hand.DTYPES:
    if BACKEND.refuses(layer.scheme, 96, 256, dtype) is None:
        x = hand.activations(8, 256, dtype)
        assert hand.error(BACKEND.linear(layer, x), hand.expected(weight, x, layer)) < 4e-3
assert dtype == "F32" and BACKEND.refuses(layer.scheme, 96, 256, dtype) is None, "every processor has this one"
"""
TORCH = """
import torch
a = torch.randn(64, 64, dtype=torch.bfloat16)
assert torch.allclose(torch.nn.functional.linear(a, a).float(), a.float() @ a.float().T, rtol=2e-2, atol=0.2)
"""


@pytest.mark.parametrize("order", [RUN, TORCH + RUN + TORCH, RUN + TORCH + RUN], ids=["alone", "after", "before"])
def test_lives_with_torch_in_one_process(order, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(hand.__file__).parent.parent))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.delenv("OCL_ICD_FILENAMES", raising=False)
    done = subprocess.run([sys.executable, "-P", "-c", order], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stdout_stays_ours(capfd):
    for backend in (BACKEND, backends()["reference"]):
        layer, _ = hand.mx(96, 256, "mxfp4")
        backend.refuses(layer.scheme, 96, 256)
    assert capfd.readouterr().out == ""


def test_threads_compute_side_by_side_what_one_computes():
    """Streams and scratchpads are each thread's own; more products than primitives are kept for."""
    cases = [hand.int4_linear(8 * n, 32 * k, 32, scale="F32") for n in (1, 5, 33) for k in (2, 7, 40)]
    given = [(layer, hand.activations(M, layer.K, "F32")) for layer, _ in cases for M in (1, 8, 33)] * 4
    one_by_one = [BACKEND.linear(layer, x) for layer, x in given]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(lambda call: BACKEND.linear(*call), given))
    assert all(np.array_equal(a, b) for a, b in zip(one_by_one, at_once, strict=True))
