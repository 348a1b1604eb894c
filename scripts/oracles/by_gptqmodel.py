"""GPTQModel's decoding of GPTQ and AWQ modules.

GPTQ: TorchLinear.dequantize_weight, after convert_gptq_v1_to_v2_format_module for v1 zeros, which is
what GPTQModel does on loading (for 2, 4 and 8 bits it adds ones to whole words, so that a zero point
of 0, stored as a borrow, comes back). AWQ: dequantize_gemm. Both multiply int8 (codes minus zeros) by
the scales; the scales are handed over as float32, so the product is float32(code - zero) times
float32(scale), rounded once. The integers are the same with all scales 1.

Files that AutoRound mislabels are read by what they hold, not by their label.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.cpu_count = lambda: max(8, len(os.sched_getaffinity(0)))  # read on import: its pools want more than 2

import torch
from digest import (
    Entry,
    Tensors,
    columns,
    entry,
    gptq_geometry,
    group_size,
    library,
    mislabelled,
    modules,
    packing,
    quantization_config,
    run,
)
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

NAME = library("gptqmodel")


def gptq(local: Tensors, kind: str, g: int, scales: torch.Tensor) -> torch.Tensor:
    bits, K, N = gptq_geometry(local)
    module = TorchLinear(
        bits=bits,
        group_size=g,
        sym=False,
        desc_act="g_idx" in local,
        in_features=K,
        out_features=N,
        format=FORMAT.GPTQ_P if kind == "gptq_p" else FORMAT.GPTQ_V2,
    ).eval()
    module.qweight = local["qweight"].clone()
    module.qzeros = local["qzeros"].clone()  # the conversion works in place
    module.scales = scales
    if "g_idx" in local:
        module.g_idx = local["g_idx"]
    if kind == "gptq_v1":
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    return module.dequantize_weight().T


def awq(local: Tensors, scales: torch.Tensor) -> torch.Tensor:
    group = local["qweight"].shape[0] // scales.shape[0]
    return dequantize_gemm(local["qweight"], local["qzeros"], scales, 4, group).T


def decode(folder: Path) -> Iterator[tuple[str, Entry]]:
    config = quantization_config(folder)
    kind = "gptq_v1" if mislabelled(config) else packing(config)
    for module, local in modules(folder, "qweight"):
        scales = local["scales"].float()
        ones = torch.ones_like(scales)
        if kind == "awq":
            yield module, entry(NAME, awq(local, scales), awq(local, ones), local["scales"])
        else:
            K = gptq_geometry(local)[1]
            g = group_size(config, K, scales.shape[0])
            K = columns(folder, module, K)
            values, ints = gptq(local, kind, g, scales)[:, :K], gptq(local, kind, g, ones)[:, :K]
            yield module, entry(NAME, values, ints, local["scales"])


if __name__ == "__main__":
    with torch.no_grad():
        run(decode)
