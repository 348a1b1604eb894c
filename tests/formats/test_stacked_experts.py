"""Experts of a layer in one tensor, under the names and ranks that producers give them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support.floats import (
    block,
    channel,
    deepseek_config,
    expert_weights,
    float_ct_config,
    fp8_tensors,
    mx_tensors,
    mxfp4,
    mxfp4_ct_config,
    tensor,
)
from support.ints import Pico, convert, ct_config, ints, pack_quantized, refusal

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.errors import DamagedError

E, H, I = 2, 256, 128
MOE = "model.layers.0.moe"
GRANITE = "model.layers.0.block_sparse_moe"
ROLES = ("gate", "up", "down")


def stacked(weights, pack, parts):
    """Tensors of each module: those of the experts, stacked. `parts` names a module and the roles in its rows."""
    modules = {}
    for name, roles in parts.items():
        members = [{key: np.concatenate(found) for key, found in _joined(weights, pack, roles, e)} for e in range(E)]
        modules[name] = {key: np.stack([member[key] for member in members]) for key in members[0]}
    return modules


def _joined(weights, pack, roles, expert):
    each = [pack(weights[expert, role]) for role in roles]
    return [(key, [tensors[key] for tensors in each]) for key in each[0]]


STEP = {f"{MOE}.{role}_proj": (role,) for role in ROLES}
FUSED = {f"{GRANITE}.input_linear": ("gate", "up"), f"{GRANITE}.output_linear": ("down",)}


def check(out, weights, name):
    for (expert, role), weight in weights.items():
        np.testing.assert_array_equal(out.values(name, role, expert), weight.values)
    assert set(out.repo.modules) == {name} and not out.repo.plain


def blocks(weight):
    return fp8_tensors(weight, "weight_scale_inv")


def unit_axes(weight):
    """ModelOpt's `FP8_PB_WO`: https://github.com/NVIDIA/TensorRT-LLM/pull/17433."""
    return fp8_tensors(weight, shape=(-(-weight.N // 128), 1, -(-weight.K // 128), 1))


@pytest.mark.parametrize(
    ("make", "pack", "parts", "config"),
    [
        # Step-3.5-Flash-FP8: vllm/model_executor/models/step3p5.py, `load_weights`
        (block, blocks, STEP, deepseek_config()),
        # its name in ModelOpt's files, with four axes of scales: https://github.com/vllm-project/vllm/pull/50617
        (block, unit_axes, STEP, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}),
        # Granite 4 by llm-compressor's FP8_BLOCK: https://github.com/vllm-project/llm-compressor/pull/1814
        (block, fp8_tensors, FUSED, float_ct_config("float-quantized", "block")),
        (lambda N, K, seed: mxfp4(N, K, seed), mx_tensors, STEP, mxfp4_ct_config()),
        (lambda N, K, seed: mxfp4(N, K, seed), mx_tensors, FUSED, mxfp4_ct_config()),
    ],
    ids=["step-3.5", "modelopt", "granite", "mxfp4", "mxfp4 granite"],
)
def test_stacks_of_every_name_and_rank(tmp_path, make, pack, parts, config):
    weights = expert_weights(make, H, I, E)
    out = convert(Pico(config, stacked(weights, pack, parts)).write(tmp_path / "in"), tmp_path / "out")
    name = f"{MOE if parts is STEP else GRANITE}.experts"
    check(out, weights, name)
    assert "experts in one tensor" in out.facts(name)


@pytest.mark.parametrize("parts", [STEP, FUSED], ids=["step", "granite"])
def test_integers_in_stacks(tmp_path, parts):
    """Granite's int4 of compressed-tensors: `weight_shape` is of the tensor that was quantized, `[E * N, K]`."""
    weights = expert_weights(lambda N, K, seed: ints(N=N, K=K, seed=seed), H, I, E)
    modules = stacked(weights, lambda weight: pack_quantized(weight, zeros="none", shape=False), parts)
    for tensors in modules.values():
        E_, N, words = tensors["weight_packed"].shape
        tensors["weight_shape"] = np.array([E_ * N, words * 8], np.int64)
    out = convert(Pico(ct_config(), modules).write(tmp_path / "in"), tmp_path / "out")
    check(out, weights, f"{MOE if parts is STEP else GRANITE}.experts")


@pytest.mark.parametrize("parts", [STEP, FUSED], ids=["step", "granite"])
@pytest.mark.parametrize(("bits", "layout"), [(4, "uint4_experts"), (8, "int8_experts"), (3, "int4_experts")])
def test_zero_points_in_stacks(tmp_path, parts, bits, layout):
    """Packed along N, so that those of gate and up lie one after the other in a fused stack."""
    weights = expert_weights(lambda N, K, seed: ints(bits, N, K, symmetric=False, seed=seed), H, I, E)
    modules = stacked(weights, lambda weight: pack_quantized(weight, shape=False), parts)
    out = convert(Pico(ct_config(bits, symmetric=False), modules).write(tmp_path / "in"), tmp_path / "out")
    name = f"{MOE if parts is STEP else GRANITE}.experts"
    check(out, weights, name)
    assert out.repo.modules[name].scheme.layout == layout


def test_one_scale_for_each_expert_or_for_all(tmp_path):
    weights = expert_weights(lambda N, K, seed: tensor(N, K, seed), H, I, E)
    modules = stacked(weights, lambda w: fp8_tensors(w, shape=(1, 1)), STEP)
    for shape, folder in (((E, 1, 1), "three axes"), ((E,), "one")):
        for tensors in modules.values():
            tensors["weight_scale"] = tensors["weight_scale"].reshape(shape)
        out = convert(Pico({"quant_method": "fp8"}, modules).write(tmp_path / folder), tmp_path / f"{folder} out")
        check(out, weights, f"{MOE}.experts")


def test_unit_axes_of_a_linear(tmp_path):
    """ModelOpt's blocks `[N/128, 1, K/128, 1]`, ragged as well."""
    for N, K in ((256, 384), (192, 256)):
        weight = block(N, K)
        pico = Pico({"quant_method": "modelopt"}, {"model.layers.0.mlp.down_proj": unit_axes(weight)})
        out = convert(pico.write(tmp_path / f"{N}"), tmp_path / f"{N} out")
        np.testing.assert_array_equal(out.values("model.layers.0.mlp.down_proj"), weight.values)


CHANNELS = {
    # Llama-4-Maverick: transformers/integrations/fbgemm_fp8.py, `FbgemmFp8Llama4TextExperts`
    "llama-4": ({"quant_method": "fbgemm_fp8"}, None),
    # Granite FP8_DYNAMIC, scales [E, 2I, 1]: https://github.com/vllm-project/vllm/issues/42463
    "granite": (float_ct_config("float-quantized", "channel"), FUSED),
    "step": ({"quant_method": "fp8"}, STEP),
}


def channels(weights, parts):
    """(modules, bf16 tensors of the unquantized model by name) of experts with a scale per row."""
    if parts is not None:
        modules = stacked(weights, fp8_tensors, parts)
        plain = {
            f"{name}.weight": np.stack([np.concatenate([weights[e, role].values for role in roles]) for e in range(E)])
            for name, roles in parts.items()
        }
        return modules, plain
    name = "model.layers.0.feed_forward.experts"
    tensors, plain = {}, {}
    for part, roles in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        codes = [np.concatenate([weights[e, role].fp8 for role in roles]).T for e in range(E)]
        scales = [np.concatenate([weights[e, role].scales for role in roles]).T for e in range(E)]
        tensors |= {part: np.stack(codes), f"{part}_scale": np.stack(scales)}
        plain[f"{name}.{part}"] = np.stack(
            [np.concatenate([weights[e, role].values for role in roles]).T for e in range(E)]
        )
    return {name: tensors}, plain


@pytest.mark.parametrize("case", CHANNELS)
def test_a_scale_per_row_in_stacks(tmp_path, case):
    config, parts = CHANNELS[case]
    weights = expert_weights(lambda N, K, seed: channel(N, K, seed, scale=np.float32), H, I, E)
    out = convert(Pico(config, channels(weights, parts)[0]).write(tmp_path / "in"), tmp_path / "out")
    (name,) = out.repo.modules
    assert out.repo.modules[name].scheme.label() == "fp8_channel_experts channel"
    check(out, weights, name)


@pytest.mark.parametrize("case", CHANNELS)
def test_advice_to_dequantize_is_given_where_it_works(tmp_path, case):
    """Where a refusal, here of sizes, advises to dequantize, that gives what the unquantized model has."""
    config, parts = CHANNELS[case]
    weights = expert_weights(lambda N, K, seed: channel(N, K, seed, scale=np.float32), H, 48, E)
    modules, plain = channels(weights, parts)
    pico = Pico(config, modules)
    assert "on_unsupported='dequantize'" in refusal(tmp_path / "in", pico)
    out = convert(pico.write(tmp_path / "in"), tmp_path / "out", on_unsupported="dequantize")
    assert set(out.repo.tensors) == set(plain)
    for name, values in plain.items():
        np.testing.assert_array_equal(out.array(name), values.astype(ml_dtypes.bfloat16))


def test_a_stack_whose_down_is_not_quantized(tmp_path):
    weights = expert_weights(block, H, I, E)
    modules = stacked(weights, blocks, STEP)
    del modules[f"{MOE}.down_proj"]
    plain = {f"{MOE}.down_proj.weight": np.ones((E, H, I), ml_dtypes.bfloat16)}
    assert "unquantized: down of every expert" in refusal(tmp_path, Pico(deepseek_config(), modules, plain))


def test_experts_without_a_gate(tmp_path):
    """Nemotron-3: https://github.com/vllm-project/vllm/pull/25863."""
    weights = expert_weights(lambda N, K, seed: tensor(N, K, seed), H, I, E)
    modules = {
        f"backbone.layers.1.mixer.experts.{e}.{role}_proj": fp8_tensors(weights[e, role], shape=(1,))
        for e in range(E)
        for role in ("up", "down")
    }
    pico = Pico({"quant_method": "modelopt", "quant_algo": "FP8"}, modules)
    out, name = convert(pico.write(tmp_path / "in"), tmp_path / "out"), "backbone.layers.1.mixer.experts"
    assert out.repo.modules[name].scheme.label() == "fp8_experts tensor no-gate"
    for e in range(E):
        for role in ("up", "down"):
            np.testing.assert_array_equal(out.values(name, role, e), weights[e, role].values)


def test_transposed_stacks_are_refused(tmp_path):
    """Three stacks `[E, K, N]` feed each other as three `[E, N, K]` do: the width of the model tells them apart."""
    shapes = {"gate": (H, I), "up": (H, I), "down": (I, H)}
    weights = {(e, role): block(*shape, seed=e) for e in range(E) for role, shape in shapes.items()}
    pico = Pico(deepseek_config(), stacked(weights, blocks, STEP), config={"hidden_size": H})
    assert f"gate is [{H}, {I}] in a model of width {H}: the stacks are transposed" in refusal(tmp_path, pico)


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_fused_stacks_of_which_one_is_not_quantized(tmp_path, part):
    """FP8 and gpt-oss alike."""
    shape = (E, H, 2 * I) if part == "gate_up_proj" else (E, I, H)
    _, plain = channels(expert_weights(lambda N, K, seed: channel(N, K, seed), H, I, E), None)
    (name,) = {tensor.rpartition(".")[0] for tensor in plain}
    modules, _ = channels(expert_weights(lambda N, K, seed: channel(N, K, seed), H, I, E), None)
    modules[name] = {key: array for key, array in modules[name].items() if not key.startswith(part)}
    unquantized = {f"{name}.{part}": np.ones(shape, ml_dtypes.bfloat16)}
    message = refusal(tmp_path / "fp8", Pico({"quant_method": "fp8"}, modules, unquantized))
    assert f"unquantized: {part} of every expert" in message
    other = "down_proj" if part == "gate_up_proj" else "gate_up_proj"
    native = {f"{other}_blocks": np.zeros((E, H, 4, 16), np.uint8), f"{other}_scales": np.zeros((E, H, 4), np.uint8)}
    message = refusal(tmp_path / "oss", Pico({"quant_method": "mxfp4"}, {name: native}, unquantized))
    assert f"unquantized: {part} of every expert" in message


def test_a_fused_float_stack_beside_experts_one_by_one(tmp_path):
    name = "model.layers.0.mlp.experts"
    modules = {f"{name}.{e}.down_proj": blocks(block(H, I, seed=e)) for e in range(E)}
    plain = {f"{name}.gate_up_proj": np.ones((E, 2 * I, H), ml_dtypes.bfloat16)}
    message = refusal(tmp_path, Pico(deepseek_config(), modules, plain))
    assert f"unquantized: gate_up of every expert: {name}" in message


def test_stacks_of_unknown_names_are_refused(tmp_path):
    weights = expert_weights(block, H, I, E)
    (tensors,) = stacked(weights, blocks, {"a": ("down",)}).values()
    message = refusal(tmp_path, Pico(deepseek_config(), {"model.layers.0.mixer.projections": tensors}))
    assert "model.layers.0.mixer.projections.weight is F8_E4M3 [2, 256, 128]: a stack of unknown matrices" in message


@pytest.mark.parametrize("dtype", ["F8", "U8"])
def test_quantized_tensors_of_unknown_names_never_pass(tmp_path, dtype):
    """Inkling's `w13_weight` alternates gate and up, other models' does not: transformers/conversion_mapping.py."""
    weights = expert_weights(block, H, I, E)
    modules = {"model.layers.0.mlp.down_proj": blocks(weights[0, "down"])}
    codes = np.stack([weights[e, "gate"].fp8 for e in range(E)])
    plain = {
        "model.layers.0.mlp.experts.w13_weight": codes if dtype == "F8" else codes.view(np.uint8),
        "model.layers.0.mlp.experts.w13_weight_scale": np.ones((E, 1, 2), np.float32),
    }
    message = refusal(tmp_path, Pico(deepseek_config(), modules, plain))
    assert "no known format has these tensors: model.layers.0.mlp.experts.w13_weight" in message


def test_scales_of_another_number_of_experts_are_damage(tmp_path):
    modules = stacked(expert_weights(block, H, I, E), blocks, STEP)
    scales = modules[f"{MOE}.up_proj"]["weight_scale_inv"]
    modules[f"{MOE}.up_proj"]["weight_scale_inv"] = np.concatenate([scales, scales])
    message = refusal(tmp_path, Pico(deepseek_config(), modules), DamagedError)
    assert f"{MOE}.up_proj.weight_scale_inv has shape [4, 1, 2]" in message and "is of 2 experts" in message


def test_portable_repos_name_each_expert(tmp_path):
    weights = expert_weights(block, H, I, E)
    source = Pico(deepseek_config(), stacked(weights, blocks, FUSED)).write(tmp_path)
    plan = make_plan(source.checkpoint, Options(layout="compressed-tensors"))
    names = {module.conversion.name for module in plan.modules}
    assert names == {f"{GRANITE}.experts.{e}.{role}_proj" for e in range(E) for role in ROLES}
