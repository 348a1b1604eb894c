"""The one table of what layers are called."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xpuquant.formats.architecture import (
    LAYERS,
    expert_of,
    fused_with,
    is_embedding,
    layer_of,
    members_of,
    splits_along_k,
)


def test_what_is_loaded_together_comes_from_one_input() -> None:
    for fused in {layer.fused for layer in LAYERS.values()} - {""}:
        members = members_of(fused)
        assert len(members) > 1
        assert len({LAYERS[leaf].K for leaf in members}) == 1
        assert not any(LAYERS[leaf].along_k for leaf in members), "columns of two layers cannot lie in one row"
        assert {fused_with(f"model.layers.0.{leaf}") for leaf in members} == {f"model.layers.0.{fused}"}


def test_members_are_in_the_order_of_the_fused_tensor() -> None:
    assert members_of("qkv_proj") == ["q_proj", "k_proj", "v_proj"]
    assert members_of("gate_up_proj") == ["gate_proj", "up_proj"]
    assert members_of("w13") == ["w1", "w3"]
    assert members_of("q_proj") == members_of("") == []


def test_what_down_reads_is_what_gate_and_up_make() -> None:
    for leaf, layer in LAYERS.items():
        # Granite's gate and up are one matrix, twice as high as down is wide.
        assert (layer.role == "down" and leaf != "output_linear") == bool(layer.fed_by)
        assert {LAYERS[leaf].role for leaf in layer.fed_by} <= {"gate", "up"}


@pytest.mark.parametrize(
    ("name", "along_k"),
    [("o_proj", True), ("a.linear_attn.out_proj", True), ("a.attn_out_proj", True), ("a.q_proj", False), ("", False)],
)
def test_along_which_axis_a_layer_is_split(name: str, along_k: bool) -> None:
    assert splits_along_k(name) is along_k


def test_names_that_nothing_is_known_of() -> None:
    assert layer_of("model.layers.0.mlp.gate") == layer_of("") == layer_of("model.norm")
    assert fused_with("model.norm") == "model.norm" and not is_embedding("model.norm")
    assert expert_of("model.layers.0.mlp.experts.07.w1") is None, "07 is another module than 7"
    assert expert_of("model.layers.0.mlp.experts.7.w1") == ("model.layers.0.mlp.experts", 7, "gate")


def test_serving_reads_the_table_without_numpy() -> None:
    program = "import sys, xpuquant.formats.architecture; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0
