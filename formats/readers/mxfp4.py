"""Reader for MXFP4 (OCP Microscaling Formats v1.0) linears and per-expert matrices.

    P.weight_packed  U8 [N, K/2]      low nibble = even column; sign << 3 | index into 0, .5, 1, 1.5, 2, 3, 4, 6
    P.weight_scale   U8 [N, K/32]     one exponent per 32 columns: 2^(byte - 127), 255 is NaN

compressed-tensors (`mxfp4-pack-quantized`) and AutoRound write these; Quark calls the first `weight`; DeepSeek-V4
stores `weight` as I8 or F4 with `scale` F8_E8M0, inside an fp8 config. gpt-oss has its own, formats/readers/gpt_oss.py.

Files of other meaning with the same names are told apart by shape, and where shapes are equal (AutoRound's MXINT4) by
the config.
"""

from __future__ import annotations

import re

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import COMPRESSED_TENSORS, Checkpoint
from xpuquant.formats.readers.autoround import module_overrides
from xpuquant.formats.readers.base import Parts
from xpuquant.formats.readers.fp8 import SCALES, scale_of
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.floats import E8M0, MX_GROUP, FloatWeight, view

_SHIFTED = "0.13."
_SHIFT = 2
_SHIFT_MENDED = 20260109
"""compressed-tensors 0.13.0 wrote exponents with bias 125; mended in the nightly builds of 2026-01-09 (its pull
request 538) and in 0.14.0."""


class Mxfp4:
    name = "mxfp4"
    methods = frozenset({"quark", "fp8", "mxfp4"})
    suffixes = frozenset({"weight_packed", *SCALES})

    def claims(self, parts: Parts) -> bool:
        packed = codes_of(parts)
        scale = next((parts[suffix] for suffix in SCALES if suffix in parts), None)
        global_scale = "weight_global_scale" in parts or "weight_scale_2" in parts
        return packed is not None and scale is not None and scale.dtype in ("U8", E8M0) and not global_scale

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        stored, scale = codes_of(parts), scale_of(parts, name)
        assert stored is not None, "read follows claims"
        if len(stored.shape) != 2:
            raise DamagedError(f"{stored.name} has shape {list(stored.shape)}, want 2 dimensions")
        _check_integers(checkpoint, name)
        columns = stored.shape[-1] if stored.dtype == "F4" else 2 * stored.shape[-1]
        check_group(stored, scale, columns)
        N = stored.shape[0]
        shift, fact = exponent_shift(checkpoint)
        return [
            FloatWeight(
                name=name,
                format=self.name,
                N=N,
                K=columns,
                tensors=(stored, scale),
                facts=("MXFP4, from the dtypes and shapes", *fact),
                element="e2m1",
                granularity="group",
                block=(1, MX_GROUP),
                codes=view(stored, "U8", (N, columns // 2)),
                scale=view(scale, E8M0, scale.shape),
                exponent_shift=shift,
            )
        ]


def codes_of(parts: Parts) -> Tensor | None:
    """The packed codes, under either name."""
    if "weight_packed" in parts:
        return parts["weight_packed"] if parts["weight_packed"].dtype == "U8" else None
    weight = parts.get("weight")
    return weight if weight is not None and weight.dtype in ("U8", "I8", "F4") else None


def check_group(stored: Tensor, scale: Tensor, columns: int) -> None:
    """Raises where the exponents do not cover 32 columns each: UnsupportedError for a known other format."""
    if len(stored.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != stored.shape[0]:
        raise DamagedError(f"{scale.name} has shape {list(scale.shape)}, {stored.name} {list(stored.shape)}")
    groups = scale.shape[1]
    if groups == -(-columns // MX_GROUP):
        return
    octets = columns // 2
    if octets == 24 * groups:
        raise UnsupportedError("MXFP6 has no XPU kernel")
    if octets == 8 * groups:
        raise UnsupportedError("NVFP4 with E5M3 scales has no XPU kernel")
    if octets == 32 * groups:
        raise UnsupportedError("an MX format of one byte per element other than FP8 has no XPU kernel")
    raise DamagedError(
        f"{scale.name} has {groups} exponents per row; {columns} columns of MXFP4 need {-(-columns // MX_GROUP)}"
    )


def exponent_shift(checkpoint: Checkpoint) -> tuple[int, tuple[str, ...]]:
    """(what to add to stored exponents, the fact). The bytes themselves cannot reveal it: only the version can."""
    config = checkpoint.quantization
    version = str(config.get("version") or "")
    if checkpoint.method not in COMPRESSED_TENSORS or not version.startswith(_SHIFTED):
        return 0, ()
    if str(config.get("provider") or "").startswith("auto-round"):
        return 0, ()  # AutoRound packs by its own code, which never had the error.
    nightly = re.search(r"20\d{6}", version)
    if nightly and int(nightly[0]) >= _SHIFT_MENDED:
        return 0, ()
    return _SHIFT, (f"exponents + {_SHIFT}: compressed-tensors {version} wrote MXFP4 scales 4 times too small",)


def _check_integers(checkpoint: Checkpoint, name: str) -> None:
    """Raises UnsupportedError for AutoRound's MXINT4, whose tensors look just like MXFP4's."""
    config = checkpoint.quantization
    kind = module_overrides(config, name).get("data_type") or config.get("data_type") or ""
    if str(kind).startswith("mx_int"):
        raise UnsupportedError("MXINT4 has no XPU kernel")
