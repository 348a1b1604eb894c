"""Fixtures of llm-compressor, and of old generations of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _fixture_sources import SEED, VOCAB, frequency


def _int(bits: int, *, symmetric: bool = True, group: int | None = 32, **more: Any) -> dict[str, Any]:
    """A config group for weight-only integers; `group` None is one group per row."""
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy, **more}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def _preset(scheme: str) -> dict[str, Any]:
    return {"targets": "Linear", "scheme": scheme}


def _w4a8() -> dict[str, Any]:
    recipe = _int(4)
    recipe["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return recipe


def _fp8_tensor() -> dict[str, Any]:
    """One weight scale per module, activations scaled at run time: no data needed."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = common | {"strategy": "tensor"}
    activations = common | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"config_groups": {"group_0": group}}


LLMCOMPRESSOR: dict[str, tuple[str, dict[str, Any]]] = {
    "llmcompressor-llama-w4a16": ("llama", _int(4)),
    "llmcompressor-qwen3-w4a16-asym": ("qwen3-positive", _int(4, symmetric=False)),
    "llmcompressor-llama-w4a16-channel": ("llama", _int(4, group=None)),
    "llmcompressor-qwen3-w4a16-asym-channel": ("qwen3-positive", _int(4, symmetric=False, group=None)),
    "llmcompressor-llama-w3a16": ("llama", _int(3)),
    "llmcompressor-qwen3-w2a16-asym": ("qwen3-positive", _int(2, symmetric=False)),
    "llmcompressor-llama-w4a8": ("llama", _w4a8()),
    "llmcompressor-llama-fp8-dynamic": ("llama", _preset("FP8_DYNAMIC")),
    "llmcompressor-llama-fp8-static": ("llama", _preset("FP8")),
    "llmcompressor-llama-fp8-block": ("llama-256", _preset("FP8_BLOCK")),
    "llmcompressor-llama-fp8-block-ragged": ("llama", _preset("FP8_BLOCK")),
    "llmcompressor-llama-mxfp4": ("llama", _preset("MXFP4")),
    "llmcompressor-llama-mxfp8": ("llama", _preset("MXFP8")),
    "llmcompressor-llama-nvfp4a16": ("llama", _preset("NVFP4A16")),
    "llmcompressor-llama-w8a8": ("llama", _preset("W8A8")),
    "llmcompressor-gptoss-w4a16": ("gptoss", _int(4)),
    "llmcompressor-qwen3moe-w4a16": ("qwen3moe", _int(4)),
    "llmcompressor-qwen3moe-w4a16-asym": ("qwen3moe", _int(4, symmetric=False)),
    "llmcompressor-qwen3moe-fp8-tensor": ("qwen3moe128", _fp8_tensor()),
    "llmcompressor-qwen3moe-fp8-block": ("qwen3moe128", _preset("FP8_BLOCK")),
    "llmcompressor-qwen3moe-mxfp4": ("qwen3moe", _preset("MXFP4")),
}


# Old releases wrote other layouts; see the README of the fixtures.
LLMCOMPRESSOR_012: dict[str, tuple[str, dict[str, Any]]] = {
    "llmcompressor-0.12-llama-w3a16": ("llama-64", _int(3)),
    "llmcompressor-0.12-gptoss-w4a16": ("gptoss", _int(4)),
}
LLMCOMPRESSOR_09: dict[str, tuple[str, dict[str, Any]]] = {
    "llmcompressor-0.9-llama-w3a16": ("llama-64", _int(3)),
    "llmcompressor-0.9-llama-w4a16-actorder": ("llama-64", _int(4, actorder="group")),
    "llmcompressor-0.9-llama-mxfp4": ("llama", _preset("MXFP4")),
}


def llmcompressor(source: Path, out: Path, name: str) -> None:
    """One llm-compressor fixture; only static fp8 and act-order need (random) data."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if "moe" in name or "gptoss" in name:
        from llmcompressor.modeling.moe.linearize import linearize_moe

        linearize_moe(model)
    data: dict[str, Any] = {}
    actorder = name.endswith("actorder")
    if actorder or name.endswith("static"):
        from datasets import Dataset

        torch.manual_seed(SEED)
        if actorder:
            ids = torch.multinomial(frequency().expand(32, VOCAB), 64, replacement=True)
        else:
            ids = torch.randint(4, VOCAB, (16, 32))
        rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        data = {"dataset": Dataset.from_dict(rows), "tokenizer": tokenizer}
        data["num_calibration_samples"] = len(ids)
    ignore = ["lm_head", "re:.*mlp.gate$", "re:.*mlp.router$"]
    recipe = (LLMCOMPRESSOR | LLMCOMPRESSOR_012 | LLMCOMPRESSOR_09)[name][1]
    modifier = GPTQModifier if actorder else QuantizationModifier
    oneshot(model=model, recipe=modifier(ignore=ignore, **recipe), **data)
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
