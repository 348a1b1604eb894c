"""What is said of engines before a conversion is what loading does: for tiny models, in the installed Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from support.families.catalogue import FAMILIES  # noqa: E402
from support.families.models import write  # noqa: E402
from support.families.prompts import asked  # noqa: E402

import xpuquant  # noqa: E402
from xpuquant.conversion.plan.served_by import kernel_and_releases  # noqa: E402
from xpuquant.errors import UnsupportedError  # noqa: E402
from xpuquant.formats.scheme import Scheme  # noqa: E402
from xpuquant.served_families import ENGINES, REORDERING, reordered, tried  # noqa: E402

RECORD: dict[str, Any] = json.loads((Path(xpuquant.__file__).parent / "families.json").read_text())["families"]
LOADED = ("deepseek_v4", "llama4", "longcat_flash", "muse_spark", "qwen3_5_moe", "step3p7")
"""Families that this suite loads; `scripts/lanes/families` loads all."""


@pytest.mark.parametrize("name", LOADED)
def test_the_plan_says_what_loading_does(name: str, tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == name)
    twins = write(tmp_path, family)
    plan = xpuquant.convert(twins.source, tmp_path / "converted").plan
    said = [one for one in plan.engines if one.engine == "Transformers"][-1]
    auto = getattr(transformers, family.head)
    assert plan.source.auto_class == family.head
    if said.outcome == "refuses":
        with pytest.raises(UnsupportedError) as refusal:
            auto.from_pretrained(tmp_path / "converted", dtype=torch.float32)
        assert str(refusal.value) == said.why
        return
    assert said.outcome == "serves"
    with torch.no_grad():
        logits = []
        for folder in (twins.plain, tmp_path / "converted"):
            model = auto.from_pretrained(folder, dtype=torch.float32).eval()
            logits.append(model(**asked(model.config, family.image)).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def config_of(name: str) -> dict[str, Any]:
    plan = RECORD[name]["plan"]
    return {"architectures": [plan["architecture"]], "model_type": plan["model_type"]}


def outcomes(config: dict[str, Any], *parts: str) -> set[str]:
    return {one.outcome for one in tried(config, parts) if one.engine == "Transformers"}


def test_what_was_never_tried_is_said_to_be() -> None:
    for config in ({}, {"architectures": []}, {"architectures": ["NobodyForCausalLM"], "model_type": "nobody"}):
        assert {one.outcome for one in tried(config, ["linears"])} == {"not tried"}
        assert {one.engine for one in tried(config, ["linears"])} == set(ENGINES.values())


def test_an_architecture_with_another_language_model_is_another() -> None:
    config = config_of("mistral3")
    assert outcomes(config, "linears") == {"serves"}
    assert outcomes({**config, "text_config": {"model_type": "nobody"}}, "linears") == {"not tried"}


def test_experts_that_were_not_quantized_when_tried() -> None:
    (said,) = (one for one in tried(config_of("aria"), ["linears", "experts"]) if one.engine == "Transformers")
    assert str(said) == "not tried: with quantized experts"


@pytest.mark.parametrize("kind", REORDERING)
def test_a_loader_that_reorders_rows_is_said_to_refuse(kind: str) -> None:
    for leaf in REORDERING[kind]:
        said = tried({"architectures": [kind]}, ["linears"], linears=[f"model.layers.0.{leaf}"])
        vllm = [one for one in said if one.engine == "vLLM"]
        assert vllm and {str(one) for one in vllm} == {f"refuses: {reordered(f'model.layers.0.{leaf}', kind)}"}
    elsewhere = tried({"architectures": [kind]}, ["linears"], linears=["model.layers.0.other"])
    assert "refuses" not in {one.outcome for one in elsewhere}


def test_a_class_within_another_reorders_rows_too() -> None:
    kind = "MuseSparkForConditionalGeneration"
    said = tried({"architectures": [kind]}, ["linears"], linears=["model.layers.0.self_attn.q_proj"])
    outcomes = {one.version: str(one) for one in said if one.engine == "vLLM"}
    why = reordered("model.layers.0.self_attn.q_proj", "MuseSpark1xForCausalLM")
    assert outcomes["0.33.0"] == f"refuses: {why}"
    assert outcomes["0.32.0"].startswith("not tried")  # which has no class for it


def test_what_serves_with_other_layouts_is_said_to_have_had_those() -> None:
    config = config_of("deepseek_v2")
    same, other = (
        next(one for one in tried(config, ["linears"], [layout]) if one.engine == "Transformers")
        for layout in ("int4_linear", "fp8_linear")
    )
    assert (str(same), str(other)) == ("serves", "serves: tried with int4_experts and int4_linear")


@pytest.mark.parametrize(
    ("gated", "activation", "said"),
    [
        (True, "relu", "none computes 'relu' experts"),
        (True, "silu", None),
        (False, "silu", "none computes 'silu' experts without a gate"),
        (False, "relu2", None),
    ],
)
def test_activations_that_no_release_computes(gated: bool, activation: str, said: str | None) -> None:
    key = "hidden_act" if gated else "mlp_hidden_act"
    for layout in ("int4_experts", "uint4_experts", "int8_experts", "fp8_channel_experts", "nvfp4_experts"):
        _, releases = kernel_and_releases("experts", Scheme(layout, group_size=32, gated=gated), {key: activation})
        assert releases is not None and (releases == said or (said is None and "none" not in releases))


def test_a_refusal_of_experts_says_nothing_of_linears_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"outcome": "refused", "why": "model.layers.0.mlp.experts: AnyExperts computes in its own way"}
    plan = {"architecture": "AnyForCausalLM", "model_type": "any", "quantized": ["experts", "linears"]}
    record = {"families": {"any": {"plan": plan, "transformers": {"5.23.0": cell}}}}
    monkeypatch.setattr("xpuquant.served_families._record", lambda: record)
    config = {"architectures": ["AnyForCausalLM"], "model_type": "any"}
    assert outcomes(config, "linears", "experts") == {"refuses"}
    assert outcomes(config, "linears") == {"not tried"}


def test_nothing_on_record_fails() -> None:
    """What loads wrongly, or ends without a line that says why, has no place in a release."""
    cells = [
        (name, column, version, cell["outcome"])
        for name, family in RECORD.items()
        for column in ENGINES
        for version, cell in family.get(column, {}).items()
    ]
    assert len(cells) > 50
    assert [cell for cell in cells if cell[-1] in ("fails", "differs")] == []


def test_every_family_is_on_record() -> None:
    assert set(RECORD) == {family.name for family in FAMILIES}


def test_every_family_that_takes_images_was_asked_with_one() -> None:
    """In Transformers, wherever it loads."""
    seeing = [family for family in FAMILIES if family.head == "AutoModelForImageTextToText"]
    cells = [(one.name, cell) for one in seeing for cell in RECORD[one.name].get("transformers", {}).values()]
    assert len(cells) > 15
    assert [name for name, cell in cells if cell["outcome"] == "same" and "with an image" not in cell] == []
