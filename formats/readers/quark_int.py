"""AMD Quark's integers in words, refused by name. Its int8 is one to a byte: `compressed_tensors/unpacked.py` reads it.

    P.weight             I32 [K, N/8] or [N, K/8]   eight codes to a word
    P.weight_scale, P.weight_zero_point

Quark's own releases disagree (quark/torch/utils/pack.py, `Pack_4_bits`): which axis is packed depends on the algorithm
in one and on the scheme in the next, scales are `[N, G]` in old files and `[G, N]` in new ones, the order within a
word is `pack_method`'s, and int4 and uint4 look alike. Its uint4 export in AWQ's names (`custom_mode="awq"`) is read.
"""

from __future__ import annotations

from xpuquant.errors import UnsupportedError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers.base import Parts
from xpuquant.formats.weights.base import Weight


class QuarkInt:
    name = "quark int4"
    methods = frozenset({"quark"})
    suffixes = frozenset({"weight_scale", "weight_zero_point"})

    def claims(self, parts: Parts) -> bool:
        return "weight" in parts and parts["weight"].dtype == "I32" and "weight_scale" in parts

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        shape = f"weight I32 {list(parts['weight'].shape)} beside weight_scale {list(parts['weight_scale'].shape)}"
        raise UnsupportedError(
            f"{shape}: AMD Quark's int4 words, whose axis and order differ between its releases; quantize "
            "to uint4 and export with custom_mode='awq'"
        )
