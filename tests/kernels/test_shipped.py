"""The device code of the released wheels, executed on a CPU, against the definitions the product is built on.

`scripts/lanes/shipped` makes the environment and runs this for every wheel it downloads.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import support.layers as hand

from xpuquant.kernels.shipped import device, operators, wheel

torch = pytest.importorskip("torch")
WHEELS = wheel.found()
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
# One rounding of the result; `silu` and its like round the activation and then the product.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-22}

pytestmark = pytest.mark.skipif(
    not WHEELS or device.unavailable() is not None,
    reason=device.unavailable() or f"no vllm-xpu-kernels wheel in {wheel.folder()}: run scripts/lanes/shipped",
)


@pytest.fixture(params=WHEELS, ids=lambda w: w.version, scope="module")
def released(request):
    return request.param


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


def test_mxfp4_ties_go_toward_zero(released):
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    codes, scales = operators.mxfp4_quantize(released, x)
    assert scales.tolist() == [[1.0]]
    assert e2m1(codes)[0, :8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


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


def test_fp8_activations_per_block_of_128(released):
    x = hand.activations(3, 512, "F32")
    codes, scales = operators.fp8_quantize(released, x, 128, powers=False)
    assert np.allclose(scales, np.abs(x).reshape(3, 4, 128).max(axis=2) / 448, rtol=1e-6)
    assert hand.error(codes.astype(np.float64) * spread(scales, 128), x.astype(np.float64)) < 0.04


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


def test_swiglustep_reads_halves_and_clamps_after_silu(released, dtype):
    gate_up = (np.random.default_rng(0).normal(size=(4, 192)) * 8).astype(dtype)
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    truth = np.minimum(gate / (1 + np.exp(-gate)), 7) * np.clip(up, -7, 7)
    assert np.allclose(operators.gated(released, "swiglustep", gate_up), truth, rtol=0, atol=50 * 2.0**-8)


def test_relu2_has_no_second_matrix(released, dtype):
    x = np.random.default_rng(0).normal(size=(4, 96)).astype(dtype)
    truth = np.maximum(x.astype(np.float64), 0) ** 2
    assert np.allclose(operators.relu2(released, x), truth, rtol=2 * ROUNDING[np.dtype(dtype).name], atol=0)


@pytest.mark.parametrize("k", [1, 2, 4, 6, 7, 8, 10, 16])
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_rows_go_to_their_experts_and_come_back(released, dtype, k, ids_dtype):
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


def test_tokens_per_expert_that_moe_gather_was_built_for(released):
    old = [1, 2, 4, 6, 7, 8, 10, 16]
    assert operators.gather_instances(released) == (
        old if released.version.startswith("0.1.15") else sorted([*old, 12])
    )
    with pytest.raises(KeyError, match="0 kernels"):
        operators.gather(
            released, np.zeros((5, 8), np.float16), np.ones((1, 5), np.float32), np.zeros((1, 5), np.int32)
        )


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
