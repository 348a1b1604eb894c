"""What engines were seen to do with converted repos of an architecture.

`families.json` beside this module is written by `scripts/lanes/families`: for each family a tiny model, converted and
loaded by a version of each engine. Here an architecture and what of it is quantized are looked up. That a model was
never tried is an answer too, and the usual one: engines know hundreds.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from xpuquant.values import frozen

ENGINES: Mapping[str, str] = {"transformers": "Transformers", "vllm": "vLLM"}
VERSIONS: Mapping[str, tuple[str, ...]] = {"transformers": (), "vllm": ("0.33.0",)}
"""Versions that are served, by column of the record, beside those in which something was tried."""


@frozen(slots=True, sealed=True)
class Tried:
    """What one version of an engine does with an architecture.

    outcome  `serves`: a tiny model gave the logits (Transformers) or tokens (vLLM, on a CPU; of 0.33.0 the released
             Python over the compiled library of 0.32.0) of its dequantized twin; `why` names the layouts that it
             had, where they are not those asked for;
             `refuses`: loading ends with the line in `why`; `fails`: it does not load, or computes something else;
             `not tried`
    """

    engine: str
    version: str
    outcome: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.why}" if self.why else self.outcome


REORDERING: Mapping[str, tuple[str, ...]] = {
    "K2HorizonForCausalLM": ("q_proj", "k_proj"),
    "MistralForCausalLM": ("wq", "wk"),  # Mistral's own names; those of Hugging Face are left as they are
    "MuseSpark1xForCausalLM": ("q_proj", "k_proj"),
    "TeleChat2ForCausalLM": ("key_value",),
}
"""Classes of vLLM whose `load_weights` takes rows apart or reorders them → the linears of which it does: refused."""


WITHIN: Mapping[str, str] = {
    "Ministral3ForCausalLM": "MistralForCausalLM",
    "MuseSparkForConditionalGeneration": "MuseSpark1xForCausalLM",
}
"""Architectures that vLLM serves by a class of `REORDERING`, alone or as a part → that class."""

NO_CLASS: Mapping[str, tuple[str, ...]] = {"MuseSparkForConditionalGeneration": ("0.32.0",)}
"""Architectures of the record that a supported release of vLLM has no class for."""


def reordered(name: str, kind: str) -> str:
    """Why a linear of a class of `REORDERING` is refused."""
    return (
        f"{name}: vLLM's {kind} reorders its rows while it loads them, which is not done for stored layouts yet; "
        "serve the source repo instead"
    )


def tried(
    config: Mapping[str, Any], parts: Collection[str], layouts: Collection[str] = (), linears: Collection[str] = ()
) -> tuple[Tried, ...]:
    """What each version of each engine is known to do with a model.

    Args:
        config: its config.json.
        parts: what of it is quantized: `linears`, `experts`.
        layouts: of its quantized modules. Where others were tried, those are named.
        linears: names of its quantized linears.
    """
    kind = architecture_of(config) or ""
    inner = WITHIN.get(kind, kind)
    refused = next((name for name in linears if name.rpartition(".")[2] in REORDERING.get(inner, ())), None)
    cells = _cells_of(config)
    found = []
    for column, engine in ENGINES.items():
        for version in _versions(column):
            if column == "vllm" and refused is not None and version not in NO_CLASS.get(kind, ()):
                found.append(Tried(engine, version, "refuses", reordered(refused, inner)))
                continue
            outcomes = [
                _outcome(plan, cell[version], set(parts), set(layouts))
                for plan, cell in cells[column]
                if version in cell
            ]
            known = [one for one in outcomes if one[0] != "not tried"]
            found.append(Tried(engine, version, *(known or outcomes or [("not tried", "")])[0]))
    return tuple(found)


def _cells_of(config: Mapping[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    """Column → (plan's cell, cells by version) of each family with that architecture and model type."""
    key = architecture_of(config), model_type_of(config)
    families = [
        family
        for family in _record()["families"].values()
        if (family.get("plan", {}).get("architecture"), family.get("plan", {}).get("model_type")) == key
    ]
    return {column: [(family["plan"], family.get(column, {})) for family in families] for column in ENGINES}


def _outcome(plan: Mapping[str, Any], cell: Mapping[str, Any], parts: set[str], layouts: set[str]) -> tuple[str, str]:
    was, why = cell["outcome"], cell.get("why", "")
    untried = parts - set(plan["quantized"])
    if was == "same":
        if untried:
            return "not tried", f"with quantized {' and '.join(sorted(untried))}"
        stored = plan.get("stored", [])
        return "serves", f"tried with {' and '.join(stored)}" if layouts - set(stored) else ""
    if was == "not run":
        return "not tried", f"the tiny dequantized model did not run: {why.removeprefix('the twin: ')}"
    # The line begins with the module's name: where the repo has none of its kind, it may well load.
    because = "experts" if ".experts" in why.partition(": ")[0].partition(" ")[0] else "linears"
    if because not in parts:
        return "not tried", f"without quantized {because}"
    return ("refuses" if was == "refused" else "fails"), why


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The class that config.json names first."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def model_type_of(config: Mapping[str, Any]) -> str | None:
    """The model type of the language model."""
    text = config.get("text_config")
    own = text.get("model_type") if isinstance(text, Mapping) else None
    found = own or config.get("model_type")
    return None if found is None else str(found)


def _versions(column: str) -> list[str]:
    recorded = {version for family in _record()["families"].values() for version in family.get(column, {})}
    return sorted(recorded | set(VERSIONS[column]), key=lambda version: [int(part) for part in version.split(".")])


@cache
def _record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "families.json").read_text())
    return found
