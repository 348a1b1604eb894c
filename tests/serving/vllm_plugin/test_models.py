"""A converted repo says under vLLM, token by token, what its dequantized twin says under stock vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import EXPERTS, MOE, SCHEMES, Pair, write

# family, linear scheme, expert scheme
CASES = [
    *(("llama", scheme, None) for scheme in SCHEMES),
    *((family, "int4", "int4" if family in MOE else None) for family in ("qwen2", "qwen3", "mistral", *MOE)),
    *(("qwen3_moe", experts if experts in SCHEMES else "int4", experts) for experts in EXPERTS if experts != "int4"),
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
def said(pairs: dict[str, Pair], generate: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """Of the models that the tests selected ask for; in float32, so that a router cannot decide by a rounding error."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    chosen = [pair for name, pair in pairs.items() if name in asked]
    return generate([model for p in chosen for model in (p.plain, p.converted)], dtype="float32")


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


MIXED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one of three unquantized": ("llama", "int4", {"q_proj": None}),
    "schemes": ("qwen2", "int4-asym", {"k_proj": SCHEMES["mxfp8"], "up_proj": SCHEMES["int4-act-order"]}),
    # 128 rows per block where N allows, 64 where it does not: DeepSeek's FP8 checkpoints.
    "blocks": ("deepseek_v3", "fp8-block", {"kv_a_proj_with_mqa": replace(SCHEMES["fp8-block"], block_n=64)}),
}


@pytest.mark.parametrize("tp", [1, 2])
def test_fused_layers_with_members_of_different_schemes(tp: int, tmp_path: Path, generate: Callable[..., Any]) -> None:
    pairs = {}
    for name, (family, scheme, others) in MIXED.items():
        if tp == 2 and name == "blocks":
            continue  # 128-wide blocks cannot be cut in two in a model this small
        (tmp_path / name).mkdir()
        experts = EXPERTS["fp8-block"] if family in MOE else None
        pairs[name] = write(tmp_path / name, family, SCHEMES[scheme], experts, others)
    plain = generate([p.plain for p in pairs.values()], dtype="float32")
    said = generate([p.converted for p in pairs.values()], dtype="float32", tp=tp)
    for pair in pairs.values():
        assert_same(plain[str(pair.plain)], said[str(pair.converted)], TOLERANCE)


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
