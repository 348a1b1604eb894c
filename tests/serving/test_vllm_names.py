"""Every name of vLLM that the plugin uses, in the sources of every supported release. No vLLM is imported."""

from __future__ import annotations

import ast
import copy

import pytest
from support import vllm_names
from support.vllm_names import Use

from xpuquant.vllm.versions import BEYOND, OLDEST

RELEASES = vllm_names.recorded()
METHODS = "vllm.model_executor.layers.fused_moe.fused_moe_method_base.FusedMoEMethodBase"


@pytest.mark.parametrize("version", RELEASES)
def test_the_release_has_what_the_plugin_uses(version: str) -> None:
    index = RELEASES[version]
    wrong = [
        f"{use.name} ({use.where}) {text}" for use in vllm_names.uses() if (text := vllm_names.problem(use, index))
    ]
    assert not wrong
    assert not vllm_names.missing_overrides(index)
    assert not vllm_names.missing_words(index)


def test_every_minor_release_that_is_supported_is_on_record() -> None:
    numbers = {tuple(int(part) for part in version.split(".")[:2]) for version in RELEASES}
    assert numbers == {(0, minor) for minor in range(OLDEST[1], BEYOND[1])}


def test_the_index_covers_the_plugin() -> None:
    """A name that no release has on record would pass as a method of ours alone."""
    used = {use.name for use in vllm_names.uses() if not use.overrides}
    assert len(used) > 50
    for index in RELEASES.values():
        assert used <= index["names"].keys()


def test_nothing_else_of_vllm_is_read() -> None:
    assert not vllm_names.undeclared()
    # What expert parallelism called, and 0.33 no longer has.
    assert vllm_names.undeclared("layer.expert_map_manager.get_local_expert_ids()") == {
        "expert_map_manager",
        "get_local_expert_ids",
    }


def _without(name: str) -> vllm_names.Index:
    index = copy.deepcopy(dict(RELEASES["0.33.0"]))
    del index["names"][name]
    return index


@pytest.mark.parametrize(
    "name",
    [
        "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts.expert_map",
        "vllm.model_executor.parameter.GroupQuantScaleParameter",
        "vllm.distributed.tensor_model_parallel_all_gather",
    ],
)
def test_a_name_that_goes_is_named(name: str) -> None:
    wrong = [use.name for use in vllm_names.uses() if vllm_names.problem(use, _without(name))]
    assert set(wrong) == {name}


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        (f"{METHODS}.apply", "self, layer, x, topk_weights, topk_ids, workspace", "does not take: workspace"),
        (f"{METHODS}.apply", "self, layer, x, topk_weights", "is not given what ours wants: topk_ids"),
        ("vllm.model_executor.utils.set_weight_attrs", "weight", "is called otherwise"),
        ("vllm.model_executor.parameter.ModelWeightParameter", "self, data", "is called otherwise"),
    ],
)
def test_another_signature_is_named(name: str, arguments: str, text: str) -> None:
    index = copy.deepcopy(dict(RELEASES["0.33.0"]))
    index["names"][name]["arguments"] = arguments
    found = [vllm_names.problem(use, index) for use in vllm_names.uses() if use.name == name]
    assert any(text in (said or "") for said in found)


def test_an_abstract_method_more_is_named() -> None:
    index = copy.deepcopy(dict(RELEASES["0.33.0"]))
    index["names"][METHODS]["abstract"].append("workspace_shapes")
    assert vllm_names.missing_overrides(index) == [f"{METHODS}.workspace_shapes"]


def test_what_cannot_be_called_is_no_method() -> None:
    call = ast.parse("is_xpu()", mode="eval").body
    assert isinstance(call, ast.Call)
    index = {"names": {"vllm.platforms.interface.Platform.is_xpu": {"kind": "attribute"}}}
    said = vllm_names.problem(Use("vllm.platforms.interface.Platform.is_xpu", "declared", call), index)
    assert said == "cannot be called"
