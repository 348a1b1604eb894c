"""Makes Transformers know `xpuquant` in any process that imports torch, with no import by the user.

Transformers discovers no quantizers, and with an unknown `quant_method` it initialises a random model
after a warning. torch does discover: at the end of `import torch` it calls the entry points of group
`torch.backends`. `install` is one. It imports nothing; it puts a finder before `sys.path` that waits for
Transformers' quantizer registry to be imported, registers there, and leaves.

`TORCH_DEVICE_BACKEND_AUTOLOAD=0` switches torch's discovery off; `import xpuquant.transformers` then does
the same by hand.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The registry, and what imports it: torch may come while the registry itself is being imported.
_WAITS_FOR = ("transformers.quantizers.auto", "transformers.modeling_utils")


class _Finder:
    """Runs `_register` after one of the modules waited for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _WAITS_FOR:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """The entry point. Never raises: torch turns an exception here into a failed `import torch`."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    _register()


def _register() -> None:
    """Register if the registry is there, whole; what goes wrong is a warning."""
    registry = sys.modules.get("transformers.quantizers.auto")
    if not hasattr(registry, "get_hf_quantizer"):
        return
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    try:
        importlib.import_module("xpuquant.transformers")
    except Exception as problem:
        warnings.warn(f"xpuquant is not active in Transformers: {problem}", stacklevel=2)
