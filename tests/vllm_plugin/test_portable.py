"""A portable repo under stock vLLM, with nothing of ours loaded, says what its dequantized twin says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from portable_models import Twins, write_source

from xpuquant.convert.cli import run

CASES = [("llama", "int4"), ("llama", "int4-asym"), ("llama", "fp8-channel"), ("qwen3_moe", "int4")]
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, generate: Callable[..., Any]) -> Any:
    folder = tmp_path_factory.mktemp("portable")
    twins: dict[tuple[str, str], Twins] = {}
    for family, kind in CASES:
        place = folder / f"{family}-{kind}"
        place.mkdir()
        twins[family, kind] = made = write_source(place, family, kind)
        assert run(["convert", str(made.source), str(place / "out"), "--layout", "compressed-tensors"]) == 0
    folders = [path for made in twins.values() for path in (made.plain, made.plain.parent / "out")]
    with pytest.MonkeyPatch.context() as env:
        env.setenv("VLLM_PLUGINS", "")
        env.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        reports = generate(folders, dtype="float32")
    return {
        case: (reports[str(made.plain)], reports[str(made.plain.parent / "out")])
        for case, made in twins.items()
    }


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_stock_vllm_says_what_the_dequantized_source_says(case: tuple[str, str], said: Any) -> None:
    plain, portable = said[case]
    assert "error" not in plain, plain["error"]
    assert "error" not in portable, portable["error"]
    assert portable["tokens"] == plain["tokens"]
    for ours, theirs in zip(portable["logprobs"], plain["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
