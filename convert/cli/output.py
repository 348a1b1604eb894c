"""The one place that prints. Commands return data; this decides terminal, plain or JSON, once.

On a terminal: tables no wider than it, a live progress bar with rate and time left. Otherwise: one line to a row, a
progress line every few seconds. With `--json`: one JSON object on standard output, nothing else. With `--quiet`: the
answer in one line, no progress, no remarks. Progress, remarks and errors go to standard error.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from xpuquant.conversion.cli.tables import TextTable, lines_of, wrapped
from xpuquant.conversion.sizes import duration, size
from xpuquant.errors import MESSAGE_LENGTH, Argument, UsageError, one_line
from xpuquant.values import frozen

if TYPE_CHECKING:
    from rich.console import Console

    from xpuquant.conversion.cli.bars import Bars

_STYLES = {"title": "bold", "header": "dim", "row": "", "rest": "dim"}
_PLAIN_INTERVAL_SECONDS = 5.0
_TERMINAL_ANYWAY = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
"""Variables by which rich takes for a terminal what is none."""

_PERHAPS_UNSHOWN = re.compile(r"[^\n -~]")


def _escaped(found: re.Match[str]) -> str:
    char = found[0]
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else json.dumps(char)[1:-1]  # a pair of surrogates


class Typed(str):
    """A line with something to be typed: printed as it is, however wide, so that it can be copied."""


@frozen
class Answer:
    """What a command has to say: the same thing for a reader (`parts`: text or tables, in order), for one in a hurry
    (`brief`: a line; `warned`: lines beside it, on standard error) and for a program (`data`). Text is broken between
    words on a terminal, but for `Typed`."""

    parts: Sequence[str | TextTable]
    data: Mapping[str, Any]
    brief: str
    warned: Sequence[str] = ()


class Output:
    """Renders answers, errors and progress."""

    def __init__(self, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        if quiet and verbose:
            raise UsageError(Argument("quiet", True), " and ", Argument("verbose", True), " exclude each other")
        self.as_json = as_json
        self.quiet = quiet
        self._verbose = verbose
        self._began = time.monotonic()

    @cached_property
    def _out(self) -> Console:
        return _console(stderr=False)

    @cached_property
    def _err(self) -> Console:
        return _console(stderr=True)

    def answer(self, answer: Answer) -> None:
        """Print a command's result."""
        if self.as_json:
            text = json.dumps(answer.data, indent=2, ensure_ascii=False, default=str)
            # Names of strangers may hold what a terminal obeys: shown as JSON's own escapes.
            sys.stdout.write(_PERHAPS_UNSHOWN.sub(_escaped, text) + "\n")
            return
        if self.quiet:
            self._out.print(one_line(answer.brief, MESSAGE_LENGTH), markup=False)
            for warning in answer.warned:
                _print(self._err, f"warning: {one_line(warning, MESSAGE_LENGTH)}")
            return
        for part in answer.parts:
            if isinstance(part, str):
                _print(self._out, one_line(part, MESSAGE_LENGTH), is_typed=isinstance(part, Typed))
            else:
                self._table(part)

    def took(self, nbytes: int) -> str:
        """Time since the command began, and the rate at which it went through so many bytes: `8.1 s, 0.5 GB/s`."""
        seconds = time.monotonic() - self._began
        return f"{duration(seconds)}, {size(nbytes / max(seconds, 1e-3))}/s"

    def note(self, text: str) -> None:
        """A remark that is no part of the answer."""
        if not (self.as_json or self.quiet):
            _print(self._err, one_line(text, MESSAGE_LENGTH))

    def _table(self, table: TextTable) -> None:
        width = self._out.width if self._out.is_terminal else None
        for kind, line in lines_of(table, width, every=self._verbose):
            text = line + ("-v prints them all" if kind == "rest" else "")
            from rich.text import Text

            self._out.print(Text(text, style=_STYLES[kind] if self._out.is_terminal else ""))

    def error(self, text: str) -> None:
        """The one line a failed command ends with."""
        _print(self._err, f"error: {one_line(text, MESSAGE_LENGTH)}", style="red" if self._err.is_terminal else None)

    def ask(self, question: str) -> bool:
        """A yes-or-no question, on a terminal; no where nobody can answer."""
        if self.as_json or self.quiet or not (_is_terminal(sys.stdin) and self._err.is_terminal):
            return False
        self._err.print(f"{one_line(question, MESSAGE_LENGTH)} [y/N] ", markup=False, end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def progress(self) -> Bars | Lines:
        """A reporter for long work; use as a context manager."""
        silent = self.as_json or self.quiet
        # rich is asked last: its import is a tenth of the time to a conversion's first byte.
        may_watch = _is_terminal(sys.stderr) or any(name in os.environ for name in _TERMINAL_ANYWAY)
        if silent or not may_watch or not self._err.is_terminal:
            return Lines(lambda: self._err, silent)
        from xpuquant.conversion.cli.bars import Bars

        return Bars(self._err)


def _is_terminal(stream: TextIO | None) -> bool:
    """Python has None for a standard stream that was closed when it started."""
    return stream is not None and stream.isatty()


def _console(stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def _print(console: Console, text: str, *, is_typed: bool = False, style: str | None = None) -> None:
    """One line of text; on a terminal several, where it is wider, broken between words."""
    lines = wrapped(text, console.width) if console.is_terminal and not is_typed else [text]
    for line in lines:
        console.print(line, markup=False, style=style)


class Lines:
    """Progress where nobody watches: a line every few seconds, none for short work."""

    def __init__(self, console: Callable[[], Console], silent: bool) -> None:
        self._console = console
        self._silent = silent
        self._lock = threading.Lock()
        self._name, self._total, self._done, self._before = "", 0, 0, 0
        self._about = ""
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def phase(self, name: str, total: int, before: int = 0) -> None:
        with self._lock:
            self._name, self._total, self._done, self._before = name, total, before, before
            self._began = self._said = time.monotonic()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if self._silent or now - self._said < _PLAIN_INTERVAL_SECONDS:
                return
            self._said = now
            if self._about:
                self.note(self._about)
                self._about = ""
            rate = (self._done - self._before) / (now - self._began)
            left = (self._total - self._done) / max(rate, 1)
            text = f"{self._name}: {size(self._done)} of {size(self._total)}, {size(rate)}/s, {left:.0f} s left"
            self._console().print(text, markup=False)

    def note(self, text: str) -> None:
        if not self._silent:
            self._console().print(one_line(text), markup=False)

    def begins(self, text: str) -> None:
        self._about = text
