"""gpt-oss: published blocks, experts split by llm-compressor in either order, and biases that go with their rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FIXTURES, all_checkpoints
from support.floats import (
    EXPERTS,
    Floats,
    block,
    expert_modules,
    fp8_tensors,
    mx_tensors,
    mxfp4,
    mxfp4_ct_config,
    mxfp8,
    tensor,
)
from support.ints import Ints, Pico, convert, ct_config, gptq, ints, pack_quantized, refusal

from xpuquant.conversion.sources.open import open_source
from xpuquant.errors import DamagedError, UnsupportedError

GPT_OSS = {"model_type": "gpt_oss"}
NATIVE = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
H, I, E = 64, 32, 2


def fused(seed=0):
    """(expert, gate_up or down) → matrix, gate and up rows alternating."""
    shapes = {"gate_up": (2 * I, H), "down": (H, I)}
    return {
        (e, role): mxfp4(*shape, seed=seed + 10 * e + i)
        for e in range(E)
        for i, (role, shape) in enumerate(shapes.items())
    }


def biases(role, N):
    """A bias per expert, every value another."""
    start = 0 if role == "gate_up" else 1000
    return [np.arange(start + 100 * e, start + 100 * e + N).astype(np.float16) for e in range(E)]


def native(weights, bias=True):
    """The published tensors."""
    parts = {}
    for role, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        stack = [weights[e, role] for e in range(E)]
        G = stack[0].K // 32
        parts[f"{name}_blocks"] = np.stack([w.packed.reshape(w.N, G, 16) for w in stack])
        parts[f"{name}_scales"] = np.stack([w.scales for w in stack])
        if bias:
            parts[f"{name}_bias"] = np.stack(biases(role, stack[0].N))
    return parts


def check(out, weights, bias=True):
    """gate is the even rows, up the odd ones, whatever the source called them."""
    for e in range(E):
        whole = weights[e, "gate_up"].values
        np.testing.assert_array_equal(out.values(EXPERTS, "gate", e), whole[0::2])
        np.testing.assert_array_equal(out.values(EXPERTS, "up", e), whole[1::2])
        np.testing.assert_array_equal(out.values(EXPERTS, "down", e), weights[e, "down"].values)
        if bias:
            np.testing.assert_array_equal(out.array(f"{EXPERTS}.gate_up_proj_bias")[e], biases("gate_up", 2 * I)[e])
            np.testing.assert_array_equal(out.array(f"{EXPERTS}.down_proj_bias")[e], biases("down", H)[e])
    scheme = out.repo.modules[EXPERTS].scheme
    assert scheme.interleaved and scheme.bias == bias


def converted(folder, modules, config, model=GPT_OSS):
    return convert(Pico(config, modules, config=model).write(folder / "in"), folder / "out")


def test_published_blocks_keep_every_byte(tmp_path):
    weights = fused()
    parts = native(weights)
    out = converted(tmp_path, {EXPERTS: parts}, NATIVE)
    check(out, weights)
    assert out.array(f"{EXPERTS}.gate_up_proj").tobytes() == parts["gate_up_proj_blocks"].tobytes()
    assert out.array(f"{EXPERTS}.gate_up_proj").shape == (E, 2 * I, H // 2)
    assert out.array(f"{EXPERTS}.gate_up_proj_scale").tobytes() == parts["gate_up_proj_scales"].tobytes()
    assert set(out.repo.tensors) == {
        f"{EXPERTS}.{part}{end}" for part in ("gate_up_proj", "down_proj") for end in ("", "_scale", "_bias")
    }


def test_published_blocks_without_biases(tmp_path):
    weights = fused()
    check(converted(tmp_path, {EXPERTS: native(weights, bias=False)}, NATIVE), weights, bias=False)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_any_published_blocks_keep_their_values(tmp_path_factory, seed):
    weights = fused(seed)
    out = converted(tmp_path_factory.mktemp("gptoss"), {EXPERTS: native(weights)}, NATIVE)
    check(out, weights)


def split(weights, halves, pack=mx_tensors, bias=True):
    """Experts one by one, as llm-compressor stores them: even and odd rows, or first and second half."""
    modules = {}
    for e in range(E):
        taken = {"gate": (0, I, 1), "up": (I, 2 * I, 1)} if halves else {"gate": (0, 2 * I, 2), "up": (1, 2 * I, 2)}
        for role, rows in taken.items():
            modules[f"{EXPERTS}.{e}.{role}_proj"] = pack(weights[e, "gate_up"].rows_of(*rows))
            if bias:
                modules[f"{EXPERTS}.{e}.{role}_proj"]["bias"] = biases("gate_up", 2 * I)[e][slice(*rows)]
        modules[f"{EXPERTS}.{e}.down_proj"] = pack(weights[e, "down"])
        if bias:
            modules[f"{EXPERTS}.{e}.down_proj"]["bias"] = biases("down", H)[e]
    return modules


VERSIONS = [
    ("0.14.0", False),
    ("0.16.1", False),
    ("0.17.1", True),
    ("0.18.0", True),
    ("0.18.1.a20260806", True),
    ("0.19.0", False),
    ("0.20.0", False),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("version", "halves"), VERSIONS)
def test_split_experts_alternate_again(tmp_path, version, halves, bias):
    weights = fused()
    out = converted(tmp_path, split(weights, halves, bias=bias), mxfp4_ct_config(version=version))
    check(out, weights, bias)
    said = "halves of the alternating rows" if halves else "gate_proj is the even rows"
    assert said in out.facts(EXPERTS) and version in out.facts(EXPERTS)


@pytest.mark.parametrize("version", ["0.17.0", "0.13.0", None, "unknown"])
def test_split_experts_of_an_unknown_order_are_refused(tmp_path, version):
    config = mxfp4_ct_config(version=version)
    message = refusal(tmp_path, Pico(config, split(fused(), False), config=GPT_OSS))
    assert f"version {version!r} in the config does not tell" in message


def test_auto_round_splits_in_even_and_odd_rows(tmp_path):
    weights = fused()
    config = mxfp4_ct_config(version="0.18.0", provider="auto-round")
    check(converted(tmp_path, split(weights, False), config), weights)


MODEL_FREE = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "model_free": True,
    "autoround_version": "0.15.1",
}


def model_free(weights, stacked_bias=True):
    """(modules, plain tensors) as AutoRound's model-free mode writes them from experts `[E, 2I, H]`: fused rows cut in
    two, biases left as they were (auto_round/utils/missing_tensors.py, `split_fused_expert_tensors`)."""
    modules, plain = {}, {}
    for e in range(E):
        gate_up, down = weights[e, "gate_up"], weights[e, "down"]
        for name, weight in {"gate": some(gate_up, 0, I), "up": some(gate_up, I, 2 * I), "down": down}.items():
            modules[f"{EXPERTS}.{e}.{name}_proj"] = gptq(weight)
    if stacked_bias:
        plain[f"{EXPERTS}.gate_up_proj_bias"] = np.stack(biases("gate_up", 2 * I))
        plain[f"{EXPERTS}.down_proj_bias"] = np.stack(biases("down", H))
    return modules, plain


def some(weight: Ints, start: int, stop: int) -> Ints:
    """Rows of an integer weight."""
    rows = slice(start, stop)
    return replace(weight, codes=weight.codes[rows], zeros=weight.zeros[:, rows], scales=weight.scales[:, rows])


def fused_ints():
    return {
        (e, role): ints(N=N, K=K, seed=10 * e + i)
        for e in range(E)
        for i, (role, (N, K)) in enumerate({"gate_up": (2 * I, H), "down": (H, I)}.items())
    }


@pytest.mark.parametrize("bias", [True, False])
def test_model_free_auto_round_cuts_in_halves(tmp_path, bias):
    weights = fused_ints()
    modules, plain = model_free(weights, bias)
    pico = Pico(MODEL_FREE, modules, plain, config=GPT_OSS)
    out = convert(pico.write(tmp_path / "in"), tmp_path / "out")
    check(out, weights, bias)
    assert not {name for name in out.repo.plain if "bias" in name}


def test_model_free_auto_round_of_transposed_stacks_is_refused(tmp_path):
    """Transformers' gpt-oss has experts `[E, H, 2I]` and `[E, I, H]`: model-free quantizes along the wrong axis."""
    modules = {}
    for e in range(E):
        for name, (N, K) in {"gate": (H // 2, 2 * I), "up": (H // 2, 2 * I), "down": (I, H)}.items():
            modules[f"{EXPERTS}.{e}.{name}_proj"] = gptq(ints(N=N, K=K))
    message = refusal(tmp_path, Pico(MODEL_FREE, modules, config=GPT_OSS))
    assert "stored transposed, and quantized and cut along the wrong axis" in message


def test_stacked_biases_of_another_shape_are_damage(tmp_path):
    modules, plain = model_free(fused_ints())
    plain[f"{EXPERTS}.down_proj_bias"] = np.ones((E, H + 1), np.float16)
    message = refusal(tmp_path, Pico(MODEL_FREE, modules, plain, config=GPT_OSS), DamagedError)
    assert f"{EXPERTS}.down_proj_bias is F16 [2, 65], want [2, 64]" in message


def test_partly_quantized_experts_cannot_be_dequantized(tmp_path):
    """The unquantized model has them in one tensor, its axes the other way round."""
    modules = split(fused(), False, bias=False)
    del modules[f"{EXPERTS}.1.up_proj"]
    plain = {f"{EXPERTS}.1.up_proj.weight": np.ones((I, H), np.float16)}
    pico = Pico(mxfp4_ct_config(version="0.20.0"), modules, plain, GPT_OSS)
    message = refusal(tmp_path / "in", pico)
    assert "unquantized: up of expert 1 of 2" in message and "dequantize" not in message
    with pytest.raises(UnsupportedError, match="nor can they be dequantized"):
        convert(pico.write(tmp_path / "in"), tmp_path / "out", on_unsupported="dequantize")


def test_other_models_have_nothing_to_alternate(tmp_path):
    weights = fused()
    out = converted(tmp_path, split(weights, True, bias=False), mxfp4_ct_config(version="0.18.0"), {})
    whole = weights[0, "gate_up"].values
    np.testing.assert_array_equal(out.values(EXPERTS, "gate", 0), whole[:I])
    assert not out.repo.modules[EXPERTS].scheme.interleaved


def int_rows(weight: Ints, start: int, stop: int, step: int) -> Ints:
    taken = slice(start, stop, step)
    return Ints(weight.bits, weight.codes[taken], weight.zeros[:, taken], weight.scales[:, taken], weight.groups)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("version", "halves"), [("0.16.0", False), ("0.18.0", True), ("0.20.0", False)])
def test_split_int_experts_alternate_again(tmp_path, version, halves, bits):
    modules, wholes = {}, []
    for e in range(E):
        whole = ints(bits, N=2 * I, K=H, seed=e, symmetric=bits == 4)
        wholes.append(whole)
        rows = {"gate": (0, I, 1), "up": (I, 2 * I, 1)} if halves else {"gate": (0, 2 * I, 2), "up": (1, 2 * I, 2)}
        for role, taken in rows.items():
            packed = pack_quantized(int_rows(whole, *taken), zeros="none" if bits == 4 else "packed")
            modules[f"{EXPERTS}.{e}.{role}_proj"] = packed
        down = ints(bits, N=H, K=I, seed=10 + e, symmetric=bits == 4)
        modules[f"{EXPERTS}.{e}.down_proj"] = pack_quantized(down, zeros="none" if bits == 4 else "packed")
    config = ct_config(bits, symmetric=bits == 4, version=version)
    out = converted(tmp_path, modules, config)
    for e, whole in enumerate(wholes):
        np.testing.assert_array_equal(out.values(EXPERTS, "gate", e), whole.values[0::2])
        np.testing.assert_array_equal(out.values(EXPERTS, "up", e), whole.values[1::2])


@pytest.mark.parametrize(("version", "halves"), [("0.18.0", True), ("0.20.0", False)])
def test_split_mxfp8_experts_alternate_again(tmp_path, version, halves):
    weights = {
        (e, role): mxfp8(*shape, seed=e)
        for e in range(E)
        for role, shape in (("gate_up", (2 * I, H)), ("down", (H, I)))
    }
    out = converted(tmp_path, split(weights, halves), mxfp4_ct_config(version=version))
    check(out, weights)


def test_fp8_experts_of_one_scale_alternate(tmp_path):
    weights = {}
    for e in range(E):
        gate, up = tensor(I, H, 1 + e), tensor(I, H, 5 + e)
        up = Floats("e4m3", up.codes, gate.scales, I, H)
        weights |= {(e, "gate"): gate, (e, "up"): up, (e, "down"): tensor(H, I)}
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, shape=(1,)))
    out = converted(tmp_path, modules, {"quant_method": "fp8"})
    for (e, role), weight in weights.items():
        np.testing.assert_array_equal(out.values(EXPERTS, role, e), weight.values)
    stored = out.array(f"{EXPERTS}.gate_up_proj").view(np.uint8)[0]
    np.testing.assert_array_equal(stored[:, 0::2], weights[0, "gate"].codes.T)
    np.testing.assert_array_equal(stored[:, 1::2], weights[0, "up"].codes.T)


