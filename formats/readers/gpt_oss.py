"""Reader for gpt-oss as published: MXFP4 experts, one 3-D tensor each per layer (`quant_method: mxfp4`).

    P.gate_up_proj_blocks  U8 [E, 2I, H/32, 16]   byte b of a block: columns 2b (low nibble) and 2b + 1
    P.gate_up_proj_scales  U8 [E, 2I, H/32]       exponents, 2^(byte - 127)
    P.gate_up_proj_bias    BF16 [E, 2I]
    P.down_proj_blocks, _scales, _bias            [E, H, I/32, 16], [E, H, I/32], [E, H]

P ends in `.experts`. Rows are [out, in] (the bf16 model has them the other way), and those of gate_up_proj alternate:
even gate, odd up (transformers/models/gpt_oss/modeling_gpt_oss.py, `_apply_gate`).
"""

from __future__ import annotations

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Checkpoint, rows
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.readers.base import STACKS, Parts, both_quantized, need
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.floats import E8M0, MX_GROUP, FloatWeight, view


class GptOss:
    name = "mxfp4"
    methods = frozenset({"mxfp4", "gpt-oss-mxfp4"})
    suffixes = frozenset(f"{part}_{end}" for part in STACKS for end in ("blocks", "scales", "bias"))

    def claims(self, parts: Parts) -> bool:
        return any(f"{part}_blocks" in parts for part in STACKS)

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        both_quantized(parts)
        weights: list[Weight] = []
        for part in STACKS:
            blocks = need(parts, f"{part}_blocks", name, dtype="U8", dims=4)
            scales = need(parts, f"{part}_scales", name, dims=3)
            bias = parts.get(f"{part}_bias")
            E, N, G, octets = blocks.shape
            if octets * 2 != MX_GROUP or scales.dtype not in ("U8", E8M0) or scales.shape != (E, N, G):
                raise DamagedError(
                    f"{scales.name} is {scales.dtype} {list(scales.shape)}, {blocks.name} {list(blocks.shape)}; "
                    "want U8 [E, N, G] and [E, N, G, 16]"
                )
            if bias is not None and (bias.shape != (E, N) or bias.dtype not in FLOATS):
                raise DamagedError(f"{bias.name} is {bias.dtype} {list(bias.shape)}, want floats {[E, N]}")
            weights += [
                FloatWeight(
                    name=f"{name}.{expert}.{part}",
                    format=self.name,
                    N=N,
                    K=G * MX_GROUP,
                    tensors=(blocks, scales),
                    facts=("MXFP4 blocks of gpt-oss",),
                    bias=None if bias is None else rows(bias, expert, expert + 1),
                    element="e2m1",
                    granularity="group",
                    block=(1, MX_GROUP),
                    codes=view(blocks, "U8", (N, G * octets), expert),
                    scale=view(scales, E8M0, (N, G), expert),
                )
                for expert in range(E)
            ]
        gate_up, down = weights[0], weights[-1]
        if gate_up.N != 2 * down.K or gate_up.K != down.N:
            raise DamagedError(
                f"{name}: gate_up_proj {[gate_up.N, gate_up.K]} and down_proj {[down.N, down.K]} do not belong together"
            )
        return weights
