"""Input that breaks our code in a way nobody foresaw: told as damage of the input, with the name of the module.

A stranger's file may hold a text where a number is meant, or a size of 0. Each such case deserves a check that says
more; until it has one, it must not look like a crash. A mistake of ours looks the same, so nothing is hidden:
XPUQUANT_TRACEBACK=1 shows where it happened, and the test suite fails where a sound checkpoint gets here.
"""

from __future__ import annotations

import os
import traceback
from types import TracebackType

from xpuquant.errors import DamagedError

UNFORESEEN = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What Python raises where config and tensors contradict each other, or are of a type that no check has refused."""


class guarded:  # noqa: N801  # read as a word: with guarded(name)
    """Raises DamagedError, which names a module or file, in the place of what is UNFORESEEN. A class, because a plan
    enters it twice for every module: a generator would cost three times as much."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and isinstance(error, UNFORESEEN):
            show(error)
            said = f"{type(error).__name__}: {error}"
            raise DamagedError(f"{self._name}: its tensors or what is said of it cannot be ({said})") from error


def show(error: Exception) -> None:
    """Print the traceback of an error that becomes a sentence, where XPUQUANT_TRACEBACK asks for it."""
    if os.environ.get("XPUQUANT_TRACEBACK"):
        traceback.print_exception(error)
