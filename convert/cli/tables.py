"""Tables as text: aligned columns, no wider than the terminal, broken where words end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from xpuquant.errors import one_line
from xpuquant.values import frozen

_GAP = "  "
_INDENT = "  "
_NARROWEST = 8
"""Columns: what a cell is given at least, however narrow the terminal."""

_PARTS = re.compile(r"(?:\d[\d.,]* [kMGT]?B(?!\S)|pip install (?:-\S+ )*\S+|[(\[]?`[^`]{1,40}`\S*|\S+)\s*|\s+")
"""Words. A size is one, its number and its unit stay together; and so is what is to be typed, which is copied."""
_NAME_PARTS = re.compile(r"[^./,:=_-]*[./,:=_-]|[^./,:=_-]+")
"""A name that is longer than its column is broken after a dot, a slash, a comma."""


@frozen
class TextTable:
    """A table: a title, column names, rows of cells.

    columns  empty names: a list of facts, each with its label, printed without a header
    most     rows that are printed unless all are asked for; the number of the others is always said
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    most: int | None = None


def lines_of(table: TextTable, width: int | None = None, every: bool = False) -> Iterable[tuple[str, str]]:
    """(kind, text) of each line; kind is `title`, `header`, `row` or `rest`.

    Args:
        width: of the terminal in characters; None where nothing is to be broken.
        every: all rows, whatever `most` says.
    """
    shown = table.rows if every or table.most is None else table.rows[: table.most]
    indent = _INDENT if table.title else ""
    if table.title:
        yield "title", one_line(table.title)
    cells = [[one_line(cell, 4000) for cell in row] for row in shown]
    header = [list(table.columns)] if any(table.columns) else []
    widths = _widths(
        [*header, *cells], None if width is None else width - len(indent), labels=not header and len(table.columns) > 1
    )
    for kind, rows in (("header", header), ("row", cells)):
        for row in rows:
            columns = [_wrapped(cell, limit) for cell, limit in zip(row, widths, strict=True)]
            for i in range(max(map(len, columns))):
                parts = [
                    (column[i] if i < len(column) else "").ljust(limit)
                    for column, limit in zip(columns, widths, strict=True)
                ]
                yield kind, indent + _GAP.join(parts).rstrip()
    if len(shown) < len(table.rows):
        yield "rest", f"{indent}and {len(table.rows) - len(shown)} more; "


def _widths(rows: Sequence[Sequence[str]], limit: int | None, labels: bool) -> list[int]:
    """The width of each column: what its cells need, less of the widest ones where that is more than the limit.

    Args:
        labels: the first column holds labels, which stay whole.
    """
    if not rows:
        return []
    columns = [[row[i] for row in rows] for i in range(len(rows[0]))]
    widths = [max(map(len, column)) for column in columns]
    if limit is None:
        return widths
    least = [
        max(len(word.rstrip()) for cell in column for word in (_PARTS.findall(cell) or [""])) for column in columns
    ]
    narrowest = [_NARROWEST] * len(columns)
    if labels:
        least[0] = narrowest[0] = widths[0]
    available = limit - len(_GAP) * (len(columns) - 1)
    for floor in (least, narrowest):
        while sum(widths) > available:
            widest = max(range(len(widths)), key=lambda i: widths[i] - floor[i])
            if widths[widest] <= floor[widest]:
                break
            widths[widest] -= 1
    return widths


def wrapped(text: str, width: int) -> list[str]:
    """Prose, broken between words alone: a path that is longer than a line stays one, and can be copied."""
    lines = [""]
    for word in _PARTS.findall(text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _wrapped(text: str, width: int) -> list[str]:
    """A cell's lines: broken between words; inside a word only where it is longer than the column."""
    lines = [""]
    for word in _PARTS.findall(text):
        pieces = [word] if len(word.rstrip()) <= width else _cut(word, width)
        for piece in pieces:
            if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return [line.rstrip() for line in lines]


def _cut(word: str, width: int) -> list[str]:
    """A long name in parts that fit."""
    return [
        part[start : start + width]
        for part in _NAME_PARTS.findall(word)
        for start in range(0, len(part), max(width, 1))
    ]
