"""The unquantized models that fixtures are made of: tiny, random, seeded, one per architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 64
SEED = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    # A third of every weight's rows positive: the asymmetric zero point of such a row is 0.
    "qwen3-positive": ("Qwen3Config", {"tie_word_embeddings": True}),
    # The same, smaller, for old generations.
    "qwen3-positive-64": ("Qwen3Config", {"tie_word_embeddings": True, "intermediate_size": 64}),
    # K = 96 in down_proj: a last group of 32 where g is 64.
    "qwen3-ragged": ("Qwen3Config", {"tie_word_embeddings": True, "intermediate_size": 96}),
    "qwen3-untied": ("Qwen3Config", {"tie_word_embeddings": False}),
    "qwen3moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "qwen3moe128": (
        "Qwen3MoeConfig",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 128},
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": None},
    ),
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    # Two whole blocks of 128 in both directions of the MLP.
    "llama-256": ("LlamaConfig", {"tie_word_embeddings": True, "intermediate_size": 256}),
    "llama-64": ("LlamaConfig", {"tie_word_embeddings": True, "intermediate_size": 64}),
    "llama-bias": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "gptoss": (
        "GptOssConfig",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 64, "sliding_window": 32},
    ),
}


def sources(folder: Path) -> None:
    """Write every source model, bf16, with a tiny word-level tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    for name, (kind, options) in _SOURCES.items():
        torch.manual_seed(SEED)
        config = getattr(transformers, kind)(**(_COMMON | options))
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(0, 0.02)
                elif key.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.startswith("qwen3-positive") and key.endswith("proj.weight"):
                    parameter[::3] = parameter[::3].abs() + 0.001
                elif name in ("llama", "llama-64") and key.endswith("down_proj.weight"):
                    parameter[5] = 0  # a row of zeros: the smallest scale there is
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def frequency() -> Any:
    """Words of unequal frequency, so that activations differ and act-order has an order."""
    import torch

    return torch.linspace(0, 4, VOCAB).exp()
