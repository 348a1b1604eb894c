"""The class of Transformers that a card names, against Transformers' own lists."""

from __future__ import annotations

from typing import Any

import pytest

from xpuquant.formats.checkpoint import Checkpoint


def named(architecture: str, **more: Any) -> str:
    return Checkpoint({"architectures": [architecture], **more}, {}, {}).auto_class


def test_what_each_list_of_transformers_has_is_loaded_by_its_class() -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    lists = {
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForMaskedLM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    ends = {"AutoModelForImageTextToText": "ForConditionalGeneration"}
    for kind, models in lists.items():
        end = ends.get(kind, kind.removeprefix("AutoModel"))
        names = {name for name in models.values() if isinstance(name, str) and name.endswith(end)}
        assert len(names) > 20, kind
        more = {"vision_config": {}} if kind in ends else {}
        assert {named(name, **more) for name in names} == {kind}


def test_configs_without_an_architecture_or_with_a_body_alone() -> None:
    assert named("Qwen3Model") == "AutoModel"
    assert Checkpoint({}, {}, {}).auto_class == "AutoModelForCausalLM"
    assert Checkpoint({"architectures": "x", "vision_config": {}}, {}, {}).auto_class == "AutoModelForImageTextToText"
