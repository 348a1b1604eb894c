"""What is read: one file for each source format, listed in `READERS`.

A new format is a file with a class that meets `base.Reader`, and a line below.
"""

from xpuquant.formats.readers.autoround import AutoRound
from xpuquant.formats.readers.awq import Awq
from xpuquant.formats.readers.base import Reader
from xpuquant.formats.readers.compressed_tensors.packed import PackQuantized
from xpuquant.formats.readers.compressed_tensors.refused import Refused
from xpuquant.formats.readers.compressed_tensors.unpacked import IntQuantized
from xpuquant.formats.readers.fp8 import Fp8
from xpuquant.formats.readers.fp8_fused import Fp8Fused
from xpuquant.formats.readers.gpt_oss import GptOss
from xpuquant.formats.readers.gptq import Gptq
from xpuquant.formats.readers.modelopt_int4 import ModelOptInt4
from xpuquant.formats.readers.mxfp4 import Mxfp4
from xpuquant.formats.readers.mxfp8 import Mxfp8
from xpuquant.formats.readers.nvfp4 import Nvfp4
from xpuquant.formats.readers.nvfp4_fused import Nvfp4Fused
from xpuquant.formats.readers.quark_int import QuarkInt

READERS: tuple[Reader, ...] = (
    Gptq(),
    Awq(),
    AutoRound(),
    PackQuantized(),
    IntQuantized(),
    Refused(),
    Fp8(),
    Fp8Fused(),
    Mxfp4(),
    Mxfp8(),
    GptOss(),
    Nvfp4(),
    Nvfp4Fused(),
    ModelOptInt4(),
    QuarkInt(),
)
"""Every source format. No two claim one module, so that their order decides nothing (tests/formats/test_readers.py)."""
