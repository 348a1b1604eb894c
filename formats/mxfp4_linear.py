"""Layout `mxfp4_linear`: MXFP4 linears, as oneDNN's fp4 matmul reads them.

    P.weight        uint8 [N, K/2]    E2M1 nibbles (sign << 3 | magnitude), low nibble = even column
    P.weight_scale  uint8 [K/32, N]   E8M0

The kernel (`fp4_gemm`, vllm-xpu-kernels csrc/xpu/onednn) takes the weight viewed as `float4_e2m1fn_x2`, as `.t()`, and
quantizes the activations to MXFP4 itself: there is no 16-bit-activation kernel for MXFP4 linears.
"""

from __future__ import annotations

from xpuquant.formats.mx_linear import MxLinear

LAYOUT = MxLinear("mxfp4_linear", {"U8": "e2m1"}, packed=2)
