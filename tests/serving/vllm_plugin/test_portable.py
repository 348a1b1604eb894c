"""A portable repo under stock vLLM, with nothing of ours loaded, says what its source says.

That is the dequantized source; where activations are quantized too, the source as llm-compressor would have written it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.portable_models import write_source

from xpuquant.conversion.cli.app import run

# vLLM 0.32's CPU build has no kernel for 16-bit activations with fp8 weights, and none for int4 experts.
CASES = [("llama", "int4"), ("llama", "int4-asym"), ("qwen3", "int4"), ("llama", "fp8-dynamic")]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, generate: Callable[..., Any], stock_int4: str | None) -> Any:
    folder = tmp_path_factory.mktemp("portable")
    pairs: dict[tuple[str, str], tuple[Path, Path]] = {}
    for family, kind in CASES:
        if kind.startswith("int4") and stock_int4 is not None:
            continue
        place = folder / f"{family}-{kind}"
        place.mkdir()
        made = write_source(place, family, kind)
        out = place / "out"
        assert run(["convert", str(made.source), str(out), "--layout", "compressed-tensors"]) == 0
        pairs[family, kind] = made.source if kind == "fp8-dynamic" else made.plain, out
    with pytest.MonkeyPatch.context() as env:
        env.setenv("VLLM_PLUGINS", "")
        env.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        reports = generate([path for pair in pairs.values() for path in pair], dtype="bfloat16")
    return {case: [reports[str(path)] for path in pair] for case, pair in pairs.items()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_stock_vllm_says_what_the_source_says(case: tuple[str, str], said: Any, stock_int4: str | None) -> None:
    if case not in said:
        pytest.skip(str(stock_int4))
    source, portable = said[case]
    assert "error" not in source, source["error"]
    assert "error" not in portable, portable["error"]
    assert portable["tokens"] == source["tokens"]
    for ours, theirs in zip(portable["logprobs"], source["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
