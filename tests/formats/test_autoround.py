"""AutoRound: what its configs mean, in every generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ints import DOWN, Converted, Ints, Pico, Q, Tensors, awq, convert, gptq, ints, pack_quantized, refusal

from xpuquant.errors import UnsupportedError, UsageError
from xpuquant.formats.readers.autoround import gptq_label, module_overrides


def config(**keys):
    return {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "autoround_version": "0.15.0",
        "packing_format": "auto_round:auto_gptq",
        **keys,
    }


def converted(folder: Path, weight: Ints, tensors, name: str = DOWN, **keys: Any) -> Converted:
    out = convert(Pico(config(**keys), {name: tensors}).write(folder / "in"), folder / "out")
    assert np.array_equal(out.values(name), weight.values)
    return out


# Packing, and whether zero points are stored minus one (v1).
GENERATIONS = [
    ({"packing_format": None, "backend": "gptq:exllamav2"}, True),
    ({"packing_format": None, "backend": "auto_round:exllamav2"}, False),
    ({"packing_format": None, "backend": "auto_round:gptq:exllamav2"}, True),
    ({"packing_format": None, "backend": "auto"}, True),
    ({"packing_format": None}, True),
    ({"packing_format": "auto_round:auto_gptq", "backend": "auto_round:exllamav2"}, True),
    ({"packing_format": "auto_round:gptq"}, True),
    ({"packing_format": "auto_gptq"}, True),
    ({"packing_format": "auto_round:gptqmodel"}, False),
    ({"packing_format": "auto_round"}, False),
    ({"packing_format": "auto_round:tritonv2"}, False),
    # Model-free exports called `auto_round` what they stored minus one, until 0.16.
    ({"packing_format": "auto_round", "model_free": True, "autoround_version": "0.15.1"}, True),
    ({"packing_format": "auto_round", "model_free": True, "autoround_version": "0.16.0"}, False),
]


@pytest.mark.parametrize(("keys", "v1"), GENERATIONS)
def test_zero_points_of_every_generation(tmp_path, keys, v1):
    weight = ints(symmetric=False)
    converted(tmp_path, weight, gptq(weight, v1=v1, g_idx=False), sym=False, **keys)


def test_a_mislabelled_file_of_an_unknown_version_is_refused(tmp_path):
    tensors = gptq(ints(symmetric=False), g_idx=False)
    keys = {"packing_format": "auto_round", "model_free": True, "sym": False, "autoround_version": None}
    assert "has no autoround_version to tell" in refusal(tmp_path, Pico(config(**keys), {DOWN: tensors}))


@pytest.mark.parametrize(
    "method", ["auto-round", "auto_round", "intel/auto-round", "intel/auto_round", "autoround", "Auto-Round"]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_spelling(tmp_path, method, bits):
    weight = ints(bits)
    converted(tmp_path, weight, gptq(weight, g_idx=False), quant_method=method, bits=bits)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_tensors(tmp_path, symmetric):
    weight = ints(symmetric=symmetric)
    converted(tmp_path, weight, awq(weight), packing_format="auto_round:auto_awq", sym=symmetric)


def test_compressed_tensors_tensors_under_autorounds_own_config(tmp_path):
    weight = ints(3)
    tensors = pack_quantized(weight, zeros="none")
    rules = {".*down_proj.*": {"bits": 3, "group_size": 32}}
    keys: dict[str, Any] = {"packing_format": "auto_round:llm_compressor", "group_size": 128, "extra_config": rules}
    converted(tmp_path, weight, tensors, **keys)


def test_gptq_tensors_under_an_awq_label_are_refused(tmp_path):
    tensors = gptq(ints(symmetric=False))
    message = refusal(tmp_path, Pico(config(packing_format="auto_round:auto_awq", sym=False), {DOWN: tensors}))
    assert "packing_format 'auto_round:auto_awq' is AWQ's, the tensors are GPTQ's" in message


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"packing_format": "auto_round:fake"}, "packing_format 'auto_round:fake' is fake quantization"),
        ({"packing_format": "auto_round:mlx"}, "packing_format 'auto_round:mlx' is Apple MLX's layout"),
        ({"rotation_config": {"type": "hadamard"}}, "the config asks for 'rotation_config'"),
        ({"spinquant_config": {"r1": True}}, "the config asks for 'spinquant_config'"),
    ],
)
def test_what_is_no_quantized_storage_is_refused_by_name(tmp_path, keys, reason):
    assert reason in refusal(tmp_path, Pico(config(**keys), {DOWN: gptq(ints())}))


def test_int4_inside_fp8_is_refused_by_name(tmp_path):
    tensors = gptq(ints()) | {
        "act_scales": np.ones(1, np.float16),
        "w_bf16_to_fp8_scale": np.ones(1, np.float16),
    }
    assert "int4 inside fp8 (AutoRound's W4A-fp8" in refusal(tmp_path, Pico(config(), {DOWN: tensors}))


def test_mlx_tensors_are_refused_by_name(tmp_path):
    tensors: Tensors = {
        "weight": np.zeros((16, 8), np.uint32),
        "scales": np.ones((16, 2), np.float16),
        "biases": np.ones((16, 2), np.float16),
    }
    message = refusal(tmp_path, Pico(config(packing_format="mlx"), {DOWN: tensors}))
    assert "weight U32 with scales and biases is Apple MLX's layout" in message


def test_fake_quantized_floats_are_named(tmp_path):
    checkpoint = Pico(config(packing_format="auto_round:fake"), plain={f"{DOWN}.weight": np.ones((8, 8), np.float16)})
    assert "packing_format 'auto_round:fake'" in refusal(tmp_path, checkpoint, UsageError)


# extra_config


def test_mixed_bits_and_16_bit_exceptions(tmp_path):
    weights = {DOWN: ints(2, group=64), Q: ints(4)}
    gate = "model.layers.0.mlp.gate"
    extra = {
        DOWN: {"bits": 2, "group_size": 64},
        f"{gate}": {"bits": 16, "data_type": "float"},
        r".*model\.layers\.0\.mlp\.gate.*": {"bits": 16},
    }
    plain = {f"{gate}.weight": np.ones((4, 64), np.float16)}
    checkpoint = Pico(config(extra_config=extra), {name: gptq(w, g_idx=False) for name, w in weights.items()}, plain)
    out = convert(checkpoint.write(tmp_path / "in"), tmp_path / "out")
    for name, weight in weights.items():
        assert np.array_equal(out.values(name), weight.values)
    assert out.repo.modules[DOWN].scheme.group_size == 64
    assert f"{gate}.weight" in out.repo.plain


@pytest.mark.parametrize(
    ("extra", "bits"),
    [
        ({"model.layers.0.mlp.gate_proj": {"bits": 2}, ".*": {"bits": 3}}, 2),
        ({"gate_proj": {"bits": 2}, ".*gate.*": {"bits": 3}}, 2),
        ({".*up_proj.*": {"bits": 8}, ".*gate_proj.*": {"bits": 2}, ".*": {"bits": 3}}, 2),
        ({"mlp": {"bits": 2}}, 2),
        # The router's entry also matches gate_proj, which is quantized after all.
        ({r".*\.mlp\.gate.*": {"bits": 16}, ".*proj.*": {"bits": 2}}, 2),
        ({"model.layers.0.mlp.gate": {"bits": 2}}, None),
        ({"model.layers.0.mlp.gate_proj": None}, None),
        (None, None),
    ],
)
def test_extra_config_precedence(extra, bits):
    override = module_overrides({"extra_config": extra}, "model.layers.0.mlp.gate_proj")
    assert override.get("bits") == bits


def test_a_bad_pattern_is_named():
    with pytest.raises(UsageError, match=r"'\(' is not a regular expression"):
        module_overrides({"extra_config": {"(": {"bits": 4}}}, "a")


def test_an_lm_head_that_is_claimed_but_float_passes_through(tmp_path):
    head = np.ones((4, 64), np.float16)
    checkpoint = Pico(
        config(extra_config={"lm_head": {"bits": 4}}),
        {DOWN: gptq(ints(), g_idx=False)},
        {"lm_head.weight": head},
    )
    out = convert(checkpoint.write(tmp_path / "in"), tmp_path / "out")
    assert np.array_equal(out.array("lm_head.weight"), head)


def test_labels_need_no_version_where_symmetric():
    assert gptq_label({"packing_format": "auto_round", "model_free": True, "sym": True}) == "gptq_v2"
    with pytest.raises(UnsupportedError):
        gptq_label({"packing_format": "auto_round", "model_free": True, "sym": False})