def test_fp8_blocks_cannot_alternate(tmp_path):
    weights = {(0, "gate"): block(128, 128), (0, "up"): block(128, 128), (0, "down"): block(128, 128)}
    modules = expert_modules(weights, lambda weight: fp8_tensors(weight, "weight_scale_inv"))
    message = refusal(tmp_path, Pico({"quant_method": "fp8"}, modules, config=GPT_OSS))
    assert "the grouped GEMM's fp8 blocks cannot cover columns that alternate gate and up" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_proj_blocks": None}, f"{EXPERTS}.down_proj_blocks is missing"),
        ({"down_proj_scales": None}, f"{EXPERTS}.down_proj_scales is missing"),
        ({"down_proj_scales": np.zeros((E, H, 2), np.uint8)}, f"{EXPERTS}.down_proj_scales is U8 [2, 64, 2]"),
        ({"down_proj_blocks": np.zeros((E, H, 1, 8), np.uint8)}, "want U8 [E, N, G] and [E, N, G, 16]"),
        ({"down_proj_bias": np.zeros((E, 3), np.float16)}, f"{EXPERTS}.down_proj_bias is F16 [2, 3]"),
        ({"down_proj_bias": None}, "only gate_up matrices have biases"),
        (
            {"down_proj_blocks": np.zeros((E, H, 2, 16), np.uint8), "down_proj_scales": np.zeros((E, H, 2), np.uint8)},
            "do not belong together",
        ),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    parts = {name: array for name, array in (native(fused()) | change).items() if array is not None}
    assert message in refusal(tmp_path, Pico(NATIVE, {EXPERTS: parts}, config=GPT_OSS), DamagedError)


