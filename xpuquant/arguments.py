"""What the arguments of the public functions take. A value that is none of that is refused before anything is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import ParamSpec, TypeVar

from xpuquant.conversion.options import Options, whole_number
from xpuquant.errors import Argument, EnvironmentFault, UsageError, lack_of
from xpuquant.values import frozen

MAX_JOBS = 256

_P = ParamSpec("_P")
_R = TypeVar("_R")


@frozen
class Kind:
    """A kind of value.

    takes  what it is, for a message: `want ...`
    read   the one form of such a value; None where it is another
    """

    takes: str
    read: Callable[[object], object]


def _path(value: object) -> str | None:
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
        return text if isinstance(text, str) and text and b"\0" not in os.fsencode(text) else None
    except (TypeError, ValueError):
        return None


def _folder(value: object) -> Path | None:
    text = _path(value)
    return None if text is None else Path(text)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() and value.isprintable() else None


def _jobs(value: object) -> int | None:
    jobs = whole_number(value)
    return jobs if jobs is not None and 0 <= jobs <= MAX_JOBS else None


def _each(value: object, read: Callable[[object], object]) -> tuple[object, ...] | None:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        return None
    found = tuple(read(one) for one in value)
    return None if None in found else found


_SWITCH = Kind("True or False", lambda value: value if isinstance(value, bool) else None)
_TEXT = Kind("text", _text)
_FOLDER = Kind("a path", _folder)
_OPTION = Kind("", lambda value: value)  # `Options` reads it

KINDS: Mapping[str, Kind] = {
    "source": Kind("a folder, or owner/name on the Hub", _path),
    "out": _FOLDER,
    "a": _FOLDER,
    "b": _FOLDER,
    "report": _FOLDER,
    "options": Kind("xpuquant.Options", lambda value: value if isinstance(value, Options) else None),
    "layout": _OPTION,
    "scale_dtype": _OPTION,
    "on_unsupported": _OPTION,
    "max_shard_size": _OPTION,
    "fold_act_order": _OPTION,
    "revision": Kind("a branch, a tag or a commit", _text),
    "jobs": Kind(f"a whole number up to {MAX_JOBS}; 0: one per core, at most 8", _jobs),
    "verify": _SWITCH,
    "force": _SWITCH,
    "stream": _SWITCH,
    "private": _SWITCH,
    "pr": _SWITCH,
    "unverified": _SWITCH,
    "require_exact": _SWITCH,
    "every": _SWITCH,
    "values": _SWITCH,
    "decode": _SWITCH,
    "part": Kind("i/n with 1 <= i <= n, for example 3/16", _text),
    "ray": Kind("auto, local, or a cluster's host:port", _text),
    "push_to": Kind("owner/name on the Hub", _text),
    "repo_id": Kind("owner/name on the Hub", _text),
    "branch": Kind("a branch", _text),
    "base_model": _OPTION,  # as are these, which `CardFields` reads
    "license": _OPTION,
    "language": _OPTION,
    "token": Kind("text, or False for none", lambda value: value if value is False else _text(value)),
    "endpoint": Kind(
        "an address, for example https://huggingface.co",
        lambda value: text if (text := _text(value)) and text.startswith(("https://", "http://")) else None,
    ),
    "require_backends": Kind("names of kernel libraries, in a list", lambda value: _each(value, _text)),
    "backends": Kind("names of kernel libraries, in a list", lambda value: _each(value, _text)),
    "tensor_parallel": Kind(
        "numbers of GPUs from 1, in a list",
        lambda value: _each(value, lambda n: m if (m := whole_number(n)) is not None and m >= 1 else None),
    ),
    "module": Kind("a module's name", _text),
    "context": Kind(
        "a number of tokens from 1",
        lambda value: tokens if (tokens := whole_number(value)) is not None and tokens >= 1 else None,
    ),
    "progress": Kind("a function of (phase, done, total)", lambda value: value if callable(value) else None),
}
"""Name of an argument, the same in every function → what it takes."""


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function fit for strangers: its arguments are read before it starts, and what the system raises on the way
    becomes an error of ours."""
    parameters = signature(function)

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            given = parameters.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python says itself which argument is missing, or not one
        for name, value in given.arguments.items():
            if value is None and parameters.parameters[name].default is None:
                continue
            read = None if value is None else KINDS[name].read(value)
            if read is None:
                raise UsageError(Argument(name, value), f": want {KINDS[name].takes}")
            given.arguments[name] = read
        try:
            return function(*given.args, **given.kwargs)
        except OSError as error:
            raise EnvironmentFault(f"{error.filename or 'I/O'}: {error.strerror or error}") from error
        except (MemoryError, RuntimeError) as error:
            lack = lack_of(error)
            if lack is None:
                raise
            raise lack from error

    return call
