"""Input that breaks our code in a way nobody foresaw: told as damage of the input, with the name of the module.

A stranger's file may hold a text where a number is meant, or a size of 0. Each such case deserves a check that says
more; until it has one, it must not look like a crash. A mistake of ours looks the same, so nothing is hidden:
XPUQUANT_TRACEBACK=1 shows where it happened, and the test suite fails where a sound checkpoint gets here.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from xpuquant.errors import DamagedError

UNFORESEEN = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What Python raises where config and tensors contradict each other, or are of a type that no check has refused."""


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Raises DamagedError, which names a module or file, in the place of what is UNFORESEEN."""
    try:
        yield
    except UNFORESEEN as error:
        show(error)
        said = f"{type(error).__name__}: {error}"
        raise DamagedError(f"{name}: its tensors or what is said of it cannot be ({said})") from error


def show(error: Exception) -> None:
    """Print the traceback of an error that becomes a sentence, where XPUQUANT_TRACEBACK asks for it."""
    if os.environ.get("XPUQUANT_TRACEBACK"):
        traceback.print_exception(error)
