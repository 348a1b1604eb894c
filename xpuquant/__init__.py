"""Convert quantized LLM checkpoints, once and exactly, into the layouts Intel GPU kernels read.

    import xpuquant

    result = xpuquant.convert("org/model-GPTQ", "model-xpu")

The functions are documented in `xpuquant.api`. Importing the package loads none of them: that is done when one is first
named.
"""

from typing import TYPE_CHECKING

from xpuquant.errors import (
    DamagedError,
    EnvironmentFault,
    Interrupted,
    NotVerifiedError,
    UnsupportedError,
    UsageError,
    VerificationError,
    XpuquantError,
)

if TYPE_CHECKING:
    from xpuquant.api import (
        BackendHealth,
        Converted,
        ConvertedRepo,
        Diagnosis,
        Difference,
        Explanation,
        Finished,
        Inspection,
        ModuleOutcome,
        ModuleValues,
        Options,
        PartConverted,
        Planned,
        Pushed,
        StoredModule,
        Verdict,
        convert,
        convert_part,
        diff,
        doctor,
        explain,
        finish,
        inspect,
        plan,
        push,
        verify,
    )

__version__ = "0.1.0"
"""Written here and nowhere else: to ask for it where packages are installed would cost each start 20 ms."""

__all__ = [
    "BackendHealth",
    "Converted",
    "ConvertedRepo",
    "DamagedError",
    "Diagnosis",
    "Difference",
    "EnvironmentFault",
    "Explanation",
    "Finished",
    "Inspection",
    "Interrupted",
    "ModuleOutcome",
    "ModuleValues",
    "NotVerifiedError",
    "Options",
    "PartConverted",
    "Planned",
    "Pushed",
    "StoredModule",
    "UnsupportedError",
    "UsageError",
    "Verdict",
    "VerificationError",
    "XpuquantError",
    "__version__",
    "convert",
    "convert_part",
    "diff",
    "doctor",
    "explain",
    "finish",
    "inspect",
    "plan",
    "push",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'xpuquant' has no attribute '{name}'")
    from xpuquant import api

    found: object = getattr(api, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
