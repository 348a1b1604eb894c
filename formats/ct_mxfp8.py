"""Layout `ct_mxfp8`: compressed-tensors `mxfp8-quantized`.

P.weight        F8_E4M3 [N, K]
P.weight_scale  U8 [N, K/32]   E8M0
"""

from __future__ import annotations

from xpuquant.formats.ct_mx import CtMx

LAYOUT = CtMx("ct_mxfp8", "e4m3", "weight", "F8_E4M3", 1, "mxfp8_linear")
