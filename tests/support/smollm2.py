"""SmolLM2-135M as real producers quantize it, and its dequantized twin, decoded by the plain definition of each format.

`scripts/fixtures/make-smollm2` makes the models, in $XPUQUANT_SMOLLM2 or .cache/smollm2; what exists is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.models import E2M1
from support.packers import unpack_tensor

REPO = Path(__file__).parents[2]
QUANTIZED = {
    "gptqmodel-w4g64": "int4_linear g64",
    "gptqmodel-w4g64-actorder": "int4_linear g64 act-order",
    "llmcompressor-w4a16-asym": "int4_linear g64 asymmetric",
    "llmcompressor-fp8-dynamic": "fp8_linear channel",
    "llmcompressor-fp8-block": "fp8_linear 64x128",
    "llmcompressor-mxfp4": "mxfp4_linear g32",
    "llmcompressor-mxfp8": "mxfp8_linear g32",
}
"""What `scripts/fixtures/make-smollm2` calls it → the scheme that its linears get."""
Tensors = dict[str, torch.Tensor]


def source(name: str) -> Path:
    """The folder of a quantized model, made where it is absent: minutes, and its producer's environment."""
    folder = Path(os.environ.get("XPUQUANT_SMOLLM2") or REPO / ".cache" / "smollm2")
    subprocess.run([str(REPO / "scripts" / "fixtures" / "make-smollm2"), str(folder), name], check=True)
    return folder / name


def gptq(t: Tensors) -> torch.Tensor:
    """qweight `[K/8, N]`, qzeros `[G, N/8]` of zero points minus one (v1), scales `[G, N]`, g_idx `[K]`."""
    codes = unpack_tensor(t["qweight"].t())
    zeros = (unpack_tensor(t["qzeros"]) + 1)[t["g_idx"].long()].t()
    return (codes - zeros) * t["scales"].float()[t["g_idx"].long()].t()


def packed(t: Tensors) -> torch.Tensor:
    """weight_packed `[N, K/8]`, weight_scale `[N, G]`, weight_zero_point `[N/8, G]`; codes and zero points plus 8."""
    codes = unpack_tensor(t["weight_packed"])
    zeros = torch.tensor(8)
    if "weight_zero_point" in t:
        zeros = unpack_tensor(t["weight_zero_point"].t()).t()
        zeros = zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], 1)
    return (codes - zeros) * spread(t["weight_scale"], codes)


def spread(scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`[N / rows, K / columns]` → `[N, K]`; the last block of rows may be ragged. uint8: exponents, plus 127."""
    if scale.dtype is torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    rows = 128 if 1 < scale.shape[0] < codes.shape[0] else codes.shape[0] // scale.shape[0]
    columns = 128 if rows == 128 else codes.shape[1] // scale.shape[1]
    wide = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: codes.shape[0], : codes.shape[1]]


def mxfp4(t: Tensors) -> torch.Tensor:
    codes = unpack_tensor(t["weight_packed"])
    return torch.cat([E2M1, -E2M1])[codes] * spread(t["weight_scale"], codes)


def fp8(t: Tensors) -> torch.Tensor:
    return t["weight"].float() * spread(t["weight_scale"], t["weight"])


DECODE: dict[str, Callable[[Tensors], torch.Tensor]] = {
    "gptqmodel": gptq,
    "llmcompressor-w4a16": packed,
    "llmcompressor-fp8": fp8,
    "llmcompressor-mxfp4": mxfp4,
    "llmcompressor-mxfp8": fp8,
}


def dequantized(source: Path, out: Path) -> Path:
    """The source with plain float32 linears of its values.

    FP8 blocks that no XPU kernel takes (K no multiple of 128) are rounded to bf16, as `--on-unsupported dequantize`
    says it does.
    """
    decode = next(decode for prefix, decode in DECODE.items() if source.name.startswith(prefix))
    tensors, modules = load_file(source / "model.safetensors"), dict[str, Tensors]()
    for name in list(tensors):
        if "_proj." in name:
            module, _, suffix = name.rpartition(".")
            modules.setdefault(module, {})[suffix] = tensors.pop(name)
    assert len(modules) == 30 * 7
    for module, parts in modules.items():
        weight = decode(parts)
        if source.name.endswith("fp8-block") and weight.shape[1] % 128:
            weight = weight.bfloat16().float()
        tensors[f"{module}.weight"] = weight.contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for path in source.glob("*.json"):
        if not path.name.endswith("index.json"):
            shutil.copy(path, out)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out
