"""Experts without a gate (Nemotron-3, relu squared): a stack `up_proj` `[E, I, ...]` instead of `gate_up_proj`."""

from __future__ import annotations

import numpy as np
import pytest
from support import floats
from support.floats import deepseek_config, float_ct_config, fp8_tensors, mx_tensors, mxfp4_ct_config
from support.ints import (
    Pico,
    awq,
    awq_config,
    convert,
    ct_config,
    gptq,
    gptq_config,
    ints,
    pack_quantized,
    refusal,
)

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.plan.tensor_parallel import problems
from xpuquant.errors import DamagedError
from xpuquant.formats.scheme import Scheme, from_config, to_config

STACK = "backbone.layers.1.mixer.experts"
E, I, H = 2, 128, 256
SHAPES = {"up": (I, H), "down": (H, I)}


def weights(make):
    return {
        (e, role): make(*shape, seed=10 * e + i) for e in range(E) for i, (role, shape) in enumerate(SHAPES.items())
    }


def integers(bits, **more):
    return lambda N, K, seed: ints(bits, N, K, 32, seed=seed, **more)


SOURCES = {
    # what the source is → the label of what is stored, codes and scales of up
    "gptq": (gptq_config(), integers(4), gptq, "int4_experts g32", (I, H // 2), (I, H // 32)),
    "awq": (awq_config(), integers(4, symmetric=False), awq, "uint4_experts g32 asymmetric", (I, H // 2), (I, H // 32)),
    "8 bits": (gptq_config(bits=8), integers(8), gptq, "int8_experts g32", (I, H), (I, H // 32)),
    "packed": (ct_config(), integers(4), pack_quantized, "int4_experts g32", (I, H // 2), (I, H // 32)),
    "fp8 tensor": (
        *({"quant_method": "modelopt"}, floats.tensor, lambda weight: fp8_tensors(weight, shape=())),
        *("fp8_experts tensor", (H, I), ()),
    ),
    "fp8 channel": (
        *(float_ct_config("float-quantized", "channel"), floats.channel, fp8_tensors),
        *("fp8_channel_experts channel", (I, H), (I,)),
    ),
    "fp8 block": (
        *(deepseek_config(), floats.block, lambda weight: fp8_tensors(weight, "weight_scale_inv")),
        *("fp8_experts 128x128", (H, I), (H // 128, I // 128)),
    ),
    "mxfp4": (mxfp4_ct_config(), floats.mxfp4, mx_tensors, "mxfp4_experts g32", (I, H // 2), (I, H // 32)),
    "mxfp8": (
        *(float_ct_config("mxfp8-quantized", "group"), floats.mxfp8, mx_tensors),
        *("mxfp8_experts g32", (H, I), (I, H // 32)),
    ),
}


def pico(source, **more):
    config, make, pack, *_ = SOURCES[source]
    made = weights(make)
    return Pico(config, {f"{STACK}.{e}.{role}_proj": pack(w) for (e, role), w in made.items()}, **more), made


@pytest.mark.parametrize("source", SOURCES)
def test_they_are_stored_under_their_own_name(tmp_path, source):
    _, _, _, label, codes, scales = SOURCES[source]
    checkpoint, made = pico(source)
    out = convert(checkpoint.write(tmp_path / "in"), tmp_path / "out")
    scheme = out.repo.modules[STACK].scheme
    assert scheme.label() == f"{label} no-gate" and not scheme.gated
    assert out.array(f"{STACK}.up_proj").shape == (E, *codes)
    assert out.array(f"{STACK}.up_proj_scale").shape == (E, *scales)
    assert not [name for name in out.repo.tensors if "gate" in name]
    for (e, role), weight in made.items():
        np.testing.assert_array_equal(out.values(STACK, role, e), weight.values)
    config = out.plan.quantization_config("tests")
    assert config["format_version"] == 2 and config["schemes"][0]["gated"] is False


@pytest.mark.parametrize("source", ["gptq", "fp8 tensor"])
def test_biases(tmp_path, source):
    biases = {
        f"{STACK}.{e}.{role}_proj.bias": np.full(SHAPES[role][0], e + 1, np.float16)
        for e in range(E)
        for role in SHAPES
    }
    config, make, pack, *_ = SOURCES[source]
    modules = {f"{STACK}.{e}.{role}_proj": pack(w) for (e, role), w in weights(make).items()}
    out = convert(Pico(config, modules, biases).write(tmp_path / "in"), tmp_path / "out")
    assert out.array(f"{STACK}.up_proj_bias").tolist() == [[1] * I, [2] * I]
    assert out.array(f"{STACK}.down_proj_bias").tolist() == [[1] * H, [2] * H]


def test_what_has_a_gate_is_written_as_before():
    gated, gateless = Scheme("int4_experts", group_size=32), Scheme("int4_experts", group_size=32, gated=False)
    assert "gated" not in to_config({"a": gated}, "tests")["schemes"][0]
    assert from_config(to_config({"a": gateless, "b": gated}, "tests")) == {"a": gateless, "b": gated}


def test_sizes_that_do_not_belong_together(tmp_path):
    config, make, pack, *_ = SOURCES["gptq"]
    modules = {f"{STACK}.{e}.{role}_proj": pack(w) for (e, role), w in weights(make).items()}
    modules |= {f"{STACK}.{e}.down_proj": pack(make(H, 64, e)) for e in range(E)}
    message = refusal(tmp_path, Pico(config, modules), DamagedError)
    assert "up is [128, 256] and down [256, 64]; they do not belong together" in message


def test_how_it_is_cut_among_gpus(tmp_path):
    plan = make_plan(pico("gptq")[0].write(tmp_path / "in").checkpoint, Options())
    assert not problems(plan.modules, 4)
    assert "whole groups of 32" in problems(plan.modules, 8)[STACK]
