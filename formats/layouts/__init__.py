"""What is written: the on-disk contract of each kind of module, listed in `LAYOUTS`.

A new layout is a file with a subclass of `base.Layout`, and a line below.
"""

from collections.abc import Mapping
from functools import cache

from xpuquant.formats.layouts.base import Layout
from xpuquant.formats.layouts.compressed_tensors.fp8 import CtFp8
from xpuquant.formats.layouts.compressed_tensors.ints import CtInt4, CtInt8
from xpuquant.formats.layouts.compressed_tensors.mx import CT_MXFP4, CT_MXFP8
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

LAYOUTS: tuple[Layout, ...] = (
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
    CtInt4(),
    CtInt8(),
    CtFp8(),
    CT_MXFP4,
    CT_MXFP8,
)
"""Every layout. Those of one family differ in the modules that they take."""


@cache
def layouts_by_name(family: str | None = None) -> Mapping[str, Layout]:
    """Every layout by name, or those of one `--layout`."""
    return {layout.name: layout for layout in LAYOUTS if family in (None, layout.family)}
