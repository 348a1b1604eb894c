"""A griffe extension for the documentation site: the aligned list of fields in a class's docstring becomes a table.

In the code a field is described by a line of its own, names at the left, what they are behind two spaces or more:

    name      a folder, or a repo id on the Hub
    nbytes    bytes of its shards

Markdown would run those lines together. Here they become the section `Attributes:` of Google's style, in which
mkdocstrings shows every field with its type, those that need no words too. A name that no field has is a warning, and
so an error of the strict build.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"(\w+(?:, \w+)*) {2,}(\S.*)")
_log = griffe.get_logger(__name__)


class FieldLists(griffe.Extension):
    """See the module."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Rewrites the docstring of a class that lists its fields, or has some and lists none."""
        fields = [name for name, member in cls.members.items() if _is_field(member)]
        if cls.docstring is None or not fields:
            return
        text, described = separated(cls.docstring.value)
        for name in described.keys() - cls.all_members.keys():
            _log.warning(f"{cls.path}: the docstring describes '{name}', which is no field")
        rows = [f"    {name}: {described.get(name, '')}" for name in fields]
        cls.docstring.value = "\n".join([*text, "", "Attributes:", *rows])


def separated(docstring: str) -> tuple[list[str], dict[str, str]]:
    """The lines of a docstring without its lists of fields, and field → description."""
    text: list[str] = []
    described: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.splitlines():
        if found := _ENTRY.fullmatch(line):
            names = found[1].split(", ")
            described |= dict.fromkeys(names, found[2])
        elif names and re.match(r" {4,}\S", line):
            described |= {name: f"{described[name]} {line.strip()}" for name in names}
        else:
            names = []
            text.append(line)
    return text, described


def _is_field(member: griffe.Object | griffe.Alias) -> bool:
    """Whether it is an annotated attribute of the class itself. Properties stand below, with their own words."""
    return member.is_attribute and not member.is_alias and "property" not in member.labels and member.is_public
