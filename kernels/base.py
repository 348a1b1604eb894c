"""What a kernel backend is: a stored layer and activations in, a product out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from xpuquant.errors import EnvironmentFault
from xpuquant.formats.scheme import Scheme
from xpuquant.values import frozen

Array = np.ndarray[Any, Any]


@frozen
class Layer:
    """One linear, or one expert's matrix of a stack, exactly as it is stored.

    scheme   the stored scheme
    N, K     out and in features
    tensors  role → array with the on-disk dtype and shape (ml_dtypes types for bf16 and fp8). Roles are the
             contract's suffixes: `qweight`, `scales`, `qzeros`, `g_idx` (int4, int8 linear), `global_scale` (nvfp4);
             `weight`, `weight_scale`, `input_scale` (fp8, mxfp4, mxfp8 linear). For one expert of a stack: `weight`,
             `weight_scale`, `weight_zero_point`, `global_scale`, `bias`, the expert's slice of `gate_up_proj`,
             `gate_up_proj_scale` (or down_proj's) without the leading E. `bias` `[N]` where the linear has one.
    """

    scheme: Scheme
    N: int
    K: int
    tensors: Mapping[str, Array]


def fault_of(load: Callable[[], object]) -> str | None:
    """The message of the EnvironmentFault that `load` raises; None where it succeeds."""
    try:
        load()
    except EnvironmentFault as error:
        return str(error)
    return None


@runtime_checkable
class Backend(Protocol):
    """A kernel library: says what it can run here, and runs it."""

    @property
    def name(self) -> str:
        """Name for `--backend`, reports and `doctor`."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether several threads may call it at once, after one has asked whether it is `unavailable`."""
        ...

    def unavailable(self) -> str | None:
        """None where the backend runs on this machine; otherwise why not and what would change that."""
        ...

    def refuses(self, scheme: Scheme, N: int, K: int, activation: str = "BF16") -> str | None:
        """None where the backend can compute this scheme and shape here; otherwise the reason.

        Args:
            activation: safetensors label of the dtype of `x`: "BF16", "F16" or "F32".
        """
        ...

    def is_fast(self, scheme: Scheme, N: int, K: int) -> bool:
        """Whether a large linear, all its rows at several M, takes seconds here; otherwise checks compute a sample."""
        ...

    def linear(self, layer: Layer, x: Array) -> Array:
        """`x · Wᵀ (+ bias)`.

        Args:
            layer: the stored layer.
            x: activations `[M, K]`, bfloat16 (ml_dtypes), float16 or float32.

        Returns:
            float32 `[M, N]`: the kernel's output, widened.
        """
        ...


def tolerance(activation: str, K: int) -> float:
    """The largest relative Frobenius error against float64 that arithmetic alone explains.

    16-bit activations round the output, the widened weight and (where the kernel casts them) the scales
    once each: up to 2^-8 together in bfloat16, 2^-10 in float16. In float32 the K additions dominate; their
    rounding errors, 2^-24 each, add up like a random walk. Twice that, because few outputs may happen to
    cancel and be small against their terms. docs/kernels.md has what was measured.

    Args:
        activation: safetensors label of the dtype of `x`.
        K: in features.
    """
    return 2 * {"BF16": 2.0**-8, "F16": 2.0**-10}.get(activation, 2.0**-24 * math.sqrt(K))
