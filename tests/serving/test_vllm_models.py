"""What vLLM's model classes do with layers that the plugin must know of, in every supported release; without vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import vllm_models

from xpuquant.formats.architecture import ALIASES
from xpuquant.served_families import NO_CLASS, REORDERING, WITHIN
from xpuquant.vllm.versions import BEYOND, OLDEST

RELEASES = vllm_models.recorded()
BESIDE = {"AriaForConditionalGeneration.language_model": "its mapper renames the whole language model"}
"""Layers with routed experts, asked for under another name that is no alias."""

REARRANGED = {
    "DeepseekV4AiterMegaMoEExperts.load_shared_expert": "of ROCm",
    "DeepseekV4AiterMegaMoEExperts.weight_loader": "of ROCm",
    "DeepseekV4Attention._split_qkv_and_norm": "activations",
    "DeepseekV4Model.load_weights": "views a scale as bytes",
    "DeepseekV4ROCMAiterMLAAttention._split_qkv_and_norm": "of ROCm",
    "GptOssModel._load_weights_mxfp4": "experts, which are taken out of the stream",
    "GptOssModel._load_weights_other": "experts",
    "GptOssModel._load_weights_quark": "experts",
    "GptOssRoutedExperts._load_packed_expert": "experts",
    "GptOssRoutedExperts._load_unquantized_expert": "experts",
    "GraniteMoeHybridModel.load_weights": "experts",
    "K2HorizonModel.load_weights": "refused",
    "Llama4ForCausalLM.permute_qk_weight_for_rotary": "followed",
    "Llama4Model.load_moe_expert_weights": "experts",
    "Llama4Model.load_weights": "experts",
    "MistralForCausalLM.maybe_remap_mistral": "refused",
    "MistralForCausalLM.permute": "refused",
    "MuseSpark1xForCausalLM.load_weights": "refused",
    "MuseSparkConsolidatedRoutedExperts.load_weights": "experts",
    "MultiHeadLatentAttention.process_weights_after_loading": "of what the layer's method computes",
    "PatchMerger.permute": "activations",
    "TeleChat2Model._split_key_value": "refused",
}
"""Functions that rearrange what they load → why stored tensors are right nevertheless: `experts` never reach them."""


def test_every_supported_release_and_architecture_is_on_record() -> None:
    numbers = {tuple(int(part) for part in version.split(".")[:2]) for version in RELEASES}
    assert numbers == {(0, minor) for minor in range(OLDEST[1], BEYOND[1])}
    for version, index in RELEASES.items():
        assert set(index) == vllm_models.architectures()
        missing = {name for name, found in index.items() if not found["model"]}
        assert missing == {name for name, versions in NO_CLASS.items() if version in versions}


@pytest.mark.parametrize("version", RELEASES)
def test_stacks_of_experts_are_asked_for_by_a_name_that_is_known(version: str) -> None:
    """Linears go by their path; a stack is found by the name that it is asked for under, or an alias of it."""
    for found in RELEASES[version].values():
        for layer, asked in found["stacks"].items():
            pair = {f".{layer.rpartition('.')[2]}.", f".{asked}."}
            assert layer in BESIDE or pair in [set(one) for one in ALIASES], layer


@pytest.mark.parametrize("version", RELEASES)
def test_whatever_rearranges_weights_is_known(version: str) -> None:
    found = {name for one in RELEASES[version].values() for name in one["rearranges"]}
    assert found - set(REARRANGED) == set()


def test_what_is_known_is_still_there() -> None:
    """In one of the supported releases."""
    found = {name for index in RELEASES.values() for one in index.values() for name in one["rearranges"]}
    assert set(REARRANGED) - found == set()


def reordering(function: str) -> str:
    """The class of `REORDERING` that one of the functions belongs to."""
    return function.partition(".")[0].replace("Model", "ForCausalLM")


def test_what_is_said_to_be_refused_is() -> None:
    assert set(REORDERING) == {reordering(name) for name, why in REARRANGED.items() if why == "refused"}


def test_an_architecture_that_is_refused_at_load_is_known_before() -> None:
    """Also where its class has another name, or is a part of another one."""
    known = {
        (kind, reordering(function))
        for index in RELEASES.values()
        for kind, found in index.items()
        for function in found["rearranges"]
        if REARRANGED[function] == "refused"
    }
    assert {kind: inner for kind, inner in known if kind != inner} == WITHIN


def test_names_are_read_out_of_sources(tmp_path: Path) -> None:
    models = tmp_path / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (models / "registry.py").write_text('M = {"AForCausalLM": ("a", "A"), "BForCausalLM": ("b", "B")}')
    (models / "a.py").write_text(
        """
from .b import Mixer
class Block:
    def __init__(self, prefix):
        self.experts = FusedMoEFactory(prefix=f"{prefix}.experts")
class A:
    def __init__(self, prefix):
        self.mamba = Mixer(prefix=f"{prefix}.mixer")
        self.moe = Block(prefix=f"{prefix}.mlp")
        self.out_proj = RowParallelLinear(prefix=f"{prefix}.out_proj")
        self.bare = RowParallelLinear(quant_config=quant_config)
    def load_weights(self, weights):
        for name, weight in weights:
            name.split(".")
            weight.view(2, -1).transpose(0, 1)
"""
    )
    (models / "b.py").write_text(
        "class Mixer:\n    def __init__(self, prefix):\n        self.p = ColumnParallelLinear(prefix=f'{prefix}.p')\n"
    )
    index = vllm_models.read(tmp_path, ["AForCausalLM", "BForCausalLM", "CForCausalLM"])
    assert index["AForCausalLM"] == {
        "model": "model_executor.models.a.A",
        "linears": {"A.mamba": "mixer", "A.bare": ""},
        "stacks": {"A.moe": "mlp"},
        "rearranges": {"A.load_weights": "transpose view"},
    }
    assert index["BForCausalLM"]["model"] == index["CForCausalLM"]["model"] == ""
