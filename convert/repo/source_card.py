"""What the card of a conversion says of its source: what it was told (`CardFields`), and of the source's own card a few
fields, each of the form that the Hub's specification gives it.

The card is a stranger's, and what is kept of it stands on the page of whoever publishes the conversion. So it is
read before the work, within bounds (`yaml_front.py`), and a field of another form is left out. `extra_gated_*` is never
kept: whether a conversion is gated, and what it asks, is for its publisher to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xpuquant.conversion.repo.card_merge import CARD, front_matter, is_named
from xpuquant.conversion.sizes import counted
from xpuquant.conversion.sources.base import Source
from xpuquant.errors import Argument, UsageError, shown
from xpuquant.values import frozen

_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,95}", re.ASCII)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_LINK = re.compile(r"https://[\w.-]+(/[\w./%~+=&?#@:-]*)?|[\w-][\w./-]*", re.ASCII)
_CACHED_REPO = re.compile(r"models--([^/]+?)--([^/]+)")
_MOST_ITEMS = 100
_LONGEST = 300


_TOLD: Mapping[str, tuple[str, re.Pattern[str]]] = {
    "base_model": (
        "owner/name on the Hub",
        re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII),
    ),
    "license": ("the Hub's identifier of a licence, for example apache-2.0", _WORD),
    "language": ("codes of languages, for example en or en,zh", _WORD),
}
"""Field → what it takes, and what each of its items is."""


def _items(name: str, value: str) -> list[str]:
    return value.split(",") if name == "language" else [value]


@frozen
class CardFields:
    """What the card is told to say of the model, for a source whose own card does not: a folder often has none.

    base_model  repo id of what was converted
    license     the Hub's identifier of its licence, such as `apache-2.0`
    language    codes of its languages, such as `en` or `en,zh`

    Raises:
        UsageError: a value that is none of these.
    """

    base_model: str | None = None
    license: str | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        for name, (wanted, pattern) in _TOLD.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and all(map(pattern.fullmatch, _items(name, value)))):
                raise UsageError(Argument(name, value), f": want {wanted}")

    def told(self) -> list[Argument]:
        """The fields that were given, as arguments."""
        return [Argument(name, getattr(self, name)) for name in _TOLD if getattr(self, name) is not None]

    def metadata(self) -> dict[str, Any]:
        """The same as front matter has it: of several languages a list."""
        items = {one.name: _items(one.name, str(one.value)) for one in self.told()}
        return {name: values[0] if len(values) == 1 else values for name, values in items.items()}


NOTHING_TOLD = CardFields()


def metadata_of(
    source: Source, told: CardFields = NOTHING_TOLD, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """What the card says of the model: what it was told, else fields of the source's card that may be kept, in their
    checked form. Its base is the repo that was converted; of a plain folder, what its own card calls its base: a
    conversion is below that too.

    Args:
        note: told of each field that could not be kept.

    Raises:
        EnvironmentFault: network.
    """
    text = source.read_text(CARD) or ""
    found = kept_fields(front_matter(text))
    for name, why in lost_fields(text).items():
        if name not in told.metadata():
            note(f"{CARD} of the source: {name} {why}: not taken over")
    repo = source.name if source.revision is not None else cached_repo(source.name)[0]
    return found | ({} if repo is None else {"base_model": repo}) | told.metadata()


def cached_repo(name: str) -> tuple[str | None, str | None]:
    """(repo id, commit) of a folder in the Hub client's cache: `models--OWNER--NAME/snapshots/COMMIT`."""
    path = Path(name).resolve()
    match = _CACHED_REPO.fullmatch(path.parent.parent.name)
    if match is None or path.parent.name != "snapshots":
        return None, None
    return f"{match[1]}/{match[2]}", path.name


def kept_fields(front: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `front` that are of the form they should have."""
    found = {name: check(front[name]) for name, check in _FIELDS.items() if name in front}
    return {name: value for name, value in found.items() if value}


def lost_fields(text: str) -> dict[str, str]:
    """Field of a card that would be kept, were all of it of the form that it should have → why it is not, in words."""
    front, found = front_matter(text), dict[str, str]()
    kept = kept_fields(front)
    for name in _FIELDS:
        value, held = front.get(name), kept.get(name)
        if value and not held:
            found[name] = f"is not of the form that the Hub gives it ({shown(value)})"
        elif isinstance(value, list) and isinstance(held, list) and len(held) < len(value):
            found[name] = f"has {counted(len(value) - len(held), 'item')} not of the form that the Hub gives it"
        elif name not in front and is_named(text, name):
            found[name] = "cannot be read"
    return found


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
    """One line of plain text; no name of a licence has brackets of a markup."""
    is_plain = isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST
    return value if is_plain and not set(value) & set("<>") else None


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
