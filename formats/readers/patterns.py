"""Regular expressions out of strangers' configs, matched in bounded time.

Configs say which modules they mean with Python regexes (`targets` and `ignore` of compressed-tensors, `dynamic` of
GPTQModel, `extra_config` of AutoRound). Python's own engine backtracks: `(a+)+$` on a long name never ends, and nothing
can interrupt it. So a pattern goes to `re` only where its length and the name's bound the work; any other goes to the
`regex` library, which takes a time limit. The answer is always the one `re` would give: where the two libraries read
a pattern differently and `re` may explode, the pattern is refused.
"""

from __future__ import annotations

import re
import time
import warnings
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NoReturn

from xpuquant.errors import UsageError, shown

if TYPE_CHECKING:
    import regex

MAX_PATTERN = 4096
"""Characters of one pattern."""

MAX_PATTERNS = 4096
"""Patterns of one config: each is tried on every module."""

SECONDS_PER_NAME = 1.0
SECONDS_PER_PATTERN = 20.0
"""Over all names. A hundred thousand modules take a second."""

_MAX_WAYS = 1_000_000
"""Ways to match that `re` may have to try on one name: three `.*` on 99 characters, in some 20 ms."""

_MAX_REPEATED = 10_000
"""Characters of a pattern, times its counts. `regex` writes a counted group out: `((a{1000}){1000}){1000}` would take
gigabytes to compile."""

_REPEATED_GROUP = re.compile(r"\)[*+{]|\(\?[a-zA-Z]*x")
"""What may make the ways exponential. In verbose mode (x), spaces may stand before the `*`."""

_REPEAT = re.compile(r"(?<!(?<!\\)\()[*+?{]")
"""A quantifier: not the `?` of `(?:`, but that of `\\(?`."""

_COUNT = re.compile(r"\{(\d*),?(\d*)\}")

_READ_DIFFERENTLY = re.compile(r"\[:|\{(?!\d*,?\d*\})|\(\?[a-zA-Z]*x")
"""POSIX classes and fuzzy matches, which `re` takes for ordinary characters, and spaces within counts."""


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches at the start of `name`, as `re.match` would.

    Raises:
        UsageError: not a regular expression, or one that cannot be matched in bounded time.
    """
    return _compiled(pattern).found(name, anywhere=False)


def searches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches anywhere in `name`, as `re.search` would. Raises as `matches`."""
    return _compiled(pattern).found(name, anywhere=True)


def check_count(key: str, count: int) -> None:
    """Raises UsageError where a config has more than MAX_PATTERNS regular expressions under `key`."""
    if count > MAX_PATTERNS:
        raise UsageError(f"config: '{key}' has {count} regular expressions, at most {MAX_PATTERNS} are read")


@lru_cache(maxsize=4 * MAX_PATTERNS)
def _compiled(pattern: str) -> Pattern:
    return Pattern(pattern)


class Pattern:
    """One compiled pattern. Its methods raise UsageError where it is refused."""

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_PATTERN:
            self._refuse(f"has {len(text)} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._re = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            self._refuse(f"is not a regular expression ({error})")
        self._limited: regex.Pattern[str] | None = None
        # A search tries every place of the name, as a repeat does.
        self._longest = {anywhere: _longest_bounded(text, int(anywhere)) for anywhere in (False, True)}
        self._seconds_left = SECONDS_PER_PATTERN

    def found(self, name: str, *, anywhere: bool) -> bool:
        """Whether the pattern is in `name`: at its start, or anywhere."""
        began = time.perf_counter()
        if len(name) <= self._longest[anywhere]:
            answer = (self._re.search if anywhere else self._re.match)(name) is not None
        else:
            answer = self.found_in_time(name, anywhere=anywhere)
        self._seconds_left -= time.perf_counter() - began
        if self._seconds_left <= 0:
            self._refuse(f"takes more than {SECONDS_PER_PATTERN:.0f} seconds to match")
        return answer

    def found_in_time(self, name: str, *, anywhere: bool) -> bool:
        """The same answer from `regex`, which is told when to stop."""
        if self._limited is None:
            self._limited = self._compile_limited()
        if not name or not name.isascii():
            self._refuse("has too many ways to match for a name that is empty or beyond ASCII")
        match = self._limited.search if anywhere else self._limited.match
        try:
            return match(name, timeout=min(SECONDS_PER_NAME, self._seconds_left)) is not None
        except TimeoutError:
            self._refuse(f"takes too long to match {shown(name)}")

    def _compile_limited(self) -> regex.Pattern[str]:
        import regex  # 30 ms, which few configs need

        if _READ_DIFFERENTLY.search(self.text) or not self.text.isascii():
            self._refuse("has too many ways to match for one with '[:', '{' before no number, (?x) or beyond ASCII")
        counts = [max(int(low or 1), int(high or 1)) for low, high in _COUNT.findall(self.text)]
        if len(self.text) * prod(counts) > _MAX_REPEATED:
            self._refuse("repeats too much")
        try:
            return regex.compile(self.text, regex.VERSION0, cache_pattern=False)
        except (regex.error, RecursionError) as error:
            self._refuse(f"has too many ways to match ({error})")

    def _refuse(self, why: str) -> NoReturn:
        raise UsageError(f"config: the regular expression {shown(self.text)} {why}")


def _longest_bounded(text: str, starts: int) -> int:
    """Characters of the longest name on which `re` tries at most _MAX_WAYS; -1 where there is no such bound.

    Each repeat may end at any place of the name, and n alternatives are n ways, at most 2^(n-1).
    """
    repeats, bars = len(_REPEAT.findall(text)) + starts, text.count("|")
    if _REPEATED_GROUP.search(text) or bars > 60:
        return -1
    return int((_MAX_WAYS / 2**bars) ** (1 / max(repeats, 1))) - 1
