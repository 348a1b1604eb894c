"""Front matter of cards: YAML that anybody may have written, read within bounds and key by key.

PyYAML's safe loader runs nothing, but it builds whatever the text describes: aliases that double at each level,
integers of any length, dates that do not exist. Here a text has a largest size, depth and number of nodes, no aliases
at all (no card needs one), and a value that cannot be made costs its own key and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_CHARACTERS = 1 << 16
_MOST_NODES = 5000
_DEEPEST = 8


class _Refused(Exception):
    """More than a card can need."""


def read_mapping(text: str) -> Mapping[str, Any]:
    """Key → value of a YAML mapping, without the keys that are no text or whose value cannot be made; empty where the
    text is no mapping within the bounds."""
    import yaml  # type: ignore[import-untyped]  # huggingface_hub brings it

    if len(text) > MOST_CHARACTERS:
        return {}
    try:
        _check_events(yaml, text)
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            return {}
        found: dict[str, Any] = {}
        for key_node, value_node in root.value:
            try:
                key, value = (loader.construct_object(node, deep=True) for node in (key_node, value_node))
            except (yaml.YAMLError, ValueError, TypeError, LookupError, OverflowError, AttributeError):
                continue
            if isinstance(key, str):
                found[key] = value
        return found
    except (yaml.YAMLError, _Refused, RecursionError, ValueError):
        return {}


def _check_events(yaml: Any, text: str) -> None:
    """Raises _Refused for aliases, depth or a number of nodes that no card needs: before anything is built."""
    depth = 0
    for nodes, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent) or nodes > _MOST_NODES:
            raise _Refused
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise _Refused
