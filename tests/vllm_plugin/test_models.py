"""A converted repo says under vLLM, token by token, what its dequantized twin says under stock vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_models import EXPERTS, MOE, SCHEMES, Pair, write

# family, linear scheme, expert scheme
CASES = [
    *(("llama", scheme, None) for scheme in SCHEMES),
    *((family, "int4", "int4" if family in MOE else None) for family in ("qwen2", "qwen3", "mistral", *MOE)),
    *(("qwen3_moe", experts, experts) for experts in EXPERTS if experts != "int4"),
    ("gpt_oss", "mxfp4", "mxfp4"),
    ("mixtral", "int4-act-order", "mxfp8"),
]
NAMES = ["-".join(part for part in case if part) for case in CASES]
TOLERANCE = 2e-3
"""Of a log-probability in float32: two orders of summation. Measured: below 1e-4."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, (family, scheme, experts) in zip(NAMES, CASES, strict=True):
        (folder / name).mkdir()
        made[name] = write(folder / name, family, SCHEMES[scheme], EXPERTS[experts] if experts else None)
    return made


@pytest.fixture(scope="module")
def said(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    # float32, so that a router cannot decide by a rounding error.
    return generate([model for p in pairs.values() for model in (p.plain, p.converted)], dtype="float32")


def assert_same(plain: dict[str, Any], converted: dict[str, Any], tolerance: float) -> None:
    assert "error" not in plain, plain["error"]
    assert "error" not in converted, converted["error"]
    assert converted["tokens"] == plain["tokens"]
    for ours, theirs in zip(converted["logprobs"], plain["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_the_dequantized_model_says(name: str, pairs: dict[str, Pair], said: Any) -> None:
    pair = pairs[name]
    plain, converted = said[str(pair.plain)], said[str(pair.converted)]
    assert_same(plain, converted, TOLERANCE)
    assert len({tuple(tokens) for tokens in plain["tokens"]}) > 1, "the prompts must not all end alike"


def test_bfloat16_is_served_with_the_same_roundings(pairs: dict[str, Pair], generate: Callable[..., Any]) -> None:
    models = [pairs[f"llama-{scheme}"] for scheme in ("int4", "int4-asym", "fp8-block")]
    said = generate([model for p in models for model in (p.plain, p.converted)], dtype="bfloat16")
    for pair in models:
        assert_same(said[str(pair.plain)], said[str(pair.converted)], tolerance=1e-6)


def test_scales_in_float16_are_cast_for_bfloat16(tmp_path: Path, generate: Callable[..., Any]) -> None:
    """The grouped GEMM would read fp16 scales as bf16; the parameters have the serving dtype instead."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    pair = write(tmp_path, "qwen3_moe", SCHEMES["int4"], EXPERTS["int4"])
    weights = pair.converted / "model.safetensors"
    halves = {n: t.half() if "scale" in n else t for n, t in load_file(weights).items()}
    assert any(t.dtype == torch.float16 for t in halves.values())
    save_file(halves, weights, {"format": "pt"})
    config = json.loads((pair.converted / "config.json").read_text())
    for scheme in config["quantization_config"]["schemes"]:
        scheme["scale_dtype"] = "F16"
    (pair.converted / "config.json").write_text(json.dumps(config))
    said = generate([pair.plain, pair.converted], dtype="float32")
    # bf16 scales this size are exact in fp16 up to its subnormals.
    assert_same(said[str(pair.plain)], said[str(pair.converted)], TOLERANCE)
