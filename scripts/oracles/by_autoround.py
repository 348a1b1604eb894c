"""AutoRound's decoding of its GPTQ, AWQ and MX modules.

GPTQ: its QuantLinear (qlinear_torch_zp for zeros stored minus one, qlinear_torch for true zeros) has
no dequantization of its own, so it multiplies the float32 identity: each output is one product and
zeros, hence exact. AWQ: dequantize_gemm. MX: MXFP4QuantLinear and MXFP8QuantLinear. Scales go in as
float32; the integers are the same with all scales 1.

Its v1 reader adds 1 to each zero-point field after unpacking, which is wrong for a true zero point of
0, and it believes the label of files that AutoRound itself mislabels: such modules disagree with
GPTQModel, and merge.py records that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from auto_round.experimental.qmodules.mx import MXFP4QuantLinear, MXFP8QuantLinear
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from digest import (
    Entry,
    Tensors,
    columns,
    entry,
    gptq_geometry,
    library,
    modules,
    packing,
    quantization_config,
    run,
)

NAME = library("auto-round")


def permuted(local: Tensors) -> bool:
    """Whether g_idx says anything."""
    K, groups = gptq_geometry(local)[1], local["scales"].shape[0]
    return "g_idx" in local and not torch.equal(local["g_idx"], torch.arange(K).int() // (K // groups))


def readable(local: Tensors, kind: str) -> bool:
    """Its reader has no planar packing and no short last group, and cuts N to K where there is a g_idx."""
    _, K, N = gptq_geometry(local)
    return kind != "gptq_p" and K % local["scales"].shape[0] == 0 and (N <= K or not permuted(local))


def gptq(local: Tensors, kind: str, scales: torch.Tensor) -> torch.Tensor:
    bits, K, N = gptq_geometry(local)
    family = qlinear_torch_zp if kind == "gptq_v1" else qlinear_torch
    module = family.QuantLinear(bits, K // scales.shape[0], K, N, bias=False, g_idx=permuted(local))
    module.qweight, module.qzeros, module.scales = local["qweight"], local["qzeros"], scales
    if permuted(local):
        module.g_idx = local["g_idx"]
    return module(torch.eye(K)).T


def awq(local: Tensors, scales: torch.Tensor) -> torch.Tensor:
    group = local["qweight"].shape[0] // scales.shape[0]
    return dequantize_gemm(local["qweight"], local["qzeros"], scales, 4, group).T


def mx(local: Tensors) -> torch.Tensor:
    packed = local.get("weight_packed")
    kind, weight = (MXFP8QuantLinear, local["weight"]) if packed is None else (MXFP4QuantLinear, packed)
    N, K = local["weight_scale"].shape[0], local["weight_scale"].shape[1] * 32
    module = kind(K, N, config=None, weight=weight, weight_scale=local["weight_scale"])
    return module.dequant_weight_online()


def decode(folder: Path) -> Iterator[tuple[str, Entry]]:
    config = quantization_config(folder)
    kind = packing(config)
    for module, local in modules(folder, "qweight"):
        scales = local["scales"].float()
        ones = torch.ones_like(scales)
        if kind == "awq":
            yield module, entry(NAME, awq(local, scales), awq(local, ones), local["scales"])
        elif readable(local, kind):
            K = columns(folder, module, gptq_geometry(local)[1])
            values, ints = gptq(local, kind, scales)[:, :K], gptq(local, kind, ones)[:, :K]
            yield module, entry(NAME, values, ints, local["scales"])
    biased = config.get("version", "").startswith("0.13.")  # compressed-tensors' own exponents, 2 too small
    for module, local in modules(folder, "weight_scale"):
        if local["weight_scale"].dtype == torch.uint8 and not biased:
            yield module, entry(NAME, mx(local), None, local["weight_scale"])


if __name__ == "__main__":
    with torch.no_grad():
        run(decode)
