"""compressed-tensors 0.13's decoding of what later releases refuse or read differently: act-order by
group (`weight_g_idx`), and 3-bit codes padded to whole words.

PackedQuantizationCompressor.decompress_weight, with scales in float32: float32(code) * float32(scale),
rounded once, columns in their own order. The integers are the same with all scales 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs
from digest import Entry, entry, library, modules, old_packing, quantization_config, run

NAME = library("compressed-tensors")


def decode(folder: Path) -> Iterator[tuple[str, Entry]]:
    config = quantization_config(folder)
    if not old_packing(config):
        return
    (group,) = config["config_groups"].values()
    args = QuantizationArgs.model_validate(group["weights"])
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    for module, local in modules(folder, "weight_packed"):
        scale = local["weight_scale"]
        values, ints = (
            compressor.decompress_weight(local | {"weight_scale": scales}, args)
            for scales in (scale.float(), torch.ones_like(scale, dtype=torch.float32))
        )
        yield module, entry(NAME, values, ints, scale)


if __name__ == "__main__":
    with torch.no_grad():
        run(decode)
