"""Real checkpoints that 0.1.0 refused for want of a kernel: converted, they compute in Transformers what their
dequantized twins compute.

The twin is the unquantized model under the values that the source means, decoded by its reader, not from the output.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", minversion="5.0")

from support.checkpoints import LAID_OUT, all_checkpoints  # noqa: E402

import xpuquant  # noqa: E402
from xpuquant.conversion.options import Options  # noqa: E402
from xpuquant.conversion.plan.plan import make_plan  # noqa: E402
from xpuquant.conversion.sources.base import read_slice  # noqa: E402
from xpuquant.conversion.sources.open import open_source  # noqa: E402

FIXTURES = {
    "gptqmodel-qwen3moe-w4g32-asym-as-awq",
    "llmcompressor-qwen3moe-w4a16-asym",
    "llmcompressor-qwen3moe-fp8-dynamic",
    "llmcompressor-llama-w8a8",
    "llmcompressor-llama-nvfp4a16",
}
"""The same kinds among the fixtures."""

NAMES = sorted(name for name in all_checkpoints() if name in FIXTURES | LAID_OUT)
PROMPT = torch.tensor([[1, 17, 33, 25, 9, 4, 31, 8, 5, 5, 40, 12]])


def write_twin(source: Path, folder: Path) -> None:
    """The unquantized model, float32."""
    opened = open_source(str(source))
    plan = make_plan(opened.checkpoint, Options())
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for shard in source.glob("*.safetensors"):
        passed = {tensor.name for tensor in plan.passed}
        tensors |= {name: tensor.float() for name, tensor in load_file(shard).items() if name in passed}
    for planned in plan.modules:
        for _, _, weight in planned.weights:
            recipe = weight.decoded(0, weight.N)
            arrays = [read_slice(opened, part) for part in recipe.inputs]
            values = torch.from_numpy(recipe.build(arrays).values()).float()
            tensors[f"{weight.name}.weight"] = values.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


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
