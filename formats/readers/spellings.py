"""Numbers and truths of configs, in whatever way they are spelt: people edit configs, and so do their scripts.

`"bits": "4"` and `"group_size": 128.0` say what 4 and 128 say; `"sym": "False"` is not true.
"""

from __future__ import annotations

import re
from typing import Any

_WHOLE = re.compile(r"\s*([+-]?[0-9]{1,9})(?:\.0*)?\s*")
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def number_said(value: Any) -> int | None:
    """The whole number that a value is (`4`, `4.0`, `"4"`); None where it is none. A truth is no number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    match = _WHOLE.fullmatch(value) if isinstance(value, str) else None
    return int(match[1]) if match else None


def numbers_said(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers; None where a value is no such list."""
    numbers = [number_said(one) for one in value] if isinstance(value, list | tuple) else [None]
    return None if None in numbers else tuple(number for number in numbers if number is not None)


def truth(value: Any) -> bool | None:
    """What is true or false (`true`, `1`, `"False"`); None where a value is neither."""
    if isinstance(value, bool | int | float):
        return bool(value)
    said = value.strip().lower() if isinstance(value, str) else ""
    return True if said in _TRUE else False if said in _FALSE else None


def same(one: Any, other: Any) -> bool:
    """Whether two values say the same."""
    if one == other:
        return True
    if isinstance(one, bool) or isinstance(other, bool):
        return truth(one) is not None and truth(one) == truth(other)
    numbers = [numbers_said(side if isinstance(side, list | tuple) else [side]) for side in (one, other)]
    return numbers[0] is not None and numbers[0] == numbers[1]
