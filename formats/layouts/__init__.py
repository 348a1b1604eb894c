"""What is written: the on-disk contract of each kind of module, listed by family.

A new layout is a file with a subclass of `base.Layout`, and a line below.
"""

from collections.abc import Callable, Mapping
from functools import cache

from xpuquant.formats.layouts.base import Layout

# Each family is imported when it is asked for: a conversion writes one of them.


def _xpu() -> tuple[Layout, ...]:
    from xpuquant.formats.layouts.xpu.ark_experts import Int8Experts, Uint4Experts
    from xpuquant.formats.layouts.xpu.fp8_channel_experts import Fp8ChannelExperts
    from xpuquant.formats.layouts.xpu.fp8_experts import Fp8Experts
    from xpuquant.formats.layouts.xpu.fp8_linear import Fp8Linear
    from xpuquant.formats.layouts.xpu.int4_experts import Int4Experts
    from xpuquant.formats.layouts.xpu.int4_linear import Int4Linear
    from xpuquant.formats.layouts.xpu.int8_linear import Int8Linear
    from xpuquant.formats.layouts.xpu.mx_experts import Mxfp4Experts, Mxfp8Experts
    from xpuquant.formats.layouts.xpu.mx_linear import MXFP4_LINEAR, MXFP8_LINEAR
    from xpuquant.formats.layouts.xpu.nvfp4_experts import Nvfp4Experts
    from xpuquant.formats.layouts.xpu.nvfp4_linear import Nvfp4Linear

    return (
        Int4Linear(),
        Int8Linear(),
        Int4Experts(),
        Uint4Experts(),
        Int8Experts(),
        Fp8Linear(),
        Fp8Experts(),
        Fp8ChannelExperts(),
        MXFP4_LINEAR,
        MXFP8_LINEAR,
        Mxfp4Experts(),
        Mxfp8Experts(),
        Nvfp4Linear(),
        Nvfp4Experts(),
    )


def _compressed_tensors() -> tuple[Layout, ...]:
    from xpuquant.formats.layouts.compressed_tensors.fp8 import CtFp8
    from xpuquant.formats.layouts.compressed_tensors.ints import CtInt4, CtInt8
    from xpuquant.formats.layouts.compressed_tensors.mx import CT_MXFP4, CT_MXFP8

    return CtInt4(), CtInt8(), CtFp8(), CT_MXFP4, CT_MXFP8


FAMILIES: Mapping[str, Callable[[], tuple[Layout, ...]]] = {"xpu": _xpu, "compressed-tensors": _compressed_tensors}
"""`--layout` → its layouts, which differ in the modules that they take."""


@cache
def layouts_by_name(family: str | None = None) -> Mapping[str, Layout]:
    """Every layout by name, or those of one `--layout`."""
    asked = [layouts for name, layouts in FAMILIES.items() if family in (None, name)]
    return {layout.name: layout for layouts in asked for layout in layouts()}
