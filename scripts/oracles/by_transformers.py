"""Transformers' decoding of gpt-oss MXFP4 experts and of block fp8.

MXFP4: convert_moe_packed_tensors in float32, transposed back to [E, N, K]; rows stay interleaved.
Fp8: _dequantize_fp8_weight of its fine-grained fp8, scales and product in float32; it takes
compressed-tensors' `weight_scale` as well as `weight_scale_inv`: both are multipliers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from digest import Entry, entry, library, modules, quantization_config, run
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

NAME = library("transformers")
BLOCK = [128, 128]  # every block fp8 checkpoint here


def decode(folder: Path) -> Iterator[tuple[str, Entry]]:
    for module, local in modules(folder, "gate_up_proj_blocks"):
        for name in ("gate_up_proj", "down_proj"):
            scales = local[f"{name}_scales"]
            weight = convert_moe_packed_tensors(local[f"{name}_blocks"], scales, dtype=torch.float32)
            yield f"{module}.{name}", entry(NAME, weight.transpose(1, 2), None, scales)
    text = str(quantization_config(folder))
    if "'strategy': 'block'" in text or "weight_block_size" in text:
        for module, local in modules(folder, "weight_scale_inv", "weight_scale"):
            scale = local.get("weight_scale_inv", local.get("weight_scale"))
            values = _dequantize_fp8_weight(local["weight"], scale, BLOCK, torch.float32)
            yield module, entry(NAME, values, None, scale)


if __name__ == "__main__":
    with torch.no_grad():
        run(decode)
