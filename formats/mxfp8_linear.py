"""Layout `mxfp8_linear`: MXFP8 linears, as oneDNN's fp8 matmul reads them.

    P.weight        F8_E4M3 or F8_E5M2 [N, K]
    P.weight_scale  uint8 [K/32, N]   E8M0

The kernel (`fp8_gemm`, vllm-xpu-kernels csrc/xpu/onednn) takes `weight.t()` and quantizes the activations itself.
"""

from __future__ import annotations

from xpuquant.formats.float_weight import ELEMENTS
from xpuquant.formats.mx_linear import MxLinear

LAYOUT = MxLinear("mxfp8_linear", ELEMENTS, packed=1)
