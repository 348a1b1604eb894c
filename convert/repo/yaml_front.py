"""Front matter of cards: YAML that anybody may have written, read within bounds and key by key.

PyYAML's safe loader runs nothing, but it builds whatever the text describes: aliases that double at each level,
integers of any length, dates that do not exist. Here a text has a largest size and number of nodes, and each key's
value is cut out of it and built by itself: one that has an alias (no card needs one), is too deep or cannot be made
costs its own key and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MOST_CHARACTERS = 1 << 16
_MOST_NODES = 5000
_DEEPEST = 8
_DEEPEST_READ = 64
"""Beyond it the rest is not looked through for its end: that takes the parser the square of the depth."""


class _Refused(Exception):
    """More than a card can need."""


def read_mapping(text: str) -> Mapping[str, Any]:
    """Key → value of a YAML mapping, without the keys that are no text or whose value cannot be made; empty where the
    text is no mapping within the bounds."""
    return _read(text)[0]


def is_read_whole(text: str) -> bool:
    """Whether `read_mapping` reads every key: what is written again from it loses nothing."""
    return _read(text)[1]


def _read(text: str) -> tuple[dict[str, Any], bool]:
    import yaml  # type: ignore[import-untyped]  # huggingface_hub brings it

    if len(text) > MOST_CHARACTERS:
        return {}, False
    try:
        entries = list(_entries(yaml, text))
    except (yaml.YAMLError, _Refused, RecursionError, ValueError):
        return {}, False
    built = [None if entry is None else _built(yaml, entry) for entry in entries]
    return {key: value for one in built if one is not None for key, value in one.items()}, None not in built


def _entries(yaml: Any, text: str) -> Iterator[str | None]:
    """Each key of a mapping with its value, as they stand in the text; None for one with an alias or too deep.

    Raises:
        _Refused: no mapping, or more nodes, or far deeper, than a card needs.
    """
    depth = members = begin = 0
    is_sound = True
    for nodes, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if nodes > _MOST_NODES or (depth == 0 and isinstance(event, yaml.NodeEvent) and not _is_mapping(yaml, event)):
            raise _Refused
        if depth == 1 and isinstance(event, yaml.NodeEvent) and members % 2 == 0:
            begin = event.start_mark.index
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_READ:
            raise _Refused
        is_sound = is_sound and depth <= _DEEPEST and not isinstance(event, yaml.AliasEvent)
        is_node = isinstance(event, yaml.ScalarEvent | yaml.AliasEvent | yaml.CollectionEndEvent)
        if depth == 1 and is_node:
            members += 1
            if members % 2 == 0:
                yield text[begin : event.end_mark.index] if is_sound else None
                is_sound = True


def _is_mapping(yaml: Any, event: Any) -> bool:
    return isinstance(event, yaml.MappingStartEvent)


def _built(yaml: Any, entry: str) -> dict[str, Any] | None:
    """One key and its value; None where they cannot be made, or the key is no text."""
    try:
        loader = yaml.SafeLoader(entry)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode) or len(root.value) != 1:
            return None
        key, value = (loader.construct_object(node, deep=True) for node in root.value[0])
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, OverflowError, AttributeError):
        return None
    return {key: value} if isinstance(key, str) else None
