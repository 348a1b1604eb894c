"""Converted repos in Transformers. Importing this package registers the quantizer.

Where the user does not import it, `xpuquant.transformers_autoload` does.
"""

from importlib.util import find_spec

for _needed in ("torch", "transformers"):
    if find_spec(_needed) is None:
        raise ModuleNotFoundError(f"{_needed} is not installed: pip install 'xpuquant[transformers]'", name=_needed)

from xpuquant.transformers.quantizer import XpuquantQuantizer, XpuquantTransformersConfig  # noqa: E402

__all__ = ["XpuquantQuantizer", "XpuquantTransformersConfig"]
