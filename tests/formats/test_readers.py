"""All readers together, over every real checkpoint: each module has one reader, and no reader stumbles."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from support.checkpoints import FIXTURES, all_checkpoints

from xpuquant.conversion.sources.open import open_source
from xpuquant.errors import DamagedError
from xpuquant.formats import guard
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers import READERS, reading
from xpuquant.formats.readers.base import Reader

NAMES = sorted(all_checkpoints())

NOT_IN_FIXTURES = {
    "AutoRound": "its own files are GPTQ's, AWQ's or compressed-tensors'; it claims Apple MLX's, to refuse them",
    "Fp8Fused": "no producer fuses the experts of a model small enough: test_fp8.py makes them",
    "ModelOptInt4": "ModelOpt exports on a GPU only: test_field_producers.py packs it as its source does",
    "QuarkInt": "refused by name: test_field_producers.py",
    "Refused": "fake-quantized and sparse files are not what producers publish: test_compressed_tensors.py makes them",
}
"""Readers that read no fixture → why."""


@cache
def opened(name: str) -> Checkpoint:
    return open_source(str(all_checkpoints()[name])).checkpoint


def class_of(reader: Reader) -> str:
    return type(reader).__name__


@pytest.mark.parametrize("name", NAMES)
def test_no_two_readers_claim_one_module(name: str) -> None:
    for module, parts in reading.modules(opened(name)).items():
        claiming = [class_of(reader) for reader in READERS if reader.claims(parts)]
        assert len(claiming) <= 1, f"{module} with {sorted(parts)}: {claiming}"


def test_each_reader_reads_a_fixture() -> None:
    claiming = {
        class_of(reader)
        for name, folder in all_checkpoints().items()
        if folder.is_relative_to(FIXTURES)
        for parts in reading.modules(opened(name)).values()
        for reader in READERS
        if reader.claims(parts)
    }
    assert {class_of(reader) for reader in READERS} - claiming == set(NOT_IN_FIXTURES)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_readers_decides_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = summary(opened(name))
    for seed in range(3):
        monkeypatch.setattr(reading, "READERS", tuple(random.Random(seed).sample(READERS, len(READERS))))
        assert summary(opened(name)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_no_reader_stumbles_over_a_sound_checkpoint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard would turn into damage of the input is a mistake of ours here."""
    monkeypatch.setattr(guard, "UNFORESEEN", ())
    summary(opened(name))


def test_a_stumble_is_told_as_damage_and_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stumble() -> None:
        with guard.guarded("model.layers.0.mlp"):
            print(1 // int("0"))

    with pytest.raises(DamagedError, match=r"model\.layers\.0\.mlp: its tensors .*ZeroDivisionError"):
        stumble()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("XPUQUANT_TRACEBACK", "1")
    with pytest.raises(DamagedError):
        stumble()
    assert "in stumble" in capsys.readouterr().err


def summary(checkpoint: Checkpoint) -> Any:
    """A reading as plain data."""
    found = reading.read(checkpoint)
    weights = [(type(w).__name__, w.name, w.format, w.N, w.K, w.kind, w.tensors, w.facts) for w in found.weights]
    return weights, found.refused, found.rest
