"""The compressed-tensors library's decoding of its own formats, and of AutoRound's MX and NVFP4 files,
whose tensors are the same.

BaseCompressor.decompress per module, with the module's scheme from the library's reading of the
config. Integer and fp8 scales are handed over as float32, so the product is float32(code - zero) or
float32(fp8 code) times float32(scale), rounded once; the integers are the same with all scales 1.
MXFP4 and MXFP8 are decoded as they are: a code times a power of two is exact in the bfloat16 that the
library computes in. NVFP4 rounds twice: float32(fp8 scale) / float32(global scale), times the code.

Files of version 0.13 hold MXFP4 exponents that are 2 too small, modulo 256 (a row of zeros has 254);
that library cannot read them back. They are mended before decoding: the digests then equal those of a
present release's file of the same weights. What by_compressed_tensors_013.py reads is left to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.utils.match import match_name
from digest import Entry, Tensors, entry, library, modules, old_packing, quantization_config, run

NAME = library("compressed-tensors")
MENDED = "0.13 wrote exponents 2 too small and cannot read them: 2 is added, modulo 256, before decoding"
_AUTOROUND = {"mx_fp4": "MXFP4", "mx_fp8": "MXFP8", "nv_fp4": "NVFP4A16"}


def schemes(config: dict[str, Any]) -> list[QuantizationScheme]:
    if config.get("quant_method") == "compressed-tensors":
        parsed = QuantizationConfig.model_validate(config)
        for scheme in parsed.config_groups.values():
            scheme.format = scheme.format or parsed.format
        return list(parsed.config_groups.values())
    preset = _AUTOROUND.get(f"{config.get('data_type')}{config.get('bits')}")
    if preset is None or config.get("packing_format") != "auto_round:llm_compressor":
        return []
    scheme = preset_name_to_scheme(preset, ["Linear"])
    kind = "nvfp4-pack-quantized" if "NV" in preset else "mxfp8-quantized"
    scheme.format = "mxfp4-pack-quantized" if preset == "MXFP4" else kind
    return [scheme]


def decompress(local: Tensors, scheme: QuantizationScheme, scale: torch.Tensor) -> torch.Tensor:
    compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
    return compressor.decompress(local | {"weight_scale": scale}, scheme)["weight"]


def nvfp4(local: Tensors, scheme: QuantizationScheme) -> torch.Tensor:
    # The compressor's two steps, in float32 instead of the bfloat16 it would round to.
    N, half = local["weight_packed"].shape
    return dequantize(
        unpack_fp4_from_uint8(local["weight_packed"], N, 2 * half, dtype=torch.float32),
        scale=local["weight_scale"].float(),
        args=scheme.weights,
        global_scale=local["weight_global_scale"],
        dtype=torch.float32,
    )


def decode(folder: Path) -> Iterator[tuple[str, Entry]]:
    config = quantization_config(folder)
    groups = [] if old_packing(config) else schemes(config)
    for module, local in modules(folder, "weight_scale") if groups else ():
        scheme = next(group for group in groups if any(t == "Linear" or match_name(module, t) for t in group.targets))
        scale = local["weight_scale"]
        if "weight_global_scale" in local:
            yield module, entry(NAME, nvfp4(local, scheme), None, scale)
        elif scale.dtype == torch.uint8:
            bias = 2 if config.get("version", "").startswith("0.13.") else 0
            result = entry(NAME, decompress(local, scheme, scale + bias), None, scale)
            yield module, result | ({"note": MENDED} if bias else {})
        else:
            values = decompress(local, scheme, scale.float())
            ints = None
            if scheme.weights.type == "int":
                ints = decompress(local, scheme, torch.ones_like(scale, dtype=torch.float32))
            yield module, entry(NAME, values, ints, scale)


if __name__ == "__main__":
    with torch.no_grad():
        run(decode)
