"""The int4 layouts: experts under every name, and what their kernels do not take."""

from __future__ import annotations

import numpy as np
import pytest
from support.ints import (
    DOWN,
    Pico,
    convert,
    ct_config,
    gptq,
    gptq_checkpoint,
    gptq_config,
    gptq_converted,
    ints,
    pack_quantized,
    refusal,
)

# Modules that are not like the others.


def test_quantized_lm_head_converts_and_a_claimed_one_passes(tmp_path):
    gptq_converted(tmp_path, ints(), name="lm_head", lm_head=True, config={"tie_word_embeddings": False})
    head = np.ones((4, 64), np.float16)
    out = gptq_converted(tmp_path / "b", ints(), plain={"lm_head.weight": head}, lm_head=True)
    assert np.array_equal(out.array("lm_head.weight"), head)


def test_quantized_embeddings_are_refused_or_dequantized(tmp_path):
    name, weight = "model.embed_tokens", ints()
    checkpoint = Pico(ct_config(), {name: pack_quantized(weight, zeros="none")})
    message = refusal(tmp_path, checkpoint)
    assert f"an embedding is looked up, not multiplied: no XPU kernel reads quantized rows: {name}" in message
    out = convert(checkpoint.write(tmp_path / "b"), tmp_path / "out", on_unsupported="dequantize")
    assert np.allclose(out.array(f"{name}.weight").astype(np.float64), weight.values, rtol=2**-8)


def test_gptqmodels_transposed_embeddings_are_refused(tmp_path):
    message = refusal(tmp_path, gptq_checkpoint(ints(), name="model.embed_tokens"))
    assert "an embedding, which GPTQModel quantizes transposed" in message


def experts(bits: dict[str, int], prefix="model.layers.0.mlp.experts", names=("gate_proj", "up_proj", "down_proj")):
    modules = {}
    for expert in range(2):
        for seed, (role, name) in enumerate(zip(("gate", "up", "down"), names, strict=True)):
            modules[f"{prefix}.{expert}.{name}"] = ints(bits[role], N=64, K=64, seed=10 * expert + seed)
    return modules


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("model.layers.0.block_sparse_moe.experts", ("gate_proj", "up_proj", "down_proj")),
        ("model.language_model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_of_every_spelling(tmp_path, prefix, names):
    modules = experts({"gate": 4, "up": 3, "down": 2}, prefix, names)
    source = Pico(gptq_config(), {name: gptq(weight) for name, weight in modules.items()}).write(tmp_path / "in")
    out = convert(source, tmp_path / "out")
    for name, weight in modules.items():
        expert, role = int(name.split(".")[-2]), ("gate", "up", "down")[names.index(name.rpartition(".")[2])]
        assert np.array_equal(out.values(prefix, role, expert), weight.values)


def test_act_order_experts_are_refused(tmp_path):
    modules = {name: gptq(ints(N=64, K=64, act_order=True)) for name in experts({"gate": 4, "up": 4, "down": 4})}
    assert "act-order experts have no XPU kernel" in refusal(tmp_path, Pico(gptq_config(), modules))


def test_sizes_that_the_grouped_gemm_does_not_take_are_refused(tmp_path):
    modules = {name: gptq(ints(N=36, K=36, group=36)) for name in experts({"gate": 4, "up": 4, "down": 4})}
    message = refusal(tmp_path, Pico(gptq_config(group_size=-1), modules))
    assert "gate is [36, 36]; the grouped GEMM needs N % 8 == 0, K % 32 == 0: model.layers.0.mlp.experts" in message


def test_dummy_biases_of_experts_are_dropped(tmp_path):
    modules = experts({"gate": 4, "up": 4, "down": 4})
    plain = {f"{name}.bias": np.zeros(64, np.float16) for name in modules}
    source = Pico(gptq_config(), {name: gptq(w) for name, w in modules.items()}, plain, {"model_type": "mixtral"})
    out = convert(source.write(tmp_path / "in"), tmp_path / "out")
    assert not any("bias" in name for name in out.repo.tensors)


def test_a_quantized_router_is_a_linear_like_any_other(tmp_path):
    gptq_converted(tmp_path, ints(), name="model.layers.0.mlp.gate")


def test_k_and_groups_no_kernel_takes_are_refused(tmp_path):
    weight = ints(K=40, group=40)
    assert "K=40 is not a multiple of 32" in refusal(tmp_path, gptq_checkpoint(weight, group_size=-1))
    weight = ints(K=96, group=16)
    assert "groups of 16 in K=96 share no multiple of 32" in refusal(
        tmp_path / "b", gptq_checkpoint(weight, group_size=16)
    )
    weight = ints(N=12, symmetric=False)
    assert "zero points need N to be a multiple of 8, N=12" in refusal(tmp_path / "c", gptq_checkpoint(weight))


@pytest.mark.parametrize("K", [36, 40])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantizing_takes_any_shape(tmp_path, bits, K):
    weight = ints(bits, N=5, K=K, group=K, symmetric=False)
    source = gptq_checkpoint(weight, group_size=-1).write(tmp_path / "in")
    out = convert(source, tmp_path / "out", on_unsupported="dequantize")
    values = out.array(f"{DOWN}.weight").astype(np.float64)
    assert np.allclose(values, weight.values, rtol=2**-8)
