"""The real model: SmolLM2-135M in every scheme, by its real producers, converted.

vLLM says of the converted repo, token by token, what stock vLLM says of the dequantized source; Transformers agrees.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Pair
from support.smollm2 import QUANTIZED, dequantized, source

from xpuquant.formats.scheme import from_config

PROMPTS = ["The capital of France is", "Water boils at a temperature of", "Once upon a time"]
TOLERANCE = 2e-3
"""Of a log-probability in float32: two orders of summation."""


def convert(folder: Path, out: Path) -> Path:
    flags = ["--on-unsupported", "dequantize"] if folder.name.endswith("fp8-block") else []
    subprocess.run([sys.executable, "-m", "xpuquant", "convert", str(folder), str(out), *flags], check=True)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    """Name → the converted model and the dequantized source: 5 GB, which pytest would keep."""
    folder = tmp_path_factory.mktemp("smollm2")
    made = {}
    for name in QUANTIZED:
        (folder / name).mkdir()
        converted = convert(source(name), folder / name / "converted")
        made[name] = Pair(converted, dequantized(source(name), folder / name / "plain"))
    yield made
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def said(models: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    """In float32: in bf16 two matrix products of one weight differ by more than two close tokens do."""
    folders = [folder for pair in models.values() for folder in (pair.converted, pair.plain)]
    return generate(folders, dtype="float32", max_tokens=16, prompts=PROMPTS)


@pytest.mark.parametrize("name", QUANTIZED)
def test_says_what_the_dequantized_source_says(name: str, models: dict[str, Pair], said: Any) -> None:
    converted, plain = models[name].converted, models[name].plain
    schemes = from_config(json.loads((converted / "config.json").read_text())["quantization_config"])
    assert {scheme.label() for scheme in schemes.values()} == {QUANTIZED[name]}
    ours, wanted = said[str(converted)], said[str(plain)]
    assert "error" not in wanted, wanted["error"]
    assert "error" not in ours, ours["error"]
    assert ours["tokens"] == wanted["tokens"]
    for mine, theirs in zip(ours["logprobs"], wanted["logprobs"], strict=True):
        assert mine == pytest.approx(theirs, abs=TOLERANCE)
    transformers_agree(converted, ours)


@torch.no_grad()
def transformers_agree(converted: Path, said: dict[str, Any]) -> None:
    """Given the same text so far, Transformers gives vLLM's next token, with vLLM's log-probability."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    for prompt, tokens, logprobs in zip(PROMPTS, said["tokens"], said["logprobs"], strict=True):
        start = tokenizer(prompt)["input_ids"]
        scores = model(torch.tensor([start + tokens])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        assert scores.argmax(-1).tolist() == tokens
        chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert chosen.tolist() == pytest.approx(logprobs, abs=TOLERANCE)


def test_stock_vllm_says_the_same_of_the_gptq_source(
    models: dict[str, Pair], generate: Callable[..., Any], stock_int4: str | None
) -> None:
    """Its own int4 kernel, on the files as their producer wrote them; in bf16."""
    if stock_int4 is not None:
        pytest.skip(stock_int4)
    folder, converted = source("gptqmodel-w4g64"), models["gptqmodel-w4g64"].converted
    said = generate([folder, converted], dtype="bfloat16", max_tokens=24, prompts=PROMPTS)
    ours, stock = said[str(converted)], said[str(folder)]
    assert "Paris" in ours["text"][0]
    assert ours["tokens"] == stock["tokens"]
