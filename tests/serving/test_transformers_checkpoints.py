"""Real checkpoints that 0.1.0 refused for want of a kernel: converted, they compute in Transformers what their
dequantized twins compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from support.checkpoints import LAID_OUT, all_checkpoints  # noqa: E402
from support.twins import write_twin  # noqa: E402

import xpuquant  # noqa: E402

FIXTURES = {
    "autoawq-mixtral-w4g32-asym",
    "autoawq-qwen3moe-w4g32-asym",
    "gptqmodel-qwen3moe-w4g32-asym-as-awq",
    "gptqmodel-qwen3moe-w8g32-asym",
    "llmcompressor-qwen3moe-w4a16-asym",
    "llmcompressor-qwen3moe-fp8-dynamic",
    "llmcompressor-llama-w8a8",
    "llmcompressor-llama-nvfp4a16",
    "modelopt-llama4-nvfp4",
}
"""The same kinds among the fixtures."""

NAMES = sorted(name for name in all_checkpoints() if name in FIXTURES | LAID_OUT)
PROMPT = torch.tensor([[1, 17, 33, 25, 9, 4, 31, 8, 5, 5, 40, 12]])


@torch.no_grad()
def logits(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(PROMPT).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_checkpoint_computes_what_its_twin_does(name: str, tmp_path: Path) -> None:
    source = all_checkpoints()[name]
    xpuquant.convert(str(source), str(tmp_path / "out"))
    assert xpuquant.verify(str(tmp_path / "out"), source=str(source)).passed
    write_twin(source, tmp_path / "twin")
    wanted = logits(tmp_path / "twin")
    assert wanted.std() > 0.01
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)
