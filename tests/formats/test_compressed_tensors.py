"""compressed-tensors integers: both packings, every generation of zero points, bytes, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ints import (
    DOWN,
    Converted,
    Ints,
    Pico,
    Q,
    Tensors,
    convert,
    ct_config,
    ints,
    pack_quantized,
    refusal,
    unpacked,
)

from xpuquant.errors import DamagedError, UsageError
from xpuquant.formats.readers.compressed_tensors.config import weight_args
from xpuquant.formats.readers.compressed_tensors.packed import packed_words, unpack_offset_binary


def converted(folder: Path, weight: Ints, tensors, config=None, name: str = DOWN) -> Converted:
    symmetric = bool((weight.zeros == 1 << (weight.bits - 1)).all())
    said = config or ct_config(weight.bits, 32, symmetric=symmetric)
    out = convert(Pico(said, {name: tensors}).write(folder / "in"), folder / "out")
    assert np.array_equal(out.values(name), weight.values)
    return out


def test_golden_bytes(tmp_path):
    codes = np.tile(np.arange(8, dtype=np.uint8), (8, 4))
    zeros = np.arange(8, dtype=np.uint8)[None]
    weight = Ints(4, codes, zeros, np.ones((1, 8), np.float16), np.zeros(32, int))
    tensors = pack_quantized(weight)
    assert tensors["weight_packed"].tobytes() == bytes.fromhex("10 32 54 76") * 32
    assert tensors["weight_zero_point"].tobytes() == bytes.fromhex("10 32 54 76")
    out = converted(tmp_path, weight, tensors)
    assert out.array(f"{DOWN}.qweight").tobytes() == bytes.fromhex("10 32 54 76") * 32
    assert out.array(f"{DOWN}.qzeros").tobytes() == bytes.fromhex("10 32 54 76")


def test_golden_bytes_of_int4_stored_as_int8(tmp_path):
    codes = np.tile(np.arange(8, dtype=np.uint8), (8, 4))
    weight = Ints(4, codes, np.full((1, 8), 8, np.uint8), np.ones((1, 8), np.float16), np.zeros(32, int))
    tensors = unpacked(weight)
    assert tensors["weight"][0, :8].tobytes() == bytes.fromhex("f8 f9 fa fb fc fd fe ff")
    out = converted(tmp_path, weight, tensors)
    assert out.array(f"{DOWN}.qweight").tobytes() == bytes.fromhex("10 32 54 76") * 32


def test_padded_3_bit_by_eye():
    # Ten codes to a word, in octal; the two bits on top stay empty. Dense, the eleventh code begins there.
    codes = [*range(8), 1, 2, 3]
    assert unpack_offset_binary(np.array([[0o2176543210, 0o3]], np.uint32), 3, 11, padded=True).tolist() == [codes]
    assert unpack_offset_binary(np.array([[0o2176543210 | 3 << 30, 0]], np.uint32), 3, 11, padded=False).tolist() == [
        codes
    ]
    assert (packed_words(260, 3, padded=False), packed_words(260, 3, padded=True)) == (25, 26)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([1, 2, 3, 4]),
    padded=st.booleans(),
    zeros=st.sampled_from(["packed", "int8", "none"]),
    act_order=st.booleans(),
    group=st.sampled_from([32, 64]),
    blocks=st.integers(1, 4),
    n=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_generation_converts_exactly(tmp_path_factory, bits, padded, zeros, act_order, group, blocks, n, seed):
    symmetric = zeros == "none"
    weight = ints(bits, 8 * n, group * blocks, group, symmetric=symmetric, act_order=act_order, seed=seed)
    tensors = pack_quantized(weight, padded=padded, zeros=zeros)
    converted(tmp_path_factory.mktemp("ct"), weight, tensors, ct_config(bits, group, symmetric=symmetric))


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([2, 3, 4]), st.booleans(), st.integers(1, 4), st.integers(0, 99))
def test_bytes_convert_exactly(tmp_path_factory, bits, symmetric, blocks, seed):
    weight = ints(bits, 16, 32 * blocks, 32, symmetric=symmetric, seed=seed)
    config = ct_config(bits, 32, symmetric=symmetric, format="int-quantized")
    converted(tmp_path_factory.mktemp("ct"), weight, unpacked(weight, zeros=not symmetric), config)


@pytest.mark.parametrize("padded", [True, False])
def test_k_without_weight_shape_is_whole_groups(tmp_path, padded):
    weight = ints(3, K=128, group=64)
    tensors = pack_quantized(weight, padded=padded, zeros="none", shape=False)
    converted(tmp_path, weight, tensors, ct_config(3, 64))


@pytest.mark.parametrize("scale", ["[N, 1]", "[1]"])
def test_one_group_for_all(tmp_path, scale):
    weight = ints(K=96, group=96)
    if scale == "[1]":
        weight.scales[:] = 0.5
    tensors = pack_quantized(weight, zeros="none")
    if scale == "[1]":
        tensors["weight_scale"] = weight.scales[0, :1].copy()
    out = converted(tmp_path, weight, tensors, ct_config(4, None))
    assert out.repo.modules[DOWN].scheme.group_size == 96


def test_one_signed_zero_point_for_all(tmp_path):
    weight = ints(K=96, group=96)
    weight.zeros[:] = 3
    tensors = pack_quantized(weight) | {"weight_zero_point": np.array([-5], np.int8)}
    converted(tmp_path, weight, tensors, ct_config(4, None, symmetric=False))


def test_symmetry_is_measured(tmp_path):
    out = converted(tmp_path, ints(), pack_quantized(ints()), ct_config(symmetric=False))
    assert "symmetric, from the zero points" in out.facts(DOWN)
    weight = ints(symmetric=False)
    out = converted(tmp_path / "b", weight, pack_quantized(weight), ct_config(symmetric=True))
    assert "asymmetric, from the zero points, although the config says symmetric" in out.facts(DOWN)


def test_g_idx_that_means_nothing_is_dropped(tmp_path):
    weight = ints()
    for folder, g_idx in (("a", weight.groups), ("b", np.full(64, -1))):
        tensors = pack_quantized(weight, zeros="none") | {"weight_g_idx": g_idx.astype(np.int32)}
        out = converted(tmp_path / folder, weight, tensors)
        assert not out.repo.modules[DOWN].scheme.act_order


def test_kv_cache_scales_pass_through(tmp_path):
    plain = {
        f"model.layers.0.self_attn.{name}": np.array([0.5], np.float32)
        for name in ("k_scale", "v_scale", "q_scale", "k_zero_point", "k_proj.output_scale", "v_proj.output_scale")
    }
    weight = ints()
    modules = {"model.layers.0.self_attn.k_proj": pack_quantized(weight, zeros="none")}
    source = Pico(ct_config(kv_cache_scheme={"num_bits": 8, "type": "float"}), modules, plain).write(tmp_path / "in")
    out = convert(source, tmp_path / "out")
    assert plain.keys() == out.repo.plain.keys()
    assert list(out.repo.modules) == list(modules)


def test_static_activation_scales_are_dropped_and_said_so(tmp_path):
    weight = ints()
    tensors = unpacked(weight) | {
        "input_scale": np.ones(1, np.float16),
        "input_zero_point": np.zeros(1, np.int8),
    }
    out = converted(tmp_path, weight, tensors)
    assert not out.repo.plain
    assert "static activation scales dropped" in out.facts(DOWN)


# The config.


def test_the_group_that_the_shapes_agree_with(tmp_path):
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": 32}},
        "group_1": {"targets": ["re:.*down_proj$"], "weights": {"num_bits": 4, "group_size": 64}},
        "group_2": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 4, "group_size": 32}},
    }
    config = ct_config() | {"config_groups": groups}
    weight = ints()
    converted(tmp_path, weight, pack_quantized(weight, zeros="none"), config)


def test_exact_names_before_patterns_before_classes(tmp_path):
    def group(target, bits):
        return {"targets": [target], "weights": {"num_bits": bits}}

    groups = {
        "a": group("Linear", 1),
        "b": group("re:.*q_proj", 2),
        "c": group(Q, 3),
        "d": group("re:k", 4),
        "e": group("LlamaAttention", 5),
    }
    checkpoint = Pico(ct_config() | {"config_groups": groups}, {Q: {"weight": np.ones(1, np.float32)}})
    source = checkpoint.write(tmp_path)
    assert [args.bits for args in weight_args(source.checkpoint, Q)] == [3, 2, 1]


@pytest.mark.parametrize(
    ("preset", "bits", "symmetric"), [("W4A16", 4, True), ("W4A16_ASYM", 4, False), ("W3A16", 3, True)]
)
def test_groups_may_be_a_preset_and_its_targets(tmp_path, preset, bits, symmetric):
    weight = ints(bits, K=256, group=128, symmetric=symmetric)
    config = ct_config() | {"config_groups": {preset: ["Linear"]}}
    converted(tmp_path, weight, pack_quantized(weight), config)


def test_unknown_keys_and_missing_ones_do_not_matter(tmp_path):
    groups = {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "invented_in_0_99": [1]}}}
    weight = ints()
    tensors = pack_quantized(weight, zeros="none")
    converted(tmp_path, weight, tensors, {"quant_method": "compressed-tensors", "config_groups": groups})


# Refused, by name.


@pytest.mark.parametrize("pack", [pack_quantized, unpacked])
def test_what_changes_the_meaning_of_every_tensor_is_refused(tmp_path, pack):
    config = ct_config(transform_config={"config_groups": {"u": {}}})
    assert "the config asks for 'transform_config'" in refusal(tmp_path, Pico(config, {DOWN: pack(ints())}))


def test_marlins_tiles_are_refused_by_name(tmp_path):
    tensors: Tensors = {
        "weight_packed": np.zeros((4, 32), np.int32),
        "scale_packed": np.ones((2, 16), np.float16),
        "meta": np.zeros((16, 4), np.int16),
    }
    said = "2:4 sparse weights in the order of Marlin's tiles (marlin-24) have no XPU kernel"
    assert said in refusal(tmp_path, Pico(ct_config(format="marlin-24"), {DOWN: tensors}))


def test_bitmask_tensors_are_refused_by_name(tmp_path):
    tensors: Tensors = {"compressed": np.ones(9, np.float16), "bitmask": np.ones((4, 1), np.uint8)}
    assert "sparse (bitmask) weights have no XPU kernel" in refusal(tmp_path, Pico(ct_config(), {DOWN: tensors}))


def test_fake_quantized_weights_are_refused_by_name(tmp_path):
    tensors = {"weight": np.ones((16, 64), np.float16), "weight_scale": np.ones((16, 2), np.float16)}
    message = refusal(tmp_path, Pico(ct_config(quantization_status="frozen"), {DOWN: tensors}))
    assert "fake-quantized: the weight is stored as F16 beside its scale (quantization_status 'frozen')" in message


# Damage.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight_scale"), f"{DOWN}.weight_scale is missing"),
        (lambda t: t.update(weight_scale=t["weight_scale"].astype(np.int16)), f"{DOWN}.weight_scale is I16, want one"),
        (lambda t: t.update(weight_scale=t["weight_scale"][:8]), "with scales [8, 2] is not what the config describes"),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, :-1]), "[16, 7] with scales [16, 2] is not what the"),
        (lambda t: t.update(weight_shape=np.array([17, 64])), "weight_shape says [17, 64], weight_packed has 16 rows"),
        (lambda t: t.update(weight_zero_point=np.zeros((3, 2), np.int32)), "zero_point is I32 [3, 2], want [2, 2]"),
        (lambda t: t.update(weight_g_idx=np.zeros(3, np.int32)), f"{DOWN}.weight_g_idx has shape [3], want [64]"),
        (lambda t: t.update(weight_g_idx=np.full(64, 2, np.int32)), f"{DOWN}.weight_g_idx names group 2 of 2"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    tensors = pack_quantized(ints())
    change(tensors)
    assert message in refusal(tmp_path, Pico(ct_config(), {DOWN: tensors}), DamagedError)


def test_bytes_that_are_no_codes_are_damage(tmp_path):
    tensors = unpacked(ints())
    tensors["weight"][3, 3] = 9
    source = Pico(ct_config(), {DOWN: tensors}).write(tmp_path / "in")
    with pytest.raises(DamagedError, match=r"down_proj.weight holds -8 .. 9, which are no 4-bit codes"):
        convert(source, tmp_path / "out")


def test_bytes_that_are_no_zero_points_are_damage(tmp_path):
    tensors = pack_quantized(ints(symmetric=False), zeros="int8")
    tensors["weight_zero_point"][0, 0] = 8
    message = refusal(tmp_path, Pico(ct_config(symmetric=False), {DOWN: tensors}), DamagedError)
    assert "weight_zero_point holds" in message and "which are no 4-bit zero points" in message


def test_a_bad_pattern_is_named(tmp_path):
    groups = {"group_0": {"targets": ["re:("], "weights": {"num_bits": 4}}}
    checkpoint = Pico(ct_config() | {"config_groups": groups}, {DOWN: pack_quantized(ints())})
    assert "'(' is not a regular expression" in refusal(tmp_path, checkpoint, UsageError)
