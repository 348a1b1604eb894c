"""Standard output that is not Unicode (`PYTHONIOENCODING=ascii`, a Latin-1 locale): takes any text, spelt in ASCII."""

from __future__ import annotations

import codecs
import io
from typing import TextIO

_PLAIN = {"→": "->", "…": "...", "×": "x", "·": "-"}
_HANDLER = "xpuquant-plain"


def speak_plainly(stream: TextIO) -> None:
    """Let a stream take what its encoding lacks, instead of raising UnicodeEncodeError after the work is done."""
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error(_HANDLER, _spelt)
        stream.reconfigure(errors=_HANDLER)


def _spelt(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "streams are written here"
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in text), error.end
