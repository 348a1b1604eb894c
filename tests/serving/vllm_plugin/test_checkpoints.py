"""Real checkpoints, as their producers wrote them: converted, they say under vLLM what their dequantized twins say
under stock vLLM, on one rank and, those with experts, on two.

All that 0.1.0 refused for want of a kernel are among them where `XPUQUANT_CHECKPOINTS` names the larger set; the same
kinds are among the fixtures. vLLM starts three or four times for each: without that variable two are played.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import LAID_OUT, all_checkpoints
from support.models import Pair
from support.twins import write_twin

import xpuquant

FIXTURES = {
    "autoawq-mixtral-w4g32-asym",
    "autoawq-qwen3moe-w4g32-asym",
    "gptqmodel-qwen3moe-w4g32-asym-as-awq",
    "gptqmodel-qwen3moe-w8g32-asym",
    "llmcompressor-qwen3moe-w4a16-asym",
    "llmcompressor-qwen3moe-fp8-dynamic",
    "llmcompressor-qwen3moe-nvfp4a16",
    "llmcompressor-llama-w8a8",
    "modelopt-llama-nvfp4",
    "modelopt-llama4-nvfp4",
}
ALWAYS = {"autoawq-qwen3moe-w4g32-asym", "modelopt-llama4-nvfp4"}
"""Experts with zero points in AWQ's packing, by AutoAWQ, and in one tensor of each projection."""
PLAYED = FIXTURES | LAID_OUT if "XPUQUANT_CHECKPOINTS" in os.environ else ALWAYS
NAMES = sorted(name for name in all_checkpoints() if name in PLAYED)
EXPERT = [name for name in NAMES if any(kind in name for kind in ("moe", "mixtral", "llama4"))]
UNQUANTIZED = {"gptq/gptqmodel-qwen3moe-w4g64"}
"""Whose second layer its producer left alone: stock vLLM's CPU kernel, which computes it, knows no experts of other
ranks and reads beyond its own."""
TOLERANCE = 2e-3
"""Of a log-probability in float32: two orders of summation."""
JOB = {"dtype": "float32", "vocabulary": 64, "positions": 128}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, asked: set[str]) -> dict[str, Pair]:
    made = {}
    for name in asked:
        folder, source = tmp_path_factory.mktemp("checkpoint"), all_checkpoints()[name]
        xpuquant.convert(str(source), str(folder / "converted"))
        assert xpuquant.verify(str(folder / "converted"), source=str(source)).passed
        made[name] = Pair(folder / "converted", write_twin(source, folder / "plain"))
    return made


@pytest.fixture(scope="module")
def plain(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    return generate([pair.plain for pair in pairs.values()], **JOB)


@pytest.fixture(scope="module")
def one(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    return generate([pair.converted for pair in pairs.values()], **JOB)


def with_experts(pairs: dict[str, Pair]) -> list[Path]:
    return [pair.converted for name, pair in pairs.items() if name in EXPERT]


@pytest.fixture(scope="module")
def tensor(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    return generate(with_experts(pairs), tp=2, **JOB)


@pytest.fixture(scope="module")
def expert(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    models = [pair.converted for name, pair in pairs.items() if name in EXPERT and name not in UNQUANTIZED]
    return generate(models, tp=2, expert_parallel=[str(model) for model in models], **JOB)


def check(pair: Pair, plain: Any, said: Any) -> None:
    wanted, got = plain[str(pair.plain)], said[str(pair.converted)]
    assert "error" not in wanted, f"{wanted['error']}\n{wanted['log'][-3000:]}"
    assert "error" not in got, f"{got['error']}\n{got['log'][-3000:]}"
    assert got["tokens"] == wanted["tokens"]
    for ours, theirs in zip(got["logprobs"], wanted["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
    assert len({tuple(tokens) for tokens in got["tokens"]}) > 1, "the prompts must not all end alike"


@pytest.mark.parametrize("name", NAMES)
def test_says_what_the_twin_says(name: str, pairs: dict[str, Pair], plain: Any, one: Any) -> None:
    check(pairs[name], plain, one)


@pytest.mark.parametrize("name", EXPERT)
def test_tensor_parallel(name: str, pairs: dict[str, Pair], plain: Any, tensor: Any) -> None:
    check(pairs[name], plain, tensor)


@pytest.mark.parametrize("name", [name for name in EXPERT if name not in UNQUANTIZED])
def test_expert_parallel(name: str, pairs: dict[str, Pair], plain: Any, expert: Any) -> None:
    check(pairs[name], plain, expert)
