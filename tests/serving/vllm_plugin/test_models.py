"""A converted repo says under vLLM, token by token, what its dequantized twin says under stock vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import EXPERTS, FAMILIES, SCHEMES, Pair, write

HALVES = "scales in float16"

FP8_64 = replace(SCHEMES["fp8-block"], block_n=64)
# Name → family, linear scheme, expert scheme, other schemes by the name of a linear. Several schemes are a layer each:
# vLLM takes longer to start than to say anything. Which layer is wrong is told by test_load.py and by the tests of
# Transformers.
CASES: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "llama, every linear": ("llama", [*SCHEMES.values()], None, {}),
    "qwen3_moe, every expert": (
        "qwen3_moe",
        [SCHEMES.get(name, SCHEMES["int4"]) for name in EXPERTS],
        [*EXPERTS.values()],
        {},
    ),
    "gpt_oss": ("gpt_oss", [SCHEMES["int4"], SCHEMES["mxfp4"]], [EXPERTS["int4"], EXPERTS["mxfp4"]], {}),
    "mixtral": ("mixtral", [SCHEMES["int4"], SCHEMES["int4-act-order"]], [EXPERTS["int4"], EXPERTS["mxfp8"]], {}),
    **{family: (family, SCHEMES["int4"], None, {}) for family in ("qwen2", "qwen3", "mistral")},
    **{family: (family, SCHEMES["int4"], EXPERTS["int4"], {}) for family in ("deepseek_v2", "deepseek_v3")},
    # Fused layers whose members differ.
    "one of three unquantized": ("llama", SCHEMES["int4"], None, {"q_proj": None}),
    "members of other schemes": (
        "qwen2",
        SCHEMES["int4-asym"],
        None,
        {"k_proj": SCHEMES["mxfp8"], "up_proj": SCHEMES["int4-act-order"]},
    ),
    # 128 rows per block where N allows, 64 where it does not: DeepSeek's FP8 checkpoints.
    "members of other blocks": (
        "deepseek_v3",
        SCHEMES["fp8-block"],
        EXPERTS["fp8-block"],
        {"kv_a_proj_with_mqa": FP8_64},
    ),
    HALVES: ("qwen3_moe", SCHEMES["int4"], EXPERTS["int4"], {}),
}
assert {family for family, *_ in CASES.values()} == set(FAMILIES)
TOLERANCE = 2e-3
"""Of a log-probability in float32: two orders of summation. Measured: below 1e-4."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, asked: set[str]) -> dict[str, Pair]:
    made = {}
    for name in asked:
        family, scheme, experts, others = CASES[name]
        made[name] = write(tmp_path_factory.mktemp("model"), family, scheme, experts, others)
        if name == HALVES:
            with_scales_in_float16(made[name].converted)
    return made


def with_scales_in_float16(folder: Path) -> None:
    """bf16 scales of this size are exact in fp16, but for its subnormals."""
    weights = folder / "model.safetensors"
    halves = {n: t.half() if "scale" in n else t for n, t in load_file(weights).items()}
    assert any(t.dtype == torch.float16 for t in halves.values())
    save_file(halves, weights, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for scheme in config["quantization_config"]["schemes"]:
        scheme["scale_dtype"] = "F16"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def said(pairs: dict[str, Pair], generate: Callable[..., Any], asked: set[str]) -> Any:
    """In float32, so that a router cannot decide by a rounding error."""
    return generate([model for name in asked for model in (pairs[name].plain, pairs[name].converted)], dtype="float32")


def assert_same(plain: dict[str, Any], converted: dict[str, Any], tolerance: float) -> None:
    assert "error" not in plain, plain["error"]
    assert "error" not in converted, converted["error"]
    assert converted["tokens"] == plain["tokens"]
    for ours, theirs in zip(converted["logprobs"], plain["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_says_what_the_dequantized_model_says(name: str, pairs: dict[str, Pair], said: Any) -> None:
    """Scales in float16 are cast for the serving dtype, which the grouped GEMM would read them as."""
    pair = pairs[name]
    plain, converted = said[str(pair.plain)], said[str(pair.converted)]
    assert_same(plain, converted, TOLERANCE)
    assert len({tuple(tokens) for tokens in plain["tokens"]}) > 1, "the prompts must not all end alike"


def test_bfloat16_is_served_with_the_same_roundings(tmp_path: Path, generate: Callable[..., Any]) -> None:
    pair = write(tmp_path, "llama", [SCHEMES[scheme] for scheme in ("int4", "int4-asym", "fp8-block")])
    said = generate([pair.plain, pair.converted], dtype="bfloat16")
    assert_same(said[str(pair.plain)], said[str(pair.converted)], tolerance=1e-6)
