"""compressed-tensors files that hold no quantized storage a kernel could read, refused by name.

fake-quantized    P.weight float, P.weight_scale        rounded weights kept as floats (status "frozen"); under others'
                                                      configs a weight that was made float again, by someone
sparse-bitmask, sparse-24-bitmask    P.compressed, P.bitmask, P.shape, ...   the nonzero numbers alone
marlin-24         P.weight_packed, P.scale_packed, P.meta    2:4, in the order of Marlin's tiles

Whether a module is one of these its tensors show. The config's `sparsity_config` says that some modules may be: those
on its `ignore` list, those that were not sparse enough, and all of a `dense` one are stored as they would be without it
(compressed_tensors/compressors/sparse_compressors/base.py, `should_compress`; vllm-project/vllm#51188).
"""

from __future__ import annotations

from xpuquant.errors import UnsupportedError
from xpuquant.formats.checkpoint import COMPRESSED_TENSORS, Checkpoint
from xpuquant.formats.dtypes import FLOATS
from xpuquant.formats.readers.base import Parts
from xpuquant.formats.weights.base import Weight

_SCALES = ("weight_scale", "weight_scale_inv")


class Refused:
    name = "compressed-tensors"
    methods = COMPRESSED_TENSORS
    suffixes = frozenset({*_SCALES, "compressed", "bitmask", "scale_packed"})

    def claims(self, parts: Parts) -> bool:
        sparse = ("compressed" in parts and "bitmask" in parts) or "scale_packed" in parts
        fake = not parts.keys().isdisjoint(_SCALES) and "weight" in parts and parts["weight"].dtype in FLOATS
        return sparse or (fake and "weight_packed" not in parts)

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        if "bitmask" in parts:
            raise UnsupportedError("sparse (bitmask) weights have no XPU kernel")
        if "scale_packed" in parts:
            raise UnsupportedError("2:4 sparse weights in the order of Marlin's tiles (marlin-24) have no XPU kernel")
        if checkpoint.method not in COMPRESSED_TENSORS:
            scale = next(suffix for suffix in _SCALES if suffix in parts)
            raise UnsupportedError(
                f"weight {parts['weight'].dtype} beside {scale} {parts[scale].dtype}: nothing tells whether it has "
                "been multiplied by it already"
            )
        status = checkpoint.quantization.get("quantization_status") or "unknown"
        raise UnsupportedError(
            f"fake-quantized: the weight is stored as {parts['weight'].dtype} beside its scale (quantization_status "
            f"'{status}'); save the model compressed first"
        )
