"""How far the work is: told in bytes, a phase after the other (`download`, `convert`, `verify`, `push`, ...)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

Progress = Callable[[int], None]
"""Called with each number of bytes done, from any thread."""

ProgressCallback = Callable[[str, int, int], None]
"""Called with a phase's name, its bytes done so far and its bytes in all."""


class Reporter(Protocol):
    """Who is told how far the work is. Called from any thread."""

    def phase(self, name: str, total: int, before: int = 0) -> None:
        """A phase of `total` bytes begins, of which some were done before it."""
        ...

    def advance(self, nbytes: int) -> None:
        """So many more bytes of the phase are done."""
        ...

    def begins(self, text: str) -> None:
        """What is about to be done, for whoever watches: short work without spectators needs no header."""
        ...

    def note(self, text: str) -> None:
        """A remark that is no part of the result, e.g. how much disk will be needed."""
        ...


class Silent:
    """Tells nobody."""

    def phase(self, name: str, total: int, before: int = 0) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def begins(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Halted(Exception):
    """A watcher's function has raised `cause`. A type of its own on its way out: what the function raises is no finding
    about a tensor, whatever its type."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Calls:
    """Tells a function. Use as a context manager: its end completes the last phase.

    The function is called by one thread at a time. Within a phase `done` never falls and never exceeds `total`, however
    the total was estimated; a phase that ended well ends with `done == total`. An exception that the function raises
    stops the work.
    """

    def __init__(self, callback: ProgressCallback) -> None:
        self._callback = callback
        self._lock = threading.Lock()
        self._name, self._done, self._total = "", 0, 0

    def __enter__(self) -> Calls:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Halted):
            raise error.cause from None
        if error is None:
            try:
                with self._lock:
                    self._complete()
            except Halted as halted:
                raise halted.cause from None

    def phase(self, name: str, total: int, before: int = 0) -> None:
        with self._lock:
            self._complete()
            self._name, self._done, self._total = name, 0, total
            self._tell()
            self._advance(before)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._advance(nbytes)

    def begins(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def _advance(self, nbytes: int) -> None:
        done = min(self._done + nbytes, self._total)
        if done > self._done:
            self._done = done
            self._tell()

    def _complete(self) -> None:
        if self._done < self._total:
            self._done = self._total
            self._tell()

    def _tell(self) -> None:
        try:
            self._callback(self._name, self._done, self._total)
        except Exception as error:
            raise Halted(error) from error
