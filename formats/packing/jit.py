"""Loops as machine code: how they are called, and loaded.

A loop takes arrays and whole numbers, and gives a whole number, a truth, or nothing. It allocates nothing, what is
between being an argument, so that its machine code calls nothing and runs without the interpreter's lock. Where that
code comes from is `machine_code.py`; most often from a file, by llvmlite alone, in a twelfth of a second. Modules with
loops are imported where weights are about to be moved, never for a look at headers.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeGuard, TypeVar, cast

import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])
Entry = Callable[..., int]
Numbers = tuple[np.dtype[Any], ...]
"""The dtypes of a tuple of numbers, all the same, or of one number."""
ArrayType = tuple[np.dtype[Any], int, bool, bool]
"""Of an array: dtype, number of axes, whether it is contiguous, and whether its elements lie at multiples of their
size."""
Key = tuple[Numbers | ArrayType, ...]
"""What machine code is made for, an item to an argument."""

_WHOLE = np.dtype(np.int64)

_LOCK = threading.Lock()
"""Around compiling and loading, which LLVM does for one thread at a time."""


def compiled(function: Function) -> Function:
    """The function as machine code for the types it is called with; other loops that it calls are compiled into it.
    Division is numpy's: no check for zero."""
    return cast("Function", Loop(cast("FunctionType", function)))


class Loop:
    """A function whose machine code is looked up by the types of its arguments."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.__doc__ = function.__doc__
        self._entries: dict[Key, Entry] = {}

    def __call__(self, *arguments: Any) -> int:
        key: list[Any] = []
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                flags = argument.flags
                key.append((argument.dtype, argument.ndim, flags.c_contiguous, flags.aligned))
                # An array as numba passes it: its owner (none), elements, bytes of each, the first, shape and strides.
                values += (None, None, argument.size, argument.itemsize, argument.ctypes.data)
                values += argument.shape
                values += argument.strides
            elif isinstance(argument, tuple):
                key.append(tuple(_dtype(number) for number in argument))
                values += map(int, argument)
            else:
                key.append((_dtype(argument),))
                values.append(int(argument))
        which = tuple(key)
        entry = self._entries.get(which) or self._loaded(which)
        found, problem = ctypes.c_int64(), ctypes.c_void_p()
        if entry(ctypes.byref(found), ctypes.byref(problem), *values):
            raise AssertionError(f"{self.function.__name__} raised, which no loop does")
        return found.value

    def _loaded(self, key: Key) -> Entry:
        with _LOCK:
            if key not in self._entries:
                from xpuquant.formats.packing.machine_code import address_of

                self._entries[key] = _convention(key)(address_of(self.function, key))
            return self._entries[key]


def _dtype(number: Any) -> np.dtype[Any]:
    return number.dtype if isinstance(number, np.generic) else _WHOLE


def is_array(one: Numbers | ArrayType) -> TypeGuard[ArrayType]:
    """Whether an argument is an array."""
    return isinstance(one[-1], bool)


def _convention(key: Key) -> Callable[[int], Entry]:
    """How code at an address is called: where its result goes, where a problem would, the arguments; 0 is returned."""
    passed: list[Any] = []
    for one in key:
        if is_array(one):
            passed += [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
            passed += [ctypes.c_int64] * (2 * one[1])
        else:
            passed += [np.ctypeslib.as_ctypes_type(number) for number in cast("Numbers", one)]
    return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *passed)
