"""Converted repos in Transformers. Importing this package registers the quantizer.

Where the user does not import it, `xpuquant.transformers_autoload` does.
"""

from xpuquant.transformers.quantizer import XpuquantQuantizer, XpuquantTransformersConfig

__all__ = ["XpuquantQuantizer", "XpuquantTransformersConfig"]
