"""Linears of 5 to 8 bits: two planes of nibbles, and the scales and zero points that make them one number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.ints import (
    DOWN,
    Pico,
    convert,
    ct_config,
    gptq,
    gptq_checkpoint,
    gptq_converted,
    ints,
    pack_quantized,
    refusal,
    unpacked,
)

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.plan.tensor_parallel import problems
from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.layouts.xpu.int8_linear import Int8Linear


def nibbles(words):
    return np.stack([words.view(np.uint32) >> np.uint32(4 * i) & np.uint32(15) for i in range(8)], -1).reshape(
        len(words), -1
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_bytes_of_the_contract(tmp_path, symmetric):
    """Of each group the high nibbles, then the low ones; 16 s, then s; the zero point's nibbles alike."""
    N, K, g = 16, 96, 32
    weight = ints(8, N, K, g, symmetric=symmetric)
    out = gptq_converted(tmp_path, weight)
    planes = nibbles(out.array(f"{DOWN}.qweight")).reshape(N, K // g, 2, g)
    assert np.array_equal(planes[:, :, 0] * 16 + planes[:, :, 1], weight.codes.reshape(N, K // g, g))
    scales = out.array(f"{DOWN}.scales")
    assert np.array_equal(scales[1::2], weight.scales) and np.array_equal(scales[0::2], weight.scales * np.float16(16))
    zeros = nibbles(out.array(f"{DOWN}.qzeros"))
    assert np.array_equal(zeros[0::2] * 16 + zeros[1::2], weight.zeros)
    scheme = out.repo.modules[DOWN].scheme
    assert (scheme.layout, scheme.group_size, scheme.symmetric) == ("int8_linear", g, symmetric)
    assert out.plan.quantization_config("tests")["format_version"] == 2


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("source", ["gptq", "v2", "planar", "packed", "padded", "int8", "bytes"])
def test_every_width_from_every_packing(tmp_path, source, symmetric, bits):
    weight = ints(bits, 32, 64, symmetric=symmetric)
    if source in ("packed", "padded", "int8", "bytes"):
        tensors = unpacked(weight, zeros=True)
        if source != "bytes":
            zeros = "int8" if source == "int8" else "packed"
            tensors = pack_quantized(weight, padded=source == "padded", zeros=zeros)
        checkpoint = Pico(ct_config(bits, symmetric=symmetric), {DOWN: tensors})
    elif source == "planar":
        checkpoint = gptq_checkpoint(weight, gptq(weight, v1=False, planar=bits < 8), checkpoint_format="gptq_p")
    else:
        v1 = source == "gptq"
        checkpoint = gptq_checkpoint(weight, gptq(weight, v1=v1), checkpoint_format="gptq" if v1 else "gptq_v2")
    out = convert(checkpoint.write(tmp_path / "in"), tmp_path / "out")
    assert np.array_equal(out.values(DOWN), weight.values)
    assert out.repo.modules[DOWN].scheme.symmetric == (symmetric or bits < 8)


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order(tmp_path, symmetric):
    out = gptq_converted(tmp_path, ints(8, 16, 96, symmetric=symmetric, act_order=True), desc_act=True)
    assert out.repo.modules[DOWN].scheme.act_order


GROUPS = [(64, 64, 64), (96, 96, 32), (384, 384, 128), (512, 256, 128), (128, 32, 32)]


@pytest.mark.parametrize(("K", "group", "stored"), GROUPS)
def test_groups_are_short_enough_for_tensor_parallelism_to_cut(tmp_path, K, group, stored):
    weight = ints(8, 32, K, group)
    out = gptq_converted(tmp_path, weight, group_size=group)
    assert out.repo.modules[DOWN].scheme.group_size == stored
    assert set(problems(out.plan.modules, 2)) == ({DOWN} if K // stored % 2 else set())


def test_w8a8_says_that_its_activations_stay_in_16_bits(tmp_path):
    config = ct_config(8, None)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}
    weight = ints(8, 16, 64, 64)
    out = convert(Pico(config, {DOWN: unpacked(weight)}).write(tmp_path / "in"), tmp_path / "out")
    assert "W8A8 becomes W8A16" in out.facts(DOWN)
    assert np.array_equal(out.values(DOWN), weight.values)


def test_a_scale_that_16_times_does_not_fit_is_refused_before_any_work(tmp_path):
    weight = ints(8)
    weight.scales[1, 3] = 5000
    source = gptq_checkpoint(weight).write(tmp_path / "in")
    why = "16 times its largest scale is beyond float16, in which the two planes of an 8-bit weight are scaled"
    with pytest.raises(UnsupportedError) as raised:
        convert(source, tmp_path / "out")
    assert f"{why} (bfloat16 and float32 hold it: scale_dtype): {DOWN}" in str(raised.value)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
    assert np.array_equal(convert(source, tmp_path / "b", scale_dtype="F32").values(DOWN), weight.values)
    plan = make_plan(source.checkpoint, Options(on_unsupported="dequantize"))
    assert [module.conversion.scheme for module in plan.dequantized] == [None]


def test_a_scale_that_the_plan_cannot_look_at_is_refused_when_it_is_read(tmp_path, monkeypatch):
    weight = ints(8)
    weight.scales[1, 3] = 5000
    source = gptq_checkpoint(weight).write(tmp_path / "in")
    monkeypatch.setattr(source, "checkpoint", replace(source.checkpoint, peek=lambda tensor: None))
    with pytest.raises(UnsupportedError, match=f"{DOWN}: 16 times its largest scale is beyond float16") as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_planes_that_are_not_scaled_as_one_number_are_damage(tmp_path):
    out = gptq_converted(tmp_path, ints(8))
    stored = out.repo.modules[DOWN]
    wrong = out.array(f"{DOWN}.scales").copy()
    wrong[2, 5] *= 2
    with pytest.raises(DamagedError, match=r"scales: row 2 is .*, not 16 times row 3"):
        Int8Linear()._check_scales(stored, wrong)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (ints(8, 12), "the planes of 8 bits need K % 32 == 0 and N % 8 == 0, not [12, 64]"),
        (ints(8, K=40, group=40), "the planes of 8 bits need K % 32 == 0 and N % 8 == 0, not [16, 40]"),
        (ints(8, K=96, group=16), "groups of 16 in K=96 share no multiple of 32 columns"),
    ],
)
def test_what_no_kernel_takes_is_refused(tmp_path, weight, reason):
    message = refusal(tmp_path, gptq_checkpoint(weight, group_size=len(weight.groups) // len(weight.scales)))
    assert reason in message and "on_unsupported='dequantize'" in message


def test_dequantizing_is_not_asked_for_what_converts(tmp_path):
    source = gptq_checkpoint(ints(8)).write(tmp_path)
    assert not make_plan(source.checkpoint, Options(on_unsupported="dequantize")).dequantized
