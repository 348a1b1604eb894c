"""Markdown by type: text of strangers becomes Markdown only by being escaped.

Names of tensors and files, licences and messages come from files that anybody may have written. A `str` is such a text;
a `Markdown` is what may be written as it stands. Whatever is put into a template (`markdown`) or a table is escaped
unless it is a `Markdown` already, and those are made here alone, from literals of our own and from escaped text. So
nobody can forget to escape, and mypy tells the two apart.

What is escaped follows CommonMark 0.31 (sections 2.4, 6.1, 6.6) and GitHub's extensions to it: tables, strikethrough,
bare addresses that become links, `$` of formulas.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

from xpuquant.errors import one_line

_SPECIAL = re.compile(r"[\\`*\[\]<>&|~$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
"""What may begin or end something within a line. `_` inside a word does not."""

_ADDRESS = re.compile(r"(?<=[A-Za-z])(:)(?=//)|(?<=\b[Ww]{3})(\.)|(@)")
"""Where a bare address is known by: `https://x`, `www.x`, `x@y`."""

_LEADING = re.compile(r"^(?:([#>+\-=:])|(\d{1,9})([.)])(?=\s|$))")
"""What may begin a block at the start of a line: headings, quotes, lists, rules."""

_RUN = re.compile(r"`+")


class Markdown(str):
    """Text that is Markdown, to be written as it stands. Made in this module only."""

    __slots__ = ()


def text(value: object, limit: int = 1000) -> Markdown:
    """Any text as one line that shows it and does nothing else. Longer ones are cut; a `Markdown` stays as it is."""
    if isinstance(value, Markdown):
        return value
    line = one_line(value, limit).strip()
    line = _SPECIAL.sub(lambda found: "&lt;" if found[0] == "<" else f"\\{found[0]}", line)
    line = _ADDRESS.sub(lambda found: f"\\{found[0]}", line)
    return Markdown(_LEADING.sub(lambda found: f"\\{found[1]}" if found[1] else f"{found[2]}\\{found[3]}", line))


def fenced(value: str, language: str = "", limit: int = 4000) -> Markdown:
    """Lines of code, in a fence that is longer than any in them."""
    lines = [one_line(line, limit) for line in value.split("\n")]
    fence = "`" * max(3, 1 + max((len(run) for line in lines for run in _RUN.findall(line)), default=0))
    return Markdown("\n".join([f"{fence}{language}", *lines, fence]))


class _Template(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        return text(format(value, spec) if spec else value)


def markdown(template: str, **values: object) -> Markdown:
    """A template of ours, a literal, with values in the place of `{name}`: escaped, unless they are `Markdown`."""
    return Markdown(_Template().vformat(template, (), values))


def joined(separator: str, parts: Iterable[Markdown]) -> Markdown:
    """Parts with a separator of ours, a literal, between them."""
    return Markdown(separator.join(parts))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], align: str = "", limit: int = 400) -> Markdown:
    """A table.

    Args:
        align: `l` or `r` for each column; left where it ends.
        limit: most characters of a cell.
    """
    rule = ["---:" if side == "r" else "---" for side in align.ljust(len(columns), "l")]
    lines: list[Sequence[str]] = [[text(column) for column in columns], rule]
    lines += [[text(cell, limit) for cell in row] for row in rows]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def listed(items: Iterable[object], limit: int = 400) -> Markdown:
    """A list, a line each."""
    return Markdown("\n".join(f"- {text(item, limit)}" for item in items))
