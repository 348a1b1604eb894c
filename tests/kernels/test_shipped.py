"""The device code of the released wheels, executed on a CPU, against the definitions the product is built on.

`scripts/lanes/shipped` makes the environment and runs this for every wheel it downloads.
"""

from __future__ import annotations

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
import support.layers as hand
from support.checkpoints import FIXTURES
from support.fuzz.case import command

from xpuquant.kernels.base import tolerance
from xpuquant.kernels.shipped import operators, wheel
from xpuquant.kernels.shipped.backend import Shipped

torch = pytest.importorskip("torch")
WHEELS = wheel.found()
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# One rounding of the result; `silu` and its like round the activation and then the product.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-22}

MISSING = Shipped().unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]


@pytest.fixture(params=WHEELS, ids=lambda w: w.version, scope="module")
def released(request):
    return request.param


@pytest.fixture(autouse=True)
def _recorded(request, record_property, released):
    """For the lane's table."""
    record_property("wheel", str(released))
    record_property("operator", request.node.get_closest_marker("operator").args[0])


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def tensor(array):
    """The same bytes in torch."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def e2m1(codes, low_first=True):
    """uint8 `[M, H/2]` → values `[M, H]`; the contract has the even column in the low nibble."""
    nibbles = [codes & 15, codes >> 4]
    return np.array(hand.E2M1)[np.stack(nibbles if low_first else nibbles[::-1], axis=-1).reshape(len(codes), -1)]


def spread(scales, group):
    return np.repeat(scales.astype(np.float64), group, axis=1)


@pytest.mark.operator("per_token_group_quant_mxfp4")
@pytest.mark.parametrize("H", [32, 96, 576, 8224])
@pytest.mark.parametrize("vectorized", [True, False])
def test_mxfp4_activations_have_the_layout_of_our_weights(released, dtype, H, vectorized):
    x = hand.activations(5, H, "F32").astype(dtype)
    codes, scales = operators.mxfp4_quantize(released, x, vectorized=vectorized)
    wide = x.astype(np.float64)
    peak = np.abs(wide).reshape(5, -1, 32).max(axis=2)
    # The scale is rounded up, so that nothing saturates: one more than the exponent of OCP MX 1.0, except at 6 · 2^n.
    assert np.array_equal(scales, np.exp2(np.ceil(np.log2(peak / 6))))
    scaled = wide / spread(scales, 32)
    decoded = e2m1(codes)
    assert np.abs(decoded - scaled).max() <= 1.0
    assert hand.error(decoded * spread(scales, 32), wide) < 0.2
    for value in np.unique(np.abs(decoded)):
        assert value in hand.E2M1[:8]
    assert (np.abs(decoded - scaled)[..., None] <= np.abs(np.array(hand.E2M1) - scaled[..., None]) + 1e-6).all()
    # Read the wrong way round it is noticed.
    assert hand.error(e2m1(codes, low_first=False) * spread(scales, 32), wide) > 1


@pytest.mark.operator("per_token_group_quant_mxfp4")
def test_mxfp4_ties_go_toward_zero(released):
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    codes, scales = operators.mxfp4_quantize(released, x)
    assert scales.tolist() == [[1.0]]
    assert e2m1(codes)[0, :8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.operator("per_token_group_fp8_quant")
@pytest.mark.parametrize("element", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("vectorized", [True, False])
def test_mxfp8_activations(released, dtype, element, vectorized):
    x = hand.activations(5, 288, "F32").astype(dtype)
    codes, scales = operators.fp8_quantize(released, x, element=element, vectorized=vectorized)
    wide = x.astype(np.float64)
    largest = float(ml_dtypes.finfo(codes.dtype).max)
    peak = np.abs(wide).reshape(5, -1, 32).max(axis=2)
    assert np.array_equal(scales, np.exp2(np.ceil(np.log2(peak / largest))))
    nearest = (wide / spread(scales, 32)).astype(np.float32).astype(codes.dtype)
    assert np.array_equal(codes.view(np.uint8), nearest.view(np.uint8))
    other = {"F8_E4M3": ml_dtypes.float8_e5m2, "F8_E5M2": ml_dtypes.float8_e4m3fn}[element]
    assert not hand.error(codes.view(other).astype(np.float64) * spread(scales, 32), wide) < 0.5


@pytest.mark.operator("per_token_group_fp8_quant")
def test_fp8_activations_per_block_of_128(released):
    x = hand.activations(3, 512, "F32")
    codes, scales = operators.fp8_quantize(released, x, 128, powers=False)
    assert np.allclose(scales, np.abs(x).reshape(3, 4, 128).max(axis=2) / 448, rtol=1e-6)
    assert hand.error(codes.astype(np.float64) * spread(scales, 128), x.astype(np.float64)) < 0.04


@pytest.mark.operator("per_token_group_quant_mxfp4 and _fp8_quant")
@pytest.mark.parametrize("quantize", [operators.mxfp4_quantize, operators.fp8_quantize])
def test_zeros_infinities_and_nan_stay_in_their_group(released, quantize):
    x = hand.activations(4, 128, "F32")
    clean, clean_scales = quantize(released, x)
    spoilt = x.copy()
    spoilt[0, :32], spoilt[1, 3], spoilt[2, 5] = 0, np.inf, np.nan
    codes, scales = quantize(released, spoilt)
    per_group = codes.shape[1] // 4
    assert np.array_equal(codes[:, per_group:].view(np.uint8), clean[:, per_group:].view(np.uint8))
    assert np.array_equal(scales[:, 1:], clean_scales[:, 1:])
    assert not codes[0, :per_group].view(np.uint8).any()
    assert scales[1, 0] == np.inf  # E8M0 255: the group is NaN
    # A NaN does not reach the scale; it becomes the largest code, a finite number.
    decoded = e2m1(codes) if quantize is operators.mxfp4_quantize else codes.astype(np.float64)
    assert decoded[2, 5] == (6 if quantize is operators.mxfp4_quantize else 448)


@pytest.mark.operator("silu, gelu, gelu_tanh, swigluoai _and_mul")
@pytest.mark.parametrize("I", [8, 96, 200, 1056])
@pytest.mark.parametrize("name", [*operators.GATED, "swigluoai"])
def test_gated_activations_are_ours(released, dtype, name, I):
    from xpuquant.layers import gated

    rng = np.random.default_rng(I)
    gate_up = (rng.normal(size=(6, 2 * I)) * 3).astype(dtype)
    gate_up[0, :4] = [0, -0.0, 50, -50]
    found = operators.gated(released, name, gate_up).astype(np.float64)
    interleaved = name == "swigluoai"

    def ours(interleaved, gate_up=gate_up):
        return gated(name, tensor(gate_up), interleaved).float().numpy().astype(np.float64)

    def distance(other):
        return float(np.abs(found - other).max() / np.abs(ours(interleaved)).max())

    assert distance(ours(interleaved)) <= 2 * ROUNDING[np.dtype(dtype).name]
    # The other order of rows, and gate and up exchanged, are noticed.
    assert distance(ours(not interleaved)) > 0.1
    halves = np.roll(gate_up, I, axis=1)
    pairs = gate_up.reshape(6, -1, 2)[:, :, ::-1].reshape(6, -1)
    assert distance(ours(interleaved, np.ascontiguousarray(pairs if interleaved else halves))) > 0.1


@pytest.mark.operator("silu, gelu, gelu_tanh, swigluoai _and_mul")
@pytest.mark.parametrize("name", [*operators.GATED, "swigluoai"])
def test_gated_activations_of_infinities_and_nan_are_ours(released, dtype, name):
    from xpuquant.layers import gated

    edges = np.array([np.inf, -np.inf, np.nan, 0, -0.0, 1, -7, 60000])
    grid = np.stack(np.meshgrid(edges, edges), axis=-1).reshape(1, -1)
    interleaved = name == "swigluoai"
    gate_up = (grid if interleaved else np.concatenate([grid[:, 0::2], grid[:, 1::2]], axis=1)).astype(dtype)
    found = operators.gated(released, name, gate_up).astype(np.float64)
    ours = gated(name, tensor(gate_up), interleaved).float().numpy().astype(np.float64)
    assert np.array_equal(np.isnan(found), np.isnan(ours))
    assert np.allclose(found, ours, rtol=4 * ROUNDING[np.dtype(dtype).name], equal_nan=True)


@pytest.mark.operator("swiglustep_and_mul")
def test_swiglustep_reads_halves_and_clamps_after_silu(released, dtype):
    gate_up = (np.random.default_rng(0).normal(size=(4, 192)) * 8).astype(dtype)
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    truth = np.minimum(gate / (1 + np.exp(-gate)), 7) * np.clip(up, -7, 7)
    assert np.allclose(operators.gated(released, "swiglustep", gate_up), truth, rtol=0, atol=50 * 2.0**-8)


@pytest.mark.operator("relu2_no_mul")
def test_relu2_has_no_second_matrix(released, dtype):
    x = np.random.default_rng(0).normal(size=(4, 96)).astype(dtype)
    truth = np.maximum(x.astype(np.float64), 0) ** 2
    assert np.allclose(operators.relu2(released, x), truth, rtol=2 * ROUNDING[np.dtype(dtype).name], atol=0)


@pytest.mark.operator("remap_hidden_states, moe_gather")
@pytest.mark.parametrize(
    ("k", "dtype", "ids_dtype"),
    [
        *((k, "float16", np.int32) for k in (1, 4, 6, 8)),
        *((2, dtype, ids) for dtype in DTYPES for ids in (np.int32, np.int64)),
    ],
)
def test_rows_go_to_their_experts_and_come_back(released, dtype, k, ids_dtype):
    dtype = DTYPES[dtype]
    M, H, E = 37, 72, 24
    rng = np.random.default_rng(k)
    x = rng.normal(size=(M, H)).astype(dtype)
    ids = np.stack([rng.permutation(E)[:k] for _ in range(M)]).astype(ids_dtype)
    rows, counts, where = operators.remap(released, x, ids, E)
    assert counts.tolist() == np.bincount(ids.ravel(), minlength=E).tolist()
    assert sorted(where.ravel()) == list(range(M * k))
    first = np.concatenate([[0], np.cumsum(counts)])
    assert ((where >= first[ids]) & (where < first[ids + 1])).all()
    assert np.array_equal(rows[where], np.broadcast_to(x[:, None], (M, k, H)))
    weights = rng.uniform(size=(M, k)).astype(np.float32)
    outputs = rng.normal(size=(M * k, H)).astype(dtype)
    truth = np.einsum("mk,mkh->mh", weights.astype(np.float64), outputs[where].astype(np.float64))
    found = operators.gather(released, outputs, weights, where)
    assert hand.error(found, truth) < 2 * ROUNDING[np.dtype(dtype).name]
    if k > 1:
        assert hand.error(operators.gather(released, outputs, weights[:, ::-1], where), truth) > 0.1


@pytest.mark.operator("remap_hidden_states, moe_gather")
def test_experts_of_other_ranks_are_left_out(released):
    M, H, E, k = 16, 64, 8, 2
    rng = np.random.default_rng(0)
    x, ids = rng.normal(size=(M, H)).astype(np.float16), rng.integers(0, E, (M, k)).astype(np.int32)
    expert_map = np.where(np.arange(E) < 4, -1, np.arange(E) - 4)
    rows, counts, where = operators.remap(released, x, ids, 4, expert_map=expert_map)
    assert np.array_equal(where == -1, ids < 4)
    assert counts.tolist() == np.bincount(ids[ids >= 4] - 4, minlength=4).tolist()
    weights = np.ones((M, k), np.float32)
    assert np.allclose(operators.gather(released, rows, weights, where), x * (ids >= 4).sum(axis=1, keepdims=True))


@pytest.mark.operator("remap_hidden_states, moe_gather")
def test_tokens_per_expert_that_moe_gather_was_built_for(released):
    old = [1, 2, 4, 6, 7, 8, 10, 16]
    assert operators.gather_instances(released) == (
        old if released.version.startswith("0.1.15") else sorted([*old, 12])
    )
    with pytest.raises(KeyError, match="0 kernels"):
        operators.gather(
            released, np.zeros((5, 8), np.float16), np.ones((1, 5), np.float32), np.zeros((1, 5), np.int32)
        )


@pytest.mark.operator("reorder_mxfp_scales")
def test_activation_exponents_are_reordered_by_expert(released):
    counts = np.array([3, 0, 5, 64, 4, 1], np.int32)
    scales = np.random.default_rng(0).integers(1, 255, (counts.sum(), 9)).astype(np.uint8)
    found, row, byte = operators.reorder_mx_scales(released, scales, counts), 0, 0
    for count in counts:
        padded = (count + 3) // 4 * 4
        block = found[byte : byte + 9 * padded].reshape(9, padded)
        assert np.array_equal(block[:, :count], scales[row : row + count].T)
        assert not block[:, count:].any()
        row, byte = row + count, byte + 9 * padded


# The grouped GEMM. 72 rows are more than one tile and not two; an expert has no row, another more than a tile takes.

ROWS = np.array([3, 0, 5])
EXPERTS = {
    "int4": lambda dtype, seed: hand.int4_expert(72, 128, 32, scale=dtype, seed=seed),
    "int4 g128": lambda dtype, seed: hand.int4_expert(72, 256, 128, scale=dtype, seed=seed),
    "mxfp4": lambda dtype, seed: hand.mx(72, 128, "mxfp4", experts=True, seed=seed),
    "mxfp8": lambda dtype, seed: hand.mx(72, 128, "mxfp8", experts=True, seed=seed),
    "fp8 tensor": lambda dtype, seed: hand.fp8(72, 128, "tensor", experts=True, seed=seed),
    "fp8 e5m2": lambda dtype, seed: hand.fp8(72, 128, "tensor", experts=True, seed=seed, dtype=ml_dtypes.float8_e5m2),
    "fp8 block": lambda dtype, seed: hand.fp8(384, 256, "block", experts=True, seed=seed),
}


class Stack:
    """Experts as they lie in a file, and the float64 weights `[E, N, K]` they stand for."""

    def __init__(self, make, dtype="F16", E=3):
        layers = [make(dtype, seed) for seed in range(E)]
        self.scheme = layers[0][0].scheme
        self.weight = np.stack([layer.tensors["weight"] for layer, _ in layers])
        self.scale = np.stack([layer.tensors["weight_scale"] for layer, _ in layers])
        if self.scheme.granularity == "tensor":
            self.scale = self.scale.reshape(-1)
        self.truth = np.stack([weight for _, weight in layers])
        self.packed = self.weight.dtype == np.uint8

    def product(self, x, rows=ROWS):
        """float64."""
        experts = np.repeat(np.arange(len(rows)), rows)
        return np.einsum("mk,mnk->mn", x.astype(np.float64), self.truth[experts])

    def run(self, released, x, rows=ROWS, bias=None):
        return operators.grouped_gemm(released, self.scheme, x, self.weight, self.scale, rows, bias)


def transposed(array):
    """The bytes that the last two dimensions have the other way round."""
    return np.ascontiguousarray(array.swapaxes(-1, -2)).reshape(array.shape)


def exchange_halves(array, axis):
    return np.roll(array, array.shape[axis] // 2, axis=axis)


@pytest.mark.operator("cutlass_grouped_gemm_interface (Xe2)")
@pytest.mark.parametrize(
    ("layout", "dtype"),
    # Each is a kernel to build; the two that are left out differ from others by a constant and by one conversion.
    [
        *itertools.product(EXPERTS, ["F16"]),
        *((layout, "BF16") for layout in ("int4", "mxfp4", "mxfp8", "fp8 tensor", "fp8 block")),
    ],
)
def test_the_shipped_gemm_computes_what_float64_does(released, layout, dtype):
    stack = Stack(EXPERTS[layout], dtype)
    x = hand.activations(8, stack.truth.shape[2], dtype)
    found = stack.run(released, x)
    assert hand.error(found, stack.product(x)) < tolerance(dtype, x.shape[1])


@pytest.mark.operator("cutlass_grouped_gemm_interface (Xe2)")
@pytest.mark.parametrize("layout", EXPERTS)
def test_the_shipped_gemm_notices_a_wrong_layout(released, layout):
    stack = Stack(EXPERTS[layout])
    x = hand.activations(8, stack.truth.shape[2], "F16")
    truth, rows_axis = stack.product(x), 1 if stack.packed else 2
    weight, scale, faults = stack.weight, stack.scale, {}
    faults["experts in another order"] = (weight[::-1], scale[::-1])
    scale_axis = {1: 0, 3: 2 if stack.scheme.granularity == "block" else 1}[scale.ndim]
    if scale.ndim == 3:
        faults["gate and up exchanged"] = (exchange_halves(weight, rows_axis), exchange_halves(scale, scale_axis))
        faults["scales transposed"] = (weight, transposed(scale))
    else:
        faults["gate and up exchanged"] = (exchange_halves(weight, rows_axis), scale)
    if stack.packed:
        faults["nibbles exchanged"] = (weight >> 4 | weight << 4, scale)
    else:
        faults["K and N exchanged"] = (transposed(weight), scale)
    if layout.startswith("int4"):
        faults["unsigned for signed"] = (weight ^ 0x88, scale)
    if layout.startswith("mx"):
        faults["exponents one too large"] = (weight, scale + 1)
    for fault, (stack.weight, stack.scale) in faults.items():
        found = stack.run(released, x).astype(np.float64)
        assert not hand.error(found, truth) < 0.1, fault


@pytest.mark.operator("cutlass_grouped_gemm_interface (Xe2)")
@pytest.mark.parametrize("layout", EXPERTS)
def test_the_shipped_gemm_reads_every_code_as_we_do(released, layout):
    from xpuquant.layers import dequantize

    stack = Stack(EXPERTS[layout])
    stored = {
        "weight": tensor_of(stack.weight[0]),
        "weight_scale": tensor_of(stack.scale[:1].reshape(stack.scale.shape[1:])),
    }
    ours = dequantize(stack.scheme, stored, torch.float16).numpy()
    K = ours.shape[1]
    found = np.concatenate(
        [stack.run(released, np.eye(K, dtype=np.float16)[at : at + 8], np.array([8, 0, 0])) for at in range(0, K, 8)]
    ).T
    assert np.array_equal(found, ours)


def tensor_of(array):
    if array.dtype.itemsize == 1 and array.dtype != np.uint8:
        return torch.from_numpy(array.view(np.uint8).copy()).view(getattr(torch, array.dtype.name))
    return tensor(array)


@pytest.mark.operator("cutlass_grouped_gemm_interface (Xe2)")
@pytest.mark.parametrize(
    ("layout", "M"), [("int4", 8), ("int4", 40), ("int4", 260), ("fp8 tensor", 20), ("fp8 tensor", 40)]
)
def test_every_tile_of_the_shipped_gemm(released, layout, M):
    """The host takes larger tiles for more rows to an expert; they are other kernels, with other loads."""
    make = {
        "int4": lambda dtype, seed: hand.int4_expert(264, 128, 32, scale=dtype, seed=seed),
        "fp8 tensor": lambda dtype, seed: hand.fp8(264, 128, "tensor", experts=True, seed=seed),
    }[layout]
    stack = Stack(make, E=1)
    x = hand.activations(M, 128, "F16")
    assert hand.error(stack.run(released, x, np.array([M])), stack.product(x, np.array([M]))) < tolerance("F16", 128)


@pytest.mark.operator("cutlass_grouped_gemm_interface (Xe2)")
@pytest.mark.parametrize(("dtype", "smallest", "largest"), [("F16", 103, 142), ("BF16", 1, 254)])
def test_exponents_that_mx_experts_reach(released, dtype, smallest, largest):
    """An exponent is cast to the dtype of the activations before it multiplies; 0 and 255 are never what E8M0 says."""
    stack = Stack(EXPERTS["mxfp4"], dtype, E=1)
    stack.weight[:] = 0x22  # 1.0 twice

    def weight(exponent):
        """Of the first column, over what E8M0 says."""
        stack.scale[:] = 127
        stack.scale[..., 0] = exponent
        x = np.zeros((1, stack.truth.shape[2]), hand.DTYPES[dtype])
        x[0, 0] = 2.0**15 if exponent < 127 else 2.0**-10
        return float(stack.run(released, x, np.array([1]))[0, 0]) / float(x[0, 0]) / 2.0 ** (exponent - 127)

    assert weight(smallest) == weight(120) == weight(largest) == 1
    assert weight(smallest - 1) == 0
    assert not np.isfinite(weight(largest + 1))


@pytest.mark.operator("all of XpuFusedMoe")
@pytest.mark.parametrize("layout", ["int4", "mxfp4"])
def test_a_whole_layer_of_experts_is_ours(released, layout):
    """Routing, both products, bias, the activation and the sum, all in shipped kernels, against `xpuquant.layers`."""
    from xpuquant.layers import experts, gated

    M, H, I, E, k = 8, 64, 96, 4, 2
    rng = np.random.default_rng(0)
    if layout == "int4":
        make = [
            lambda dtype, seed, N=N, K=K: hand.int4_expert(N, K, 32, seed=seed, scale=dtype)
            for N, K in ((2 * I, H), (H, I))
        ]
        name, interleaved = "silu", False
    else:
        make = [
            lambda dtype, seed, N=N, K=K: hand.mx(N, K, "mxfp4", experts=True, seed=seed)
            for N, K in ((2 * I, H), (H, I))
        ]
        name, interleaved = "swigluoai", True
    up, down = (Stack(m, E=E) for m in make)
    bias = [rng.normal(size=(E, N)).astype(np.float16) for N in (2 * I, H)]
    x = hand.activations(M, H, "F16")
    ids = np.stack([rng.permutation(E)[:k] for _ in range(M)]).astype(np.int32)
    weights = rng.uniform(0.2, 1, (M, k)).astype(np.float32)

    rows, counts, where = operators.remap(released, x, ids, E)
    middle = operators.gated(released, name, up.run(released, rows, counts, bias[0]))
    found = operators.gather(released, down.run(released, middle, counts, bias[1]), weights, where)

    stored = {"gate_up_proj": up.weight, "gate_up_proj_scale": up.scale, "gate_up_proj_bias": bias[0]}
    stored |= {"down_proj": down.weight, "down_proj_scale": down.scale, "down_proj_bias": bias[1]}
    tensors = {key: tensor_of(array) for key, array in stored.items()}

    def ours(interleaved):
        activate = lambda gate_up: gated(name, gate_up, interleaved)  # noqa: E731
        arguments = (tensor(x), torch.from_numpy(weights), torch.from_numpy(ids.astype(np.int64)))
        return experts(up.scheme, tensors, *arguments, activate).float().numpy()

    assert hand.error(found, ours(interleaved).astype(np.float64)) < 2.0**-8
    assert hand.error(found, ours(not interleaved).astype(np.float64)) > 0.1


MOE = (
    "gptqmodel-qwen3moe-w4g32",
    "llmcompressor-qwen3moe-mxfp4",
    "llmcompressor-qwen3moe-fp8-block",
    "llmcompressor-qwen3moe-fp8-tensor",
    "handpacked-gptoss-mxfp4",
    "llmcompressor-gptoss-w4a16",
)


@pytest.mark.operator("cutlass_grouped_gemm_interface (Xe2)")
@pytest.mark.parametrize("name", MOE)
def test_experts_of_a_converted_repo_are_those_of_the_source(released, name, tmp_path, monkeypatch):
    monkeypatch.setattr(wheel, "found", lambda: (released,))
    source, out = str(FIXTURES / name), str(tmp_path / "out")
    assert command("convert", source, out)[0] == 0
    code, text, error = command("verify", out, "--source", source, "--backend", "shipped", "--all", "--json")
    assert code == 0, error
    runs = [run for run in json.loads(text)["kernels"]["runs"] if run["backend"] == "shipped"]
    assert {run["activations"] for run in runs if run["matrix"] in ("gate", "up", "down")} >= {"F16", "BF16"}
