"""Act-order folded into the rows of the layers before: exact, and only where nothing else stands between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ints import DOWN, Converted, Ints, Pico, convert, gptq, gptq_config, ints

from xpuquant.formats.readers.fold_act_order import fold_act_orders
from xpuquant.formats.readers.reading import read

GATE, UP = DOWN.replace("down", "gate"), DOWN.replace("down", "up")


def mlp(bits: int = 4, symmetric: bool = True, seed: int = 0, **down) -> dict[str, Ints]:
    """gate and up [96, 64], down [64, 96], all in act-order."""
    wide: dict[str, Any] = {"N": 96, "K": 64, "symmetric": symmetric, "act_order": True}
    narrow: dict[str, Any] = {"N": 64, "K": 96, "symmetric": symmetric, "act_order": True, **down}
    return {
        GATE: ints(bits, seed=seed, **wide),
        UP: ints(bits, seed=seed + 1, **wide),
        DOWN: ints(bits, seed=seed + 2, **narrow),
    }


def folded(folder: Path, weights: dict[str, Ints], plain=None, **config) -> Converted:
    symmetric = bool(all((w.zeros == 1 << (w.bits - 1)).all() for w in weights.values()))
    quantization = gptq_config(sym=symmetric, bits=weights[DOWN].bits, desc_act=True)
    checkpoint = Pico(quantization, {name: gptq(w) for name, w in weights.items()}, plain or {}, config)
    return convert(checkpoint.write(folder / "in"), folder / "out", fold_act_order=True)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([2, 3, 4]), st.booleans(), st.integers(0, 99))
def test_folding_is_exact(tmp_path_factory, bits, symmetric, seed):
    weights = mlp(bits, symmetric, seed)
    out = folded(tmp_path_factory.mktemp("folding"), weights)
    order = np.argsort(weights[DOWN].groups, kind="stable")
    assert np.array_equal(out.values(GATE), weights[GATE].values[order])
    assert np.array_equal(out.values(UP), weights[UP].values[order])
    assert np.array_equal(out.values(DOWN), weights[DOWN].values[:, order])
    assert not out.repo.modules[DOWN].scheme.act_order
    assert f"{DOWN}.g_idx" not in out.repo.tensors
    assert out.repo.modules[GATE].scheme.act_order


def test_the_mlp_computes_the_same(tmp_path):
    # Integers throughout, so that the order of summation cannot matter.
    weights = {name: replace(w, scales=np.ones_like(w.scales)) for name, w in mlp().items()}
    out = folded(tmp_path, weights)
    x = np.random.default_rng(0).integers(-3, 4, (5, 64))

    def run(gate, up, down):
        return (np.maximum(x @ gate.T, 0) * (x @ up.T)) @ down.T

    before = run(*(weights[name].values for name in (GATE, UP, DOWN)))
    assert np.array_equal(run(*(out.values(name) for name in (GATE, UP, DOWN))), before)


def test_what_was_folded_is_on_record(tmp_path):
    out = folded(tmp_path, mlp())
    assert "act-order folded into the rows of gate_proj and up_proj" in out.facts(DOWN)
    assert "rows stored in the order of down_proj's columns" in out.facts(GATE)


@pytest.mark.parametrize(
    ("plain", "config"),
    [
        ({"model.layers.0.mlp.ffn_sub_norm.weight": 96}, {}),
        ({"model.layers.0.mlp.scale": 96}, {}),
        ({f"{GATE}.bias": 96}, {"mlp_bias": True}),
        ({}, {"model_type": "something"}),
    ],
)
def test_nothing_is_folded_where_more_stands_between(tmp_path, plain, config):
    tensors = {name: np.ones(size, np.float16) for name, size in plain.items()}
    weights = mlp()
    out = folded(tmp_path, weights, tensors, **config)
    assert out.repo.modules[DOWN].scheme.act_order
    for name, weight in weights.items():
        assert np.array_equal(out.values(name), weight.values)


def test_a_bias_after_the_sum_does_not_matter(tmp_path):
    out = folded(tmp_path, mlp(), {f"{DOWN}.bias": np.ones(64, np.float16)}, mlp_bias=True)
    assert not out.repo.modules[DOWN].scheme.act_order


def test_columns_in_order_need_no_folding(tmp_path):
    out = folded(tmp_path, mlp(act_order=False))
    assert "folded" not in out.facts(DOWN) and "rows stored" not in out.facts(UP)


def test_experts_are_left_alone(tmp_path):
    names = {name: name.replace("mlp", "mlp.experts.0") for name in (GATE, UP, DOWN)}
    modules = {names[name]: gptq(weight) for name, weight in mlp().items()}
    source = Pico(gptq_config(desc_act=True), modules).write(tmp_path)
    weights = list(read(source.checkpoint).weights)
    assert fold_act_orders(source.checkpoint, weights) == weights
