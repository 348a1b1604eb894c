"""GPTQ files as their writers left them: padded, with dummy biases, with spoilt zero points, cut short, or packed for
another kernel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.ints import DOWN, Ints, Q, gptq, gptq_checkpoint, gptq_converted, ints, refusal, words

from xpuquant.errors import DamagedError, UsageError

# Padding.


def padded_k(weight: Ints, group: int) -> dict[str, np.ndarray]:
    """AutoRound's model-free export: whole groups inside qweight, no g_idx."""
    K = -(-weight.K // group) * group
    codes = np.full((weight.N, K), 1 << (weight.bits - 1), np.uint8)
    codes[:, : weight.K] = weight.codes
    return gptq(replace(weight, codes=codes, groups=np.arange(K) // group), g_idx=False)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", [Q, DOWN, "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.kv_b_proj"])
def test_padding_inside_qweight_is_cut_off(tmp_path, bits, name):
    weight = ints(bits, K=160, group=64)
    plain = {"model.layers.0.mlp.up_proj.weight": np.zeros((160, 8), np.float16)}
    config = {"hidden_size": 160, "num_attention_heads": 5, "head_dim": 32, "kv_lora_rank": 160}
    out = gptq_converted(
        tmp_path,
        weight,
        padded_k(weight, 64),
        name,
        plain=plain,
        config=config,
        group_size=64,
        provider="auto-round",
    )
    assert "K=160 of 192 packed columns, from the architecture" in out.facts(name)


def test_without_knowing_better_all_packed_columns_are_real(tmp_path):
    gptq_converted(tmp_path, ints(K=192, group=64), group_size=64, config={"hidden_size": 100}, provider="auto-round")


def test_qzeros_wider_than_n(tmp_path):
    # Zero points fill whole words along N; scales say how many there are.
    weight = ints(N=12)
    assert gptq_converted(tmp_path, weight).array(f"{DOWN}.qweight").shape == (12, 8)


def test_old_packers_dropped_the_last_zero_points(tmp_path):
    weight = ints(3, N=40)
    tensors = gptq(weight)
    tensors["qzeros"] = tensors["qzeros"][:, :3].copy()
    out = gptq_converted(tmp_path, weight, tensors)
    assert "the zero points of the last 8 columns are not stored" in out.facts(DOWN)
    weight = ints(3, N=40, symmetric=False)
    tensors = gptq(weight)
    tensors["qzeros"] = tensors["qzeros"][:, :3].copy()
    assert "an old packer dropped them" in refusal(tmp_path / "b", gptq_checkpoint(weight, tensors), DamagedError)


# Biases.


@pytest.mark.parametrize(
    ("config", "name", "dropped"),
    [
        ({"model_type": "llama"}, DOWN, True),
        ({"model_type": "llama", "mlp_bias": True}, DOWN, False),
        ({"model_type": "qwen2"}, Q, False),
        ({"model_type": "qwen2"}, DOWN, True),
        ({"model_type": "something"}, DOWN, False),
    ],
)
def test_a_bias_of_zeros_is_dropped_where_the_architecture_has_none(tmp_path, config, name, dropped):
    plain = {f"{name}.bias": np.zeros(16, np.float16)}
    out = gptq_converted(tmp_path, ints(), name=name, plain=plain, config=config)
    assert (f"{name}.bias" not in out.repo.tensors) == dropped
    assert ("a bias of zeros the architecture does not have: dropped" in out.facts(name)) == dropped


def test_a_bias_that_is_not_zero_is_kept(tmp_path):
    bias = np.arange(16, dtype=np.float16)
    out = gptq_converted(tmp_path, ints(), plain={f"{DOWN}.bias": bias})
    assert np.array_equal(out.array(f"{DOWN}.bias"), bias)
    assert "it is not zero: kept" in out.facts(DOWN)


# Writers that are known to spoil zero points.


def autogptq(weight: Ints) -> dict[str, np.ndarray]:
    """AutoGPTQ's packer: zero points minus one as uint32, OR-ed into the word."""
    rows = []
    for row in weight.zeros.astype(int):
        packed = []
        for word in row.reshape(-1, 8):
            value = 0
            for i, zero in enumerate(word):
                value |= ((zero - 1) % (1 << 32)) << (4 * i) & 0xFFFFFFFF
            packed.append(value)
        rows.append(packed)
    return gptq(weight) | {"qzeros": words(rows)}


def test_zero_points_spoilt_by_autogptq_are_refused_by_name(tmp_path):
    weight = ints(symmetric=False)
    weight.zeros[:] = np.maximum(weight.zeros, 1)
    gptq_converted(tmp_path, weight, autogptq(weight), meta=None)
    weight.zeros[0, 2] = 0
    message = refusal(tmp_path / "b", gptq_checkpoint(weight, autogptq(weight), meta=None))
    assert "AutoGPTQ's packer overwrites the neighbours of a zero point of 0, and there is one" in message


def test_a_zero_point_of_0_on_top_of_its_word_spoils_nothing(tmp_path):
    weight = ints(symmetric=False)
    weight.zeros[:] = np.maximum(weight.zeros, 1)
    weight.zeros[:, 7] = 0
    gptq_converted(tmp_path, weight, autogptq(weight), meta=None)


def test_borrowed_words_of_an_unknown_writer_are_taken(tmp_path):
    weight = ints(symmetric=False, N=64)
    weight.zeros[0, :3] = 0, 9, 9
    gptq_converted(tmp_path, weight, meta=None)


def test_3_bit_zero_points_spoilt_by_autoround_are_refused_by_name(tmp_path):
    weight = ints(3, N=32, symmetric=False)
    message = refusal(tmp_path, gptq_checkpoint(weight, provider="auto-round"))
    assert "AutoRound's 3-bit packer spoils the neighbours of a zero point of 0" in message
    weight.zeros[:] = np.maximum(weight.zeros, 1)
    gptq_converted(tmp_path / "b", weight, provider="auto-round")


# Damage and other packings.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("scales"), f"{DOWN}.scales is missing; is a shard incomplete? Download it again"),
        (lambda t: t.update(scales=t["scales"].astype(np.int16)), f"{DOWN}.scales is I16, want one of F16, BF16, F32"),
        (lambda t: t.update(qweight=t["qweight"].astype(np.int64)), f"{DOWN}.qweight is I64, want I32"),
        (lambda t: t.update(qzeros=t["qzeros"][:1]), f"{DOWN}.qzeros has 1 rows, {DOWN}.scales has 2"),
        (lambda t: t.update(qzeros=np.zeros((2, 9), np.int32)), f"{DOWN}.qzeros is 9 words wide; no width of code"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), f"{DOWN}.qweight has 7 rows, which no width of code gives"),
        (lambda t: t.update(scales=np.ones((3, 16), np.float16)), f"{DOWN}.scales has 3 groups, which no group size"),
        (lambda t: t.update(g_idx=t["g_idx"].astype(np.float32)), f"{DOWN}.g_idx is F32, want I32"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    weight = ints()
    tensors = gptq(weight)
    change(tensors)
    assert message in refusal(tmp_path, gptq_checkpoint(weight, tensors), DamagedError)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"checkpoint_format": "marlin"},
            "checkpoint_format 'marlin' is not known; known: gptq, gptq_v2, gptq_p",
        ),
        ({"checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas' is not known"),
        ({"is_marlin_format": True}, "the tensors are in Marlin's tile order (is_marlin_format)"),
        ({"rotation": "hadamard"}, "the config asks for 'rotation'"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'; only int32 words are known"),
    ],
)
def test_other_packings_are_refused_by_name(tmp_path, config, message):
    assert message in refusal(tmp_path, gptq_checkpoint(ints(), **config))


def test_a_config_of_the_wrong_type_is_named(tmp_path):
    assert (
        refusal(tmp_path, gptq_checkpoint(ints(), bits="four"), UsageError) == "config: 'bits' is 'four', want a number"
    )
    rules = {"+:(": {"bits": 8}}
    assert "'(' is not a regular expression" in refusal(
        tmp_path / "b", gptq_checkpoint(ints(), dynamic=rules), UsageError
    )


# Routers.


@pytest.mark.parametrize(
    "router",
    ["mlp.gate", "feed_forward.router", "mlp.router", "router.proj", "block_sparse_moe.router.layer", "mlp.gate.wg"],
)
def test_packed_routers_are_named(tmp_path, router):
    """AutoRound's model-free export, of Qwen3-MoE, Llama 4, gpt-oss, Gemma 4 and Granite."""
    out = gptq_converted(tmp_path, ints(), name=f"model.layers.0.{router}")
    (note,) = out.plan.notes
    assert note.startswith(f"model.layers.0.{router} is quantized, as AutoRound's model-free export does unasked")


def test_linears_that_gate_are_no_routers(tmp_path):
    assert not gptq_converted(tmp_path, ints(), name="model.layers.0.mlp.gate_proj").plan.notes
