"""GPTQ: packings, zero-point conventions, groups and column order, and configs that say otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ints import DOWN, Ints, gptq, gptq_checkpoint, gptq_converted, ints, refusal, stream, words

from xpuquant.errors import DamagedError
from xpuquant.formats.readers.gptq_zeros import true_zeros


def test_golden_bytes(tmp_path):
    # One column of codes 0..7, four times over, in every row; scale 1, zero point 8.
    codes = np.tile(np.arange(8, dtype=np.uint8), (8, 4))
    weight = Ints(4, codes, np.full((1, 8), 8, np.uint8), np.ones((1, 8), np.float16), np.zeros(32, int))
    tensors = gptq(weight)
    assert tensors["qweight"].tobytes() == bytes.fromhex("10 32 54 76") * 32
    assert tensors["qzeros"].tobytes() == bytes.fromhex("77 77 77 77")
    out = gptq_converted(tmp_path, weight, tensors)
    assert out.array(f"{DOWN}.qweight").shape == (8, 4)
    assert out.array(f"{DOWN}.qweight").tobytes() == bytes.fromhex("10 32 54 76") * 32
    assert out.array(f"{DOWN}.scales").tobytes() == bytes.fromhex("00 3c") * 8
    assert f"{DOWN}.qzeros" not in out.repo.tensors and f"{DOWN}.g_idx" not in out.repo.tensors


def test_golden_bytes_asymmetric(tmp_path):
    codes = np.tile(np.arange(8, dtype=np.uint8), (8, 4))
    zeros = np.arange(8, dtype=np.uint8)[None]
    weight = Ints(4, codes, zeros, np.ones((1, 8), np.float16), np.zeros(32, int))
    # 0x76543210 - 0x11111111: the zero point of 0 borrows from its neighbours.
    assert gptq(weight)["qzeros"].tobytes() == bytes.fromhex("ff 20 43 65")
    out = gptq_converted(tmp_path, weight)
    assert out.array(f"{DOWN}.qzeros").tobytes() == bytes.fromhex("10 32 54 76")


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4]),
    symmetric=st.booleans(),
    v1=st.booleans(),
    act_order=st.booleans(),
    group=st.sampled_from([32, 64, 96]),
    blocks=st.integers(1, 4),
    n=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_packing_converts_exactly(tmp_path_factory, bits, symmetric, v1, act_order, group, blocks, n, seed):
    weight = ints(bits, 8 * n, group * blocks, group, symmetric=symmetric, act_order=act_order, seed=seed)
    label = "gptq" if v1 else "gptq_v2"
    gptq_converted(
        tmp_path_factory.mktemp("gptq"),
        weight,
        gptq(weight, v1=v1),
        group_size=group,
        checkpoint_format=label,
        desc_act=act_order,
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_adding_one_to_whole_words_undoes_every_borrow(bits):
    zeros = np.random.default_rng(0).integers(0, 1 << bits, (500, 32), np.uint8)
    ones = sum(1 << at for at in range(0, 32, bits))
    stored = words([[(word - ones) % (1 << 32) for word in stream(list(row), bits)] for row in zeros])
    assert np.array_equal(true_zeros(stored, bits, 32, plus_one=True), zeros)


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_codes_become_symmetric_whatever_their_zero_points(tmp_path, bits):
    out = gptq_converted(tmp_path, ints(bits, symmetric=False))
    assert f"{DOWN}.qzeros" not in out.repo.tensors
    assert out.repo.modules[DOWN].scheme.symmetric


@settings(deadline=None, max_examples=20)
@given(st.booleans(), st.booleans(), st.integers(1, 3), st.integers(0, 99))
def test_planar_3_bit_converts_exactly(tmp_path_factory, symmetric, act_order, blocks, seed):
    weight = ints(3, 32, 32 * blocks, 32, symmetric=symmetric, act_order=act_order, seed=seed)
    gptq_converted(tmp_path_factory.mktemp("gptq"), weight, gptq(weight, planar=True), checkpoint_format="gptq_p")


def test_a_cut_planar_block_is_damage(tmp_path):
    weight = ints(3, N=32)
    tensors = gptq(weight, planar=True)
    tensors["qweight"] = tensors["qweight"][:-1].copy()
    del tensors["g_idx"]
    message = refusal(tmp_path, gptq_checkpoint(weight, tensors, checkpoint_format="gptq_p"), DamagedError)
    assert message == f"{DOWN}.qweight has 5 words, no whole number of planar blocks (3 words each)"


# What the config says and what the tensors show.


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("v1", [True, False])
def test_the_words_overrule_the_label_of_symmetric_files(tmp_path, bits, v1):
    weight = ints(bits)
    label = "gptq_v2" if v1 else "gptq"
    out = gptq_converted(tmp_path, weight, gptq(weight, v1=v1), checkpoint_format=label)
    assert "from the words; the config says" in out.facts(DOWN)


def test_symmetry_is_measured_where_the_config_is_silent_or_wrong(tmp_path):
    out = gptq_converted(tmp_path, ints(), sym=None)
    assert out.repo.modules[DOWN].scheme.symmetric
    out = gptq_converted(tmp_path / "wrong", ints(), sym=False)
    assert "although the config says not" in out.facts(DOWN)


@pytest.mark.parametrize("v1", [True, False])
def test_stray_zero_points_of_a_symmetric_file_are_kept(tmp_path, v1):
    weight = ints()
    weight.zeros[1, 3] = 5
    out = gptq_converted(tmp_path, weight, gptq(weight, v1=v1), sym=True, checkpoint_format="gptq")
    assert not out.repo.modules[DOWN].scheme.symmetric
    assert "1 of 32 are not the middle, although the config says symmetric" in out.facts(DOWN)


def test_bits_come_from_the_shapes(tmp_path):
    gptq_converted(tmp_path, ints(3, symmetric=False), bits=4)


def test_dynamic_rules_take_the_first_positive_match(tmp_path):
    # `-:` marks modules that are not quantized; this one is, so no such rule can be meant for it.
    rules = {"-:.*": {}, "+:.*down_proj": {"group_size": 64}, ".*": {"group_size": 32}}
    weight = ints(K=160, group=64)
    out = gptq_converted(tmp_path, weight, dynamic=rules, group_size=128)
    assert out.repo.modules[DOWN].scheme.group_size == 32


def test_qzeros_may_be_absent_only_where_symmetric(tmp_path):
    weight = ints()
    tensors = gptq(weight)
    del tensors["qzeros"]
    gptq_converted(tmp_path, weight, tensors)
    assert "qzeros is missing" in refusal(tmp_path / "b", gptq_checkpoint(weight, tensors, sym=False), DamagedError)


def test_negative_scales_keep_their_sign(tmp_path):
    weight = ints()
    assert (weight.scales < 0).any()
    assert np.array_equal(gptq_converted(tmp_path, weight).array(f"{DOWN}.scales"), weight.scales)


# Groups and column order.


def test_channel_wise_is_one_group(tmp_path):
    weight = ints(K=96, group=96)
    out = gptq_converted(tmp_path, weight, group_size=-1, desc_act=True)
    assert out.repo.modules[DOWN].scheme.group_size == 96


def test_a_group_larger_than_k_is_one_group(tmp_path):
    assert gptq_converted(tmp_path, ints(K=32, group=32), group_size=64).repo.modules[DOWN].scheme.group_size == 32


def test_a_short_last_group_is_regrouped(tmp_path):
    out = gptq_converted(tmp_path, ints(K=160, group=64, symmetric=False), group_size=64)
    assert out.array(f"{DOWN}.scales").shape == (5, 16)
    assert np.array_equal(out.array(f"{DOWN}.scales")[0], out.array(f"{DOWN}.scales")[1])


def test_act_order_is_what_g_idx_says_not_the_config(tmp_path):
    out = gptq_converted(tmp_path, ints(), desc_act=True)
    assert not out.repo.modules[DOWN].scheme.act_order
    assert "trivial: dropped, although desc_act is true" in out.facts(DOWN)
    out = gptq_converted(tmp_path / "b", ints(act_order=True), desc_act=False)
    assert out.repo.modules[DOWN].scheme.act_order
    assert "although the config does not say desc_act" in out.facts(DOWN)


def test_g_idx_shows_the_group_size(tmp_path):
    weight = ints(K=192, group=96)
    out = gptq_converted(tmp_path, weight, group_size=128)
    assert "groups of 96, the config says 128" in out.facts(DOWN)


def test_negative_groups_count_from_the_end(tmp_path):
    weight = ints(act_order=True)
    tensors = gptq(weight)
    tensors["g_idx"] = np.where(weight.groups == 1, -1, 0).astype(np.int32)
    gptq_converted(tmp_path, weight, tensors)


def test_groups_that_do_not_exist_are_damage(tmp_path):
    weight = ints()
    tensors = gptq(weight)
    tensors["g_idx"][5] = 7
    message = refusal(tmp_path, gptq_checkpoint(weight, tensors), DamagedError)
    assert message == f"{DOWN}.g_idx names group 7 of 2"


def test_act_order_without_g_idx_is_damage(tmp_path):
    weight = ints()
    message = refusal(tmp_path, gptq_checkpoint(weight, gptq(weight, g_idx=False), desc_act=True), DamagedError)
    assert message == f"{DOWN}.g_idx is missing, but the config says desc_act (act-order)"
