"""Layout `ct_mxfp4`: compressed-tensors `mxfp4-pack-quantized`.

P.weight_packed  U8 [N, K/2]    E2M1 nibbles (sign << 3 | magnitude), low nibble = even column
P.weight_scale   U8 [N, K/32]   E8M0

(compressed_tensors/compressors/nvfp4, mxfp4). Releases before 0.14 read the exponents 4 times too small.
"""

from __future__ import annotations

from xpuquant.formats.ct_mx import CtMx

LAYOUT = CtMx("ct_mxfp4", "e2m1", "weight_packed", "U8", 2, "mxfp4_linear")
