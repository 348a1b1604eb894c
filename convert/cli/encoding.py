"""Standard streams as a shell may give them: not Unicode (`PYTHONIOENCODING=ascii`, a Latin-1 locale), which then take
any text, spelt in ASCII; or closed (`>&-`)."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TextIO

_PLAIN = {"→": "->", "…": "...", "×": "x", "·": "-"}
_HANDLER = "xpuquant-plain"


def open_closed_streams() -> None:
    """Give each standard stream that was closed when Python started, for which it has None, the null device: what is
    said there is nobody's. And no file that is opened later gets its number, so that nothing a library prints comes to
    lie in a shard."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # As Python's own streams, it does not close its descriptor: at the end nothing warns of a file left open.
            number = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def speak_plainly(stream: TextIO) -> None:
    """Let a stream take what its encoding lacks, instead of raising UnicodeEncodeError after the work is done."""
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error(_HANDLER, _spelt)
        stream.reconfigure(errors=_HANDLER)


def _spelt(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "streams are written here"
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in text), error.end
