"""Stacks of experts of which some are not quantized, are missing, or have no gate: named, never called damaged unless
the files contradict themselves."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support.floats import expert_modules, expert_weights, fp8_tensors, tensor
from support.ints import Pico, awq, awq_config, convert, ct_config, gptq, gptq_config, ints, pack_quantized, refusal

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.plan.survey import survey_modules
from xpuquant.errors import DamagedError, UnsupportedError

EXPERTS = "model.layers.0.mlp.experts"
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
E, H, I = 4, 64, 32


def stack(pack=gptq, left_out=(), missing=(), prefix=EXPERTS, names=NAMES, symmetric=True):
    """(modules, plain tensors) of a stack; `left_out` (expert, role) are bf16, `missing` are nowhere."""
    modules, plain = {}, {}
    for e in range(E):
        for role, (N, K) in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
            name = f"{prefix}.{e}.{names[role]}"
            if (e, role) in left_out:
                plain[f"{name}.weight"] = np.ones((N, K), ml_dtypes.bfloat16)
            elif (e, role) not in missing:
                modules[name] = pack(ints(N=N, K=K, seed=e, symmetric=symmetric))
    return modules, plain


def all_roles(*experts):
    return {(e, role) for e in experts for role in NAMES}


LEFT_OUT = {
    # https://github.com/ModelCloud/GPTQModel/issues/1680: modules that saw no calibration token stay bf16
    "the last expert": (gptq_config(), gptq, all_roles(3), "expert 3 of 4"),
    "the first expert": (gptq_config(), gptq, all_roles(0), "expert 0 of 4"),
    "one projection in the middle": (gptq_config(), gptq, {(1, "up")}, "up of expert 1 of 4"),
    "several": (gptq_config(), gptq, {(0, "down")} | all_roles(1, 2), "down of expert 0 of 4; experts 1, 2 of 4"),
    # What no report was found of, and a rule of the config can do: `ignore`, `modules_to_not_convert`, `extra_config`.
    "every down": (ct_config(), pack_quantized, {(e, "down") for e in range(E)}, "down of every expert"),
    "every gate": (awq_config(), awq, {(e, "gate") for e in range(E)}, "gate of every expert"),
    "two roles of the last": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32},
        gptq,
        {(3, "gate"), (3, "up")},
        "gate and up of expert 3 of 4",
    ),
}


@pytest.mark.parametrize("layout", ["xpu", "compressed-tensors"])
@pytest.mark.parametrize("case", LEFT_OUT)
def test_unquantized_experts_are_named(tmp_path, case, layout):
    config, pack, left_out, said = LEFT_OUT[case]
    source = Pico(config, *stack(pack, left_out)).write(tmp_path)
    with pytest.raises(UnsupportedError) as raised:
        make_plan(source.checkpoint, Options(layout=layout))
    assert "on_unsupported='dequantize'" in str(raised.value)
    if layout == "xpu":
        assert f"the experts of a layer share one format; unquantized: {said}: {EXPERTS}" in str(raised.value)


@pytest.mark.parametrize("case", LEFT_OUT)
def test_dequantized_they_are_whole(tmp_path, case):
    """Every matrix of the stack has a `weight` then, those that had one keep their bytes, nothing packed is left."""
    config, pack, left_out, _ = LEFT_OUT[case]
    modules, plain = stack(pack, left_out)
    out = convert(Pico(config, modules, plain).write(tmp_path / "in"), tmp_path / "out", on_unsupported="dequantize")
    wanted = {f"{EXPERTS}.{e}.{name}.weight" for e in range(E) for name in NAMES.values()}
    assert set(out.repo.tensors) == wanted
    for name, array in plain.items():
        assert out.array(name).tobytes() == array.tobytes()
    assert not out.repo.modules


def test_whole_layers_may_stay_unquantized(tmp_path):
    """https://github.com/sgl-project/sglang/pull/20439: `modules_to_not_convert: ["model.layers.0."]`."""
    modules, _ = stack(awq, prefix="model.layers.1.mlp.experts")
    _, plain = stack(awq, all_roles(*range(E)))
    out = convert(Pico(awq_config(), modules, plain).write(tmp_path / "in"), tmp_path / "out")
    assert set(out.repo.modules) == {"model.layers.1.mlp.experts"}
    assert set(out.repo.plain) == set(plain)


def test_other_spellings_and_formats_too(tmp_path):
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    modules, plain = stack(gptq, all_roles(3), prefix="model.layers.0.block_sparse_moe.experts", names=names)
    assert "unquantized: expert 3 of 4" in refusal(tmp_path / "a", Pico(gptq_config(), modules, plain))
    weights = expert_weights(lambda N, K, seed: tensor(N, K, seed), H=128, I=128, E=2)
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, shape=(1,)))
    del modules[f"{EXPERTS}.1.down_proj"]
    plain = {f"{EXPERTS}.1.down_proj.weight": np.ones((128, 128), np.float16)}
    message = refusal(tmp_path / "b", Pico({"quant_method": "fp8"}, modules, plain))
    assert "unquantized: down of expert 1 of 2" in message


