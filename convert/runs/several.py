"""Several conversions in one call: a list of sources, one after the other. One that fails stops none of the others."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

from xpuquant.conversion.runs.request import ConvertRequest
from xpuquant.errors import UsageError
from xpuquant.values import frozen

_MAX_BYTES = 1 << 20
STANDARD_INPUT = "-"

R = TypeVar("R")


@frozen
class ListedSource:
    """A line of a list: a source, and where its output goes; None leaves that to the source's name."""

    source: str
    out: Path | None

    def request(self, like: ConvertRequest) -> ConvertRequest:
        """The conversion of this source, otherwise as another; the output goes below that one's, where it has one."""
        own = replace(like, source=self.source, out=self.out)
        return own if like.out is None else replace(own, out=like.out / own.target)


@frozen
class Attempted(Generic[R]):
    """What became of one request: a result, or an error."""

    request: ConvertRequest
    result: R | None
    error: Exception | None


def read_list(name: str) -> list[ListedSource]:
    """The sources that a file lists, one a line: `SRC` or `SRC OUT`, quoted as in a shell; `#` begins a comment.

    Args:
        name: of the file; `-` is standard input.

    Raises:
        UsageError: no such file, no list, nothing in it, or a line with more than that.
    """
    try:
        if name == STANDARD_INPUT:
            data = sys.stdin.buffer.read(_MAX_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror})") from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{name}: is no list of sources (more than {_MAX_BYTES >> 20} MiB)")
    found: list[ListedSource] = []
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: is no list of sources (not text)") from error
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{name}, line {number}: a quote is not closed") from error
        if len(words) > 2 or "" in words:
            raise UsageError(f"{name}, line {number}: want SRC, or SRC OUT; a name with spaces in quotes")
        if words:
            found.append(ListedSource(words[0], Path(words[1]) if len(words) > 1 else None))
    if not found:
        raise UsageError(f"{name}: lists no source")
    return found


def check_outputs(requests: Sequence[ConvertRequest]) -> None:
    """Raises UsageError where two of them would write the same folder."""
    seen: dict[Path, str] = {}
    for request in requests:
        out = Path(os.path.abspath(request.target))  # noqa: PTH100  # a link in it means what it leads to, later
        if out in seen:
            raise UsageError(f"{seen[out]} and {request.source} would both be written to {request.target}; name an OUT")
        seen[out] = request.source


def try_each(requests: Sequence[ConvertRequest], convert: Callable[[ConvertRequest], R]) -> Iterator[Attempted[R]]:
    """Carry out one request after the other; each as it ends. An interrupt ends all of them."""
    for request in requests:
        try:
            yield Attempted(request, convert(request), None)
        except Exception as error:  # whatever it is, it is this source's
            yield Attempted(request, None, error)
