"""Tiny models in source formats, and their dequantized twins: what a portable repo is loaded against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.models import PACK, tiny
from xpuquant.formats.scheme import Scheme

GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "checkpoint_format": "gptq_v2",
}
FP8_WEIGHTS = {"quant_method": "fp8", "activation_scheme": "dynamic", "act_bits": 16}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
FP8_DYNAMIC = {
    "quant_method": "compressed-tensors",
    "version": "0.19.0",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FP8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_FP8, "strategy": "token", "dynamic": True},
            "format": "float-quantized",
        }
    },
}
"""As llm-compressor's FP8_DYNAMIC; stock loaders read it too."""
SOURCES = {
    "int4": (Scheme("int4_linear", group_size=32), {**GPTQ, "sym": True}),
    "int4-asym": (Scheme("int4_linear", group_size=32, symmetric=False), {**GPTQ, "sym": False}),
    "fp8-dynamic": (Scheme("fp8_linear", granularity="channel", scale_dtype="F32"), FP8_DYNAMIC),
    "fp8-weights": (Scheme("fp8_linear", granularity="channel", scale_dtype="F32"), FP8_WEIGHTS),
}
"""Scheme of every linear → how a producer would say it."""


@dataclass(frozen=True)
class Twins:
    """`plain` is `source` dequantized, its quantized matrices in float32: exact."""

    source: Path
    plain: Path


def write_source(folder: Path, family: str, kind: str) -> Twins:
    """A tiny model whose linears, experts included, are quantized as GPTQ or FP8 files are; the rest is bf16."""
    scheme, quantization = SOURCES[kind]
    twins = Twins(folder / "source", folder / "plain")
    tiny(family).save_pretrained(twins.plain)
    plain = load_file(twins.plain / "model.safetensors")
    source: dict[str, torch.Tensor] = {}
    for name, tensor in list(plain.items()):
        module = name.removesuffix(".weight")
        if not name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            source[name] = tensor
            continue
        packed, values = PACK[scheme.layout](tensor.float(), scheme)
        plain[name] = values
        if scheme.layout == "int4_linear":
            N, K = tensor.shape
            packed["qweight"] = packed["qweight"].t().contiguous()
            packed.setdefault("qzeros", torch.full((K // 32, N // 8), 0x88888888 - (1 << 32), dtype=torch.int32))
            packed["g_idx"] = torch.arange(K, dtype=torch.int32) // 32
        else:
            packed["weight_scale"] = packed["weight_scale"][:, None]
        source |= {f"{module}.{suffix}": part.contiguous() for suffix, part in packed.items()}
    save_file(plain, twins.plain / "model.safetensors", {"format": "pt"})
    twins.source.mkdir()
    save_file(source, twins.source / "model.safetensors", {"format": "pt"})
    for path in twins.plain.glob("*.json"):
        (twins.source / path.name).write_bytes(path.read_bytes())
    config = json.loads((twins.plain / "config.json").read_text())
    (twins.source / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return twins
