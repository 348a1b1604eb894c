"""The float layouts as bytes: golden files, what a kernel is handed, how much is made at once, broken repos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.floats import (
    EXPERTS,
    Floats,
    block,
    channel,
    expert_modules,
    expert_weights,
    fp8_tensors,
    mx_tensors,
    mxfp4,
    mxfp4_ct_config,
    mxfp8,
    random,
    tensor,
)
from support.ints import DOWN, Pico, convert

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.layouts import layouts_by_name
from xpuquant.formats.packing.convert_loops import transpose_bytes
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import PIECE_BYTES
from xpuquant.kernels.base import Layer
from xpuquant.kernels.reference import dequantize

FP8 = {"quant_method": "fp8"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


# Golden bytes: written out in full, so that a change of the contract is a change of this file.


def counted(element: str, N: int, K: int, first: int, rows: int, columns: int, scales) -> Floats:
    """Codes first, first + 1, ... row by row, modulo the number of codes."""
    top = 16 if element == "e2m1" else 128
    codes = ((first + np.arange(N * K)) % top).astype(np.uint8).reshape(N, K)
    return Floats(element, codes, np.array(scales), rows, columns)


def shown(array) -> str:
    return array.tobytes().hex(" ", 4)


def test_golden_fp8_linear(tmp_path):
    weight = counted("e4m3", 2, 8, 0, 1, 8, np.array([[0.5], [2]], np.float32))
    parts = fp8_tensors(weight, shape=(2,)) | {"input_scale": np.array([0.25], np.float16)}
    out = convert(Pico(FP8, {DOWN: parts}).write(tmp_path / "in"), tmp_path / "out")
    assert shown(out.array(f"{DOWN}.weight")) == "00010203 04050607 08090a0b 0c0d0e0f"
    assert shown(out.array(f"{DOWN}.weight_scale")) == "0000003f 00000040"
    assert shown(out.array(f"{DOWN}.input_scale")) == "0000803e"


def test_golden_fp8_blocks(tmp_path):
    weight = counted("e4m3", 256, 384, 0, 128, 128, np.array([[1, 2, 4], [8, 16, 32]], np.float32))
    parts = fp8_tensors(weight, "weight_scale_inv")
    out = convert(Pico(BLOCKS, {DOWN: parts}).write(tmp_path / "in"), tmp_path / "out")
    assert shown(out.array(f"{DOWN}.weight_scale")) == "0000803f 00000041 00000040 00008041 00008040 00000042"


def test_golden_fp8_experts(tmp_path):
    one = np.array([[1]], np.float32)
    weights = {
        (0, "gate"): counted("e4m3", 2, 4, 0x00, 2, 4, one),
        (0, "up"): counted("e4m3", 2, 4, 0x10, 2, 4, one),
        (0, "down"): counted("e4m3", 4, 2, 0x20, 4, 2, one * 2),
    }
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, shape=()))
    out = convert(Pico(FP8, modules).write(tmp_path / "in"), tmp_path / "out")
    assert shown(out.array(f"{EXPERTS}.gate_up_proj")) == "00041014 01051115 02061216 03071317"
    assert shown(out.array(f"{EXPERTS}.gate_up_proj_scale")) == "0000803f"
    assert shown(out.array(f"{EXPERTS}.down_proj")) == "20222426 21232527"
    assert shown(out.array(f"{EXPERTS}.down_proj_scale")) == "00000040"


def test_golden_mxfp4_linear(tmp_path):
    weight = counted("e2m1", 2, 64, 0, 1, 32, np.array([[0x7A, 0x7B], [0x7C, 0xFF]], np.uint8))
    out = convert(Pico(mxfp4_ct_config(), {DOWN: mx_tensors(weight)}).write(tmp_path / "in"), tmp_path / "out")
    assert shown(out.array(f"{DOWN}.weight")[:, :8]) == "10325476 98badcfe 10325476 98badcfe"
    assert shown(out.array(f"{DOWN}.weight_scale")) == "7a7c7bff"


def mx_stack(element: str) -> dict[tuple[int, str], Floats]:
    """H = I = 32. Gate counts from 0, up from 5, down from 10; their exponents are 1, 2 and 3."""
    firsts = {(0, "gate"): (0, 1), (0, "up"): (5, 2), (0, "down"): (10, 3)}
    return {
        key: counted(element, 32, 32, first, 1, 32, np.full((32, 1), exponent, np.uint8))
        for key, (first, exponent) in firsts.items()
    }


@pytest.mark.parametrize("alternating", [False, True])
def test_golden_mxfp4_experts(tmp_path, alternating):
    modules = expert_modules(mx_stack("e2m1"), mx_tensors)
    config = {"model_type": "gpt_oss"} if alternating else {}
    out = convert(Pico(mxfp4_ct_config(), modules, config=config).write(tmp_path / "in"), tmp_path / "out")
    rows = [shown(row[:4]) for row in out.array(f"{EXPERTS}.gate_up_proj")[0]]
    gate, up = "10325476", "6587a9cb"
    assert rows == ([gate, up] * 32 if alternating else [gate] * 32 + [up] * 32)
    scale = "01020102 " * 16 if alternating else "01010101 " * 8 + "02020202 " * 8
    assert shown(out.array(f"{EXPERTS}.gate_up_proj_scale")) == scale.strip()
    assert shown(out.array(f"{EXPERTS}.down_proj")[0, 0]) == "badcfe10 32547698 badcfe10 32547698"


def test_golden_mxfp8_experts(tmp_path):
    modules = expert_modules(mx_stack("e4m3"), mx_tensors)
    out = convert(Pico(mxfp4_ct_config(), modules).write(tmp_path / "in"), tmp_path / "out")
    stored = out.array(f"{EXPERTS}.gate_up_proj")
    assert stored.shape == (1, 32, 64)
    assert shown(stored[0, 0]) == "00204060 " * 8 + " ".join(["05254565"] * 8)
    assert shown(stored[0, 31]) == "1f3f5f7f " * 8 + " ".join(["24446404"] * 8)
    assert shown(out.array(f"{EXPERTS}.gate_up_proj_scale")) == "01010101 " * 8 + " ".join(["02020202"] * 8)


# What a kernel is handed means the same: the reference kernel reads it by code of its own.


def linears():
    yield "tensor", tensor(48, 64), lambda w: fp8_tensors(w, shape=(1,)), FP8
    yield "channel", channel(48, 64), fp8_tensors, FP8
    yield "block", block(320, 256), lambda w: fp8_tensors(w, "weight_scale_inv"), BLOCKS
    yield "e5m2", random("e5m2", 48, 64, 1, 64), fp8_tensors, FP8
    yield "mxfp4", mxfp4(48, 96), mx_tensors, mxfp4_ct_config()
    yield "mxfp8", mxfp8(48, 96), mx_tensors, mxfp4_ct_config()


@pytest.mark.parametrize(("weight", "pack", "config"), [case[1:] for case in linears()], ids=[c[0] for c in linears()])
def test_the_reference_kernel_reads_linears_whole_and_in_part(tmp_path, weight, pack, config):
    out = convert(Pico(config, {DOWN: pack(weight)}).write(tmp_path / "in"), tmp_path / "out")
    stored = out.repo.modules[DOWN]
    layout = out.repo.layout(stored)
    (matrix,) = layout.matrices(stored)
    step = stored.scheme.block_n or 8
    for start, stop in ((0, weight.N), (step, 3 * step), (2 * step, 2 * step + 8)):
        layer = Layer(stored.scheme, stop - start, weight.K, layout.layer(stored, matrix, start, stop))
        np.testing.assert_array_equal(dequantize(layer), weight.values[start:stop])


def stacks():
    def of_one_scale(N, K, seed):
        return replace(tensor(N, K, seed), scales=np.array([[seed // 10 + 1]], np.float32))

    yield "tensor", of_one_scale, lambda w: fp8_tensors(w, shape=(1,)), FP8
    yield "block", block, lambda w: fp8_tensors(w, "weight_scale_inv"), BLOCKS
    yield "mxfp4", mxfp4, mx_tensors, mxfp4_ct_config()
    yield "mxfp8", mxfp8, mx_tensors, mxfp4_ct_config()


@pytest.mark.parametrize("model", [{}, {"model_type": "gpt_oss"}], ids=["halves", "alternating"])
@pytest.mark.parametrize(("make", "pack", "config"), [case[1:] for case in stacks()], ids=[c[0] for c in stacks()])
def test_the_reference_kernel_reads_experts_whole_and_in_part(tmp_path, make, pack, config, model):
    if model and config is BLOCKS:
        return  # refused: tests/formats/test_gpt_oss.py
    weights = expert_weights(make, H=256, I=384)
    modules = expert_modules(weights, pack)
    for name, parts in modules.items():
        parts["bias"] = np.arange(256 if "down" in name else 384).astype(np.float16)
    out = convert(Pico(config, modules, config=model).write(tmp_path / "in"), tmp_path / "out")
    stored = out.repo.modules[EXPERTS]
    layout = out.repo.layout(stored)
    for matrix in layout.matrices(stored):
        weight = weights[matrix.expert, matrix.role]
        for start, stop in ((0, weight.N), (128, 256), (128, 136)):
            tensors = layout.layer(stored, matrix, start, stop)
            layer = Layer(stored.scheme, stop - start, weight.K, tensors)
            np.testing.assert_array_equal(dequantize(layer), weight.values[start:stop])
            np.testing.assert_array_equal(tensors["bias"], np.arange(start, stop))
            assert all(array.flags.c_contiguous for name, array in tensors.items() if name != "bias")


def test_a_block_of_scales_is_not_cut(tmp_path):
    parts = fp8_tensors(block(256, 128), "weight_scale_inv")
    out = convert(Pico(BLOCKS, {DOWN: parts}).write(tmp_path / "in"), tmp_path / "out")
    stored = out.repo.modules[DOWN]
    layout = out.repo.layout(stored)
    with pytest.raises(ValueError, match="row 8 is inside a block of 128 rows"):
        layout.layer(stored, layout.matrices(stored)[0], 8, 16)


# Memory: pieces of a real model's size, planned but not made.


@pytest.mark.parametrize("name", ["fp8_experts", "mxfp8_experts", "mxfp4_experts"])
def test_pieces_of_large_experts_stay_small(name):
    H, I, E = 7168, 2048, 2
    tensors = {}

    def add(tensor_name, dtype, shape):
        size = int(np.prod(shape)) * (4 if dtype == "F32" else 1)
        tensors[tensor_name] = Tensor(tensor_name, dtype, shape, "model.safetensors", 0, size)

    for e in range(E):
        for part, N, K in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
            module = f"{EXPERTS}.{e}.{part}"
            if name == "mxfp4_experts":
                add(f"{module}.weight_packed", "U8", (N, K // 2))
            else:
                add(f"{module}.weight", "F8_E4M3", (N, K))
            if name == "fp8_experts":
                add(f"{module}.weight_scale_inv", "F32", (N // 128, K // 128))
            else:
                add(f"{module}.weight_scale", "U8", (N, K // 32))
    plan = make_plan(Checkpoint({}, BLOCKS, tensors), Options())
    assert [module.conversion.scheme.layout for module in plan.modules] == [name]
    pieces = [piece for shard in plan.shards for out in shard.tensors for piece in out.pieces]
    assert max(piece.nbytes for piece in pieces) <= PIECE_BYTES
    assert max(sum(part.nbytes for part in piece.inputs) for piece in pieces) <= PIECE_BYTES
    weights = sum(tensor.nbytes for tensor in tensors.values())
    read = sum(part.nbytes for piece in pieces for part in piece.inputs)
    assert read == weights, "every byte once"


@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 99), step=st.integers(1, 2))
def test_transpose_bytes_is_a_transpose(height, width, seed, step):
    source = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    wide = np.full((width, 3 + step * height), 0xEE, np.uint8)
    transpose_bytes(source, wide[:, 3::step] if step > 1 else wide[:, 3 : 3 + height])
    np.testing.assert_array_equal(wide[:, 3::step], source.T)
    assert (wide[:, :3] == 0xEE).all()


# Repos that break the contract.


def stored_with(out, module, **changes):
    """A converted module with another shape or dtype claimed for a tensor."""
    stored = out.repo.modules[module]
    tensors = {name: replace(tensor, **changes.get(name, {})) for name, tensor in stored.tensors.items()}
    return replace(stored, tensors=tensors)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "channel",
            {"weight_scale": {"shape": (24,)}},
            "weight_scale is F32 [24], config.json says F32 [48]",
        ),
        (
            "channel",
            {"weight_scale": {"dtype": "BF16"}},
            "weight_scale is BF16 [48], config.json says F32 [48]",
        ),
        ("tensor", {"weight": {"dtype": "U8"}}, "weight is U8 [48, 64], config.json says F8_E4M3 [N, K]"),
        (
            "block",
            {"weight_scale": {"shape": (5, 2)}},
            "weight_scale is F32 [5, 2], config.json says F32 [2, 5]",
        ),
        (
            "mxfp4",
            {"weight_scale": {"shape": (48, 3)}},
            "weight_scale is U8 [48, 3], config.json says U8 [3, 48]",
        ),
        ("mxfp4", {"weight": {"dtype": "I8"}}, "weight is I8 [48, 48], config.json says U8 [N, K]"),
    ],
)
def test_broken_linears_are_named(tmp_path, case, changes, message):
    _, weight, pack, config = next(linear for linear in linears() if linear[0] == case)
    out = convert(Pico(config, {DOWN: pack(weight)}).write(tmp_path / "in"), tmp_path / "out")
    stored = stored_with(out, DOWN, **changes)
    with pytest.raises(DamagedError) as raised:
        layouts_by_name()[stored.scheme.layout].matrices(stored)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "tensor",
            {"down_proj_scale": {"shape": (3,)}},
            "down_proj_scale is F32 [3], config.json says F32 [2]",
        ),
        (
            "tensor",
            {"down_proj": {"shape": (2, 96, 128)}},
            "down_proj is [2, 96, 128], gate_up_proj [2, 128, 256]",
        ),
        (
            "block",
            {"gate_up_proj": {"dtype": "U8"}},
            "gate_up_proj is U8 [2, 128, 256], config.json says F8_E4M3 [E, K, N]",
        ),
        ("mxfp4", {"gate_up_proj": {"shape": (2, 128, 128)}}, "gate_up_proj_scale is U8 [2, 256, 4]"),
        ("mxfp8", {"down_proj_scale": {"dtype": "F32"}}, "down_proj_scale is F32 [2, 128, 4]"),
    ],
)
def test_broken_experts_are_named(tmp_path, case, changes, message):
    _, make, pack, config = next(stack for stack in stacks() if stack[0] == case)
    modules = expert_modules(expert_weights(make, H=128, I=128), pack)
    out = convert(Pico(config, modules).write(tmp_path / "in"), tmp_path / "out")
    stored = stored_with(out, EXPERTS, **changes)
    with pytest.raises(DamagedError) as raised:
        layouts_by_name()[stored.scheme.layout].matrices(stored)
    assert message in str(raised.value)
