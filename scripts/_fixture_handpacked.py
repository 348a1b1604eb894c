"""gpt-oss as its authors publish it, packed here."""

from __future__ import annotations

import shutil
from pathlib import Path

HANDPACKED = {"handpacked-gptoss-mxfp4": "gptoss"}


def handpacked(source: Path, out: Path, name: str) -> None:
    """gpt-oss as its authors publish it: MXFP4 experts, the rest bf16.

    Transformers can write these files only with a GPU kernel and only at the published sizes, so
    the experts are rounded and packed here (OCP Microscaling Formats 1.0, 5.3 and 6.3) and read back
    through Transformers' own dequantization, which must give exactly what was rounded to.
    """
    import json

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, Mxfp4Config

    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    tensors = load_file(source / "model.safetensors")
    exact: dict[str, torch.Tensor] = {}
    packed: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[key] = tensor
            continue
        weight = tensor.float().transpose(1, 2)  # [E, K, N] in bf16 files, [E, N, K] in MXFP4 ones
        blocks = weight.reshape(*weight.shape[:2], -1, 32)
        exponent = torch.frexp(blocks.abs().amax(-1))[1] - 1 - 2  # floor(log2(max)) - emax of E2M1
        scaled = torch.ldexp(blocks, -exponent[..., None])
        index = (scaled.abs()[..., None] - levels).abs().argmin(-1)
        code = (index | (torch.signbit(scaled) << 3)).to(torch.uint8)
        packed[f"{key}_blocks"] = code[..., 0::2] | (code[..., 1::2] << 4)
        packed[f"{key}_scales"] = (exponent + 127).to(torch.uint8)
        value = torch.ldexp(levels[index] * torch.where(torch.signbit(scaled), -1, 1), exponent[..., None])
        exact[key] = value.reshape(weight.shape).transpose(1, 2)
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for item in source.iterdir():
        if item.name not in ("config.json", "model.safetensors"):
            shutil.copy(item, out)
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    loaded = model.state_dict()
    for key, value in exact.items():
        if not torch.equal(loaded[key].float(), value):
            raise SystemExit(f"{name}: Transformers reads {key} differently")
