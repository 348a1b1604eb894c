"""The real model: SmolLM2-135M in every scheme, by its real producers, converted.

vLLM says of the converted repo, token by token, what stock vLLM says of the dequantized source; Transformers agrees.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.smollm2 import QUANTIZED, dequantized, source

PROMPTS = ["The capital of France is", "Water boils at a temperature of", "Once upon a time"]
TOLERANCE = 2e-3
"""Of a log-probability in float32: two orders of summation."""


def convert(folder: Path, out: Path) -> Path:
    flags = ["--on-unsupported", "dequantize"] if folder.name.endswith("fp8-block") else []
    subprocess.run([sys.executable, "-m", "xpuquant", "convert", str(folder), str(out), *flags], check=True)
    return out


@pytest.mark.parametrize("name", QUANTIZED)
def test_says_what_the_dequantized_source_says(name: str, tmp_path: Path, generate: Callable[..., Any]) -> None:
    converted = convert(source(name), tmp_path / "converted")
    schemes = json.loads((converted / "config.json").read_text())["quantization_config"]["schemes"]
    from xpuquant.formats.scheme import from_config

    labels = {
        s.label() for s in from_config({"quant_method": "xpuquant", "format_version": 1, "schemes": schemes}).values()
    }
    assert labels == {QUANTIZED[name]}
    plain = dequantized(source(name), tmp_path / "plain")
    # In float32: in bf16 two matrix products of one weight differ by more than two close tokens do.
    said = generate([converted, plain], dtype="float32", max_tokens=16, prompts=PROMPTS)
    shutil.rmtree(plain)
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
    tmp_path: Path, generate: Callable[..., Any], stock_int4: str | None
) -> None:
    """Its own int4 kernel, on the files as their producer wrote them; in bf16."""
    if stock_int4 is not None:
        pytest.skip(stock_int4)
    folder = source("gptqmodel-w4g64")
    converted = convert(folder, tmp_path / "converted")
    said = generate([folder, converted], dtype="bfloat16", max_tokens=24, prompts=PROMPTS)
    ours, stock = said[str(converted)], said[str(folder)]
    assert "Paris" in ours["text"][0]
    assert ours["tokens"] == stock["tokens"]
