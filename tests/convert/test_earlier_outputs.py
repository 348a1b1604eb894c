"""Outputs of before a rule of the conversion changed: what `verify --source` says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support.injected_faults as inject
from support.fuzz.case import command
from support.ints import Pico, gptq, gptq_config, ints

import xpuquant

TIED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], object], int, str]] = {
    "the source says nothing": ({}, lambda c: c.pop("tie_word_embeddings"), 0, "is missing: an earlier conversion"),
    "the source ties": (
        {"tie_word_embeddings": True},
        lambda c: c.update(tie_word_embeddings=True),
        1,
        "is true, as in the source, but the head is quantized",
    ),
    "the source does not": (
        {"tie_word_embeddings": False},
        lambda c: c.update(tie_word_embeddings=True),
        1,
        "is True, the source gives False",
    ),
    "of the text model": (
        {"text_config": {"tie_word_embeddings": True, "hidden_size": 64}},
        lambda c: c["text_config"].update(tie_word_embeddings=True),
        1,
        "text_config.tie_word_embeddings is true, as in the source",
    ),
    "a key less": ({"tie_word_embeddings": True}, lambda c: c.pop("tie_word_embeddings"), 1, "is missing, the source"),
}


@pytest.mark.parametrize("case", TIED)
def test_a_quantized_head_of_before_it_was_untied(case: str, tmp_path: Path) -> None:
    """Outputs whose config.json left to their head what the source says of it."""
    config, edit, outcome, said = TIED[case]
    head = {"lm_head": gptq(ints(N=32, K=64))}
    Pico(gptq_config(), head, config=config).write(tmp_path / "in")
    xpuquant.convert(str(tmp_path / "in"), str(tmp_path / "made"))
    repo = inject.copy(tmp_path / "made", tmp_path / "repo")
    repo.json("config.json", edit)
    inject.reseal(repo.folder)
    code, text, error = command(
        *("verify", str(repo.folder), "--source", str(tmp_path / "in")),
        *("--backend", "reference", "--jobs", "1", "--json"),
    )
    assert code == outcome and "internal error" not in error, error
    lines = json.loads(text)["failures" if outcome else "warnings"]
    assert len([line for line in lines if "tie_word_embeddings" in line]) == 1, lines
    assert any(said in line for line in lines), lines
