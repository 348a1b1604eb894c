"""What is taken over from the card of a source: a few fields, each of the form that the Hub's specification gives it.

The card is a stranger's, and what is kept of it stands on the page of whoever publishes the conversion. So it is
read before the work, within bounds (`yaml_front.py`), and a field of another form is left out. `extra_gated_*` is never
kept: whether a conversion is gated, and what it asks, is for its publisher to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from xpuquant.conversion.repo.card_merge import CARD, front_matter
from xpuquant.conversion.sources.base import Source

_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,95}", re.ASCII)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_LINK = re.compile(r"https://[\w.-]+(/[\w./%~+=&?#@:-]*)?|[\w-][\w./-]*", re.ASCII)
_MOST_ITEMS = 100
_LONGEST = 300


def metadata_of(source: Source) -> dict[str, Any]:
    """Fields of the source's card that may be kept, in their checked form.

    Raises:
        EnvironmentFault: network.
    """
    return kept_fields(front_matter(source.read_text(CARD) or ""))


def kept_fields(front: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `front` that are of the form they should have."""
    found = {name: check(front[name]) for name, check in _FIELDS.items() if name in front}
    return {name: value for name, value in found.items() if value}


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        is_short = isinstance(value, str) and len(value) <= _LONGEST
        return value if is_short and pattern.fullmatch(value) else None

    return check


def _listing(pattern: re.Pattern[str]) -> Callable[[Any], list[str] | None]:
    one = _matching(pattern)

    def check(value: Any) -> list[str] | None:
        items = value if isinstance(value, list) else [value]
        return [text for item in items[:_MOST_ITEMS] if (text := one(item)) is not None]

    return check


def _one_or_listing(pattern: re.Pattern[str]) -> Callable[[Any], str | list[str] | None]:
    one, several = _matching(pattern), _listing(pattern)
    return lambda value: several(value) if isinstance(value, list) else one(value)


def _first(pattern: re.Pattern[str]) -> Callable[[Any], str | None]:
    several = _listing(pattern)
    return lambda value: next(iter(several(value) or ()), None)


def _name(value: Any) -> str | None:
    """One line of plain text."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST else None


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "license": _one_or_listing(_WORD),
    "license_name": _name,
    "license_link": _matching(_LINK),
    "language": _one_or_listing(_WORD),
    "datasets": _listing(_REPO_ID),
    "thumbnail": _matching(_LINK),
    "pipeline_tag": _matching(_WORD),
    "tags": _listing(_WORD),
    "base_model": _first(_REPO_ID),
}