@pytest.mark.parametrize("name", [name for name in all_checkpoints() if "gptoss" in name and "mxfp4" in name])
def test_transformers_decodes_published_blocks_to_the_same_values(tmp_path, name):
    """Digests of transformers' own `convert_moe_packed_tensors`, all experts of a layer at once, rows as stored."""
    out = convert(open_source(str(all_checkpoints()[name])), tmp_path / "out")
    wanted = json.loads((FIXTURES / "oracles.json").read_text())[name]
    for module, entry in wanted.items():
        stack, _, part = module.rpartition(".")
        stored = out.repo.modules[stack]
        matrices = [m for m in out.repo.layout(stored).matrices(stored) if m.role != "up"]
        values = np.stack(
            [
                out.values(stack, m.role, m.expert)
                if m.role == "down"
                else np.stack([out.values(stack, "gate", m.expert), out.values(stack, "up", m.expert)], 1).reshape(
                    -1, m.K
                )
                for m in matrices
                if (m.role == "down") == (part == "down_proj")
            ]
        ).astype("<f4") + np.float32(0)
        assert list(values.shape) == entry["shape"]
        assert hashlib.sha256(values.tobytes()).hexdigest() == entry["values_sha256"]


def test_llm_compressors_that_halve_and_that_split_give_the_same_repo(tmp_path):
    """The same model, quantized by llm-compressor 0.12 and 0.14."""
    outs = [
        convert(open_source(str(FIXTURES / name)), tmp_path / name)
        for name in ("llmcompressor-0.12-gptoss-w4a16", "llmcompressor-gptoss-w4a16")
    ]
    assert all(said in out.facts(EXPERTS) for said, out in zip(("halves", "even rows"), outs, strict=True))
    for name in outs[0].repo.tensors:
        assert outs[0].array(name).tobytes() == outs[1].array(name).tobytes(), name
