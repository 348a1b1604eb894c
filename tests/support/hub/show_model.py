"""A made-up GPTQ model of about 10 MB in as many shards as it has layers: random weights, sound files."""

import json
from pathlib import Path

import numpy as np

from xpuquant.formats.safetensors import build_header

LAYERS, H, I, VOCAB, GROUP = 8, 512, 1024, 256, 128
DTYPES = {"int32": "I32", "float16": "F16"}


def write_model(folder: Path) -> Path:
    """Config, index and shards."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    linears = [(f"self_attn.{name}_proj", H, H) for name in "qkvo"]
    linears += [("mlp.gate_proj", I, H), ("mlp.up_proj", I, H), ("mlp.down_proj", H, I)]
    weight_map = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}_layernorm.weight": np.ones(H, np.float16) for name in ("input", "post_attention")}
        for name, N, K in linears:
            tensors |= _linear(rng, f"{prefix}.{name}", N, K)
        if layer == 0:
            tensors["model.embed_tokens.weight"] = rng.standard_normal((VOCAB, H)).astype(np.float16)
            tensors["lm_head.weight"] = rng.standard_normal((VOCAB, H)).astype(np.float16)
            tensors["model.norm.weight"] = np.ones(H, np.float16)
        shard = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
        ordered = sorted(tensors.items())
        header = build_header(((n, DTYPES[str(t.dtype)], t.shape, t.nbytes) for n, t in ordered), {"format": "pt"})
        (folder / shard).write_bytes(header + b"".join(tensor.tobytes() for _, tensor in ordered))
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": I,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "torch_dtype": "float16",
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- gptq\n---\n# A model\n")
    return folder


def _linear(rng: np.random.Generator, name: str, N: int, K: int) -> dict[str, np.ndarray]:
    """GPTQ v1: `qweight` `[K/8, N]`, `qzeros` with 7 for a zero point of 8, `scales` `[K/g, N]`, `g_idx` `[K]`."""
    return {
        f"{name}.qweight": rng.integers(-(2**31), 2**31, (K // 8, N), np.int64).astype(np.int32),
        f"{name}.qzeros": np.full((K // GROUP, N // 8), 0x77777777, np.int32),
        f"{name}.scales": (rng.random((K // GROUP, N)) / 100 + 0.001).astype(np.float16),
        f"{name}.g_idx": (np.arange(K) // GROUP).astype(np.int32),
    }
