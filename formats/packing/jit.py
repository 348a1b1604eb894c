"""How a loop is compiled: by numba, without the interpreter's lock, kept for the next process.

The machine code is kept beside the module, or in the user's cache folder where that cannot be written. The first
conversion of a format on a machine takes a second or two longer. Importing numba costs 0.15 s, so the modules with
loops are imported where weights are about to be moved, never for a look at headers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """The function as machine code for the types it is called with. Division is numpy's: no check for zero."""
    try:
        return cast("Function", numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:
        # No folder for the cache can be written: each process compiles for itself.
        return cast("Function", numba.njit(nogil=True, error_model="numpy")(function))