def test_many_are_counted(tmp_path):
    modules, plain = {}, {}
    for e in range(20):
        for name in NAMES.values():
            if e % 2:
                plain[f"{EXPERTS}.{e}.{name}.weight"] = np.ones((32, 32), np.float16)
            else:
                modules[f"{EXPERTS}.{e}.{name}"] = gptq(ints(N=32, K=32))
    message = refusal(tmp_path, Pico(gptq_config(), modules, plain))
    assert "experts 1, 3, 5, 7, 9, 11, 13, 15 and 2 more of 20" in message


@pytest.mark.parametrize(
    ("missing", "config", "said"),
    [
        ({(1, "up")}, {}, "expert 1 of 4 has no up matrix; is a shard incomplete?"),
        (all_roles(3), {"num_experts": 4}, "experts 0 to 2 are there, config.json says 4; is a shard incomplete?"),
        (all_roles(3), {"text_config": {"n_routed_experts": 4}}, "experts 0 to 2 are there, config.json says 4"),
        (all_roles(3), {"moe_num_experts": [4, 8]}, "experts 0 to 2 are there, config.json says 4"),
        ({(e, "down") for e in range(E)}, {}, "no expert has a down matrix"),
    ],
)
def test_what_is_nowhere_is_damage(tmp_path, missing, config, said):
    modules, _ = stack(missing=missing)
    assert said in refusal(tmp_path, Pico(gptq_config(), modules, config=config), DamagedError)


def test_one_layer_without_gates_beside_others_is_damage(tmp_path):
    whole, _ = stack()
    gateless, _ = stack(missing={(e, "gate") for e in range(E)}, prefix="model.layers.1.mlp.experts")
    assert "no expert has a gate matrix" in refusal(tmp_path, Pico(gptq_config(), whole | gateless), DamagedError)


def test_one_matrix_of_two_names_is_damage(tmp_path):
    modules, _ = stack()
    modules[f"{EXPERTS}.0.w1"] = modules[f"{EXPERTS}.0.gate_proj"]
    message = refusal(tmp_path, Pico(gptq_config(), modules), DamagedError)
    assert "are both the gate matrix of expert 0" in message


def test_asymmetric_and_unquantized(tmp_path):
    """The first reason is enough, and the files are sound."""
    modules, plain = stack(awq, all_roles(2), symmetric=False)
    assert "unquantized: expert 2 of 4" in refusal(tmp_path, Pico(awq_config(), modules, plain))


def test_layers_of_two_widths(tmp_path):
    """https://github.com/vllm-project/vllm/pull/52002: poolside/Laguna-XS-2.1-INT4 has int4 experts in its first layers
    and int8 in the last. Whatever becomes of int8, it is not the int4 layers' matter."""
    modules = {}
    for layer, bits in ((1, 4), (31, 8)):
        for e in range(E):
            for role, (N, K) in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
                name = f"model.layers.{layer}.mlp.experts.{e}.{NAMES[role]}"
                modules[name] = pack_quantized(ints(bits, N=N, K=K, seed=e), zeros="none")
    config = ct_config()
    groups = config["config_groups"]
    eight = {**groups["group_0"]["weights"], "num_bits": 8}
    groups["group_1"] = {"targets": [r"re:.*layers\.31\..*"], "weights": eight}
    source = Pico(config, modules).write(tmp_path)
    survey = survey_modules(source.checkpoint, Options())
    assert "model.layers.1.mlp.experts" in {planned.conversion.name for planned in survey.planned}
    assert set(survey.refused) <= {"model.layers.31.mlp.experts"}


def test_a_stack_of_two_widths_is_one_matter(tmp_path):
    """https://github.com/ROCm/vllm/issues/696: Int4-Int8Mix repos have `down_proj` in 8 bits. Converted or refused as a
    whole, with the matrix named."""
    modules, _ = stack()
    for e in range(E):
        modules[f"{EXPERTS}.{e}.down_proj"] = gptq(ints(8, N=H, K=I, seed=e))
    pico = Pico(gptq_config(dynamic={r"+:.*down_proj": {"bits": 8}}), modules)
    survey = survey_modules(pico.write(tmp_path).checkpoint, Options())
    assert (len(survey.planned), list(survey.refused)) in ((1, []), (0, [EXPERTS]))
    assert all("down" in reason for reason in survey.refused.values())
