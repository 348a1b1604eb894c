"""Regular expressions out of strangers' configs, matched in bounded time.

Configs say which modules they mean with Python regexes (`targets` and `ignore` of compressed-tensors, `dynamic` of
GPTQModel, `extra_config` of AutoRound). Python's own engine backtracks: `(a+)+$` on a long name never ends, and it
holds the interpreter while it does not. So a pattern is parsed first, and its worst case counted from the parse tree:
the usual kind goes to `re`; any other to a matcher that visits each (instruction, position) once, after R. Cox,
"Regular Expression Matching: the Virtual Machine Approach" (2009). Both give the same answer.
"""

from __future__ import annotations

import re
import re._constants as op  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
import time
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NoReturn

from xpuquant.errors import UsageError, shown

MAX_PATTERN = 4096
"""Characters of one pattern."""

MAX_PATTERNS = 4096
"""Patterns of one config: each is tried on every module."""

_MAX_CHOICES = 1_000_000
"""Ways to match that `re` may have to try on one name: three `.*` and a small alternative, on 80 characters."""
_MAX_PROGRAM = 10_000
_BUDGET_SECONDS = 20.0
"""For one pattern, over all names. A hundred thousand modules take a tenth of a second."""

_Tree = Iterable[tuple[Any, Any]]
_Test = Callable[[str], bool]


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches at the start of `name`, as `re.match` would.

    Raises:
        UsageError: not a regular expression, or one that cannot be matched in bounded time.
    """
    return _compiled(pattern)(name)


def searches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches anywhere in `name`, as `re.search` would. Raises as `matches`."""
    return _compiled(pattern)(name, anywhere=True)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Pattern:
    return Pattern(pattern)


class Pattern:
    """One compiled pattern; call it with a name."""

    def __init__(self, text: str) -> None:
        self._text = text
        if len(text) > MAX_PATTERN:
            self._refuse(f"has {len(text)} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._tree = parser.parse(text)
                self._re = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            self._refuse(f"is not a regular expression ({error})")
        self._program: list[tuple[Any, ...]] = []
        self._cheap: dict[int, bool] = {}
        self._spent = 0.0

    def __call__(self, name: str, anywhere: bool = False) -> bool:
        began = time.perf_counter()
        length = len(name)
        if length not in self._cheap:
            self._cheap[length] = _choices(self._tree, length) <= _MAX_CHOICES
        if self._cheap[length]:
            found = (self._re.search if anywhere else self._re.match)(name) is not None
        else:
            if not self._program:
                self._compile()
            starts = range(length + 1 if anywhere else 1)
            found = self._run(0, name, starts, began + _BUDGET_SECONDS - self._spent)
        self._spent += time.perf_counter() - began
        if self._spent > _BUDGET_SECONDS:
            self._refuse("takes too long to match")
        return found

    def _refuse(self, why: str) -> NoReturn:
        raise UsageError(f"config: the regular expression {shown(self._text)} {why}")

    # The matcher. Instructions: ("one", test), ("at", test of (name, position)), ("look", negated, end), ("split", to),
    # ("jump", to), ("done",). A look's own program follows it and ends in "done"; `end` is what follows that.

    def _run(self, start: int, name: str, at: Iterable[int], deadline: float) -> bool:
        pending = [(start, position) for position in at]
        seen = set(pending)
        while pending:
            if not len(seen) & 4095 and time.perf_counter() > deadline:
                self._refuse("takes too long to match")
            pc, position = pending.pop()
            kind, *args = self._program[pc]
            following: tuple[tuple[int, int], ...] = ((pc + 1, position),)
            if kind == "done":
                return True
            if kind == "one":
                inside = position < len(name) and args[0](name[position])
                following = ((pc + 1, position + 1),) if inside else ()
            elif kind == "at":
                following = following if args[0](name, position) else ()
            elif kind == "look":
                ahead = self._run(pc + 1, name, (position,), deadline)
                following = ((args[1], position),) if ahead != args[0] else ()
            elif kind == "split":
                following = ((pc + 1, position), (args[0], position))
            elif kind == "jump":
                following = ((args[0], position),)
            for state in following:
                if state not in seen:
                    seen.add(state)
                    pending.append(state)
        return False

    def _compile(self) -> None:
        if self._tree.state.flags & (re.IGNORECASE | re.ASCII | re.LOCALE | re.MULTILINE):
            self._refuse("has too many ways to match for one with flags")
        try:
            self._emit_all(self._tree)
        except UsageError:
            self._program.clear()
            raise
        self._program.append(("done",))

    def _emit_all(self, tree: _Tree) -> None:
        for kind, arg in tree:
            if len(self._program) > _MAX_PROGRAM:
                self._refuse("repeats too much")
            self._emit(kind, arg)

    def _emit(self, kind: Any, arg: Any) -> None:
        program = self._program
        if kind in _ONE:
            program.append(("one", _ONE[kind](arg)))
        elif kind is op.AT and arg in _AT:
            program.append(("at", _AT[arg]))
        elif kind is op.SUBPATTERN and not arg[1]:
            self._emit_all(arg[3])
        elif kind in (op.ASSERT, op.ASSERT_NOT) and arg[0] == 1:
            here = self._hold()
            self._emit_all(arg[1])
            program.append(("done",))
            program[here] = ("look", kind is op.ASSERT_NOT, len(program))
        elif kind is op.BRANCH:
            self._branch(arg[1])
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            self._repeat(*arg)
        else:
            self._refuse("has too many ways to match")

    def _hold(self) -> int:
        """A place for an instruction whose target is not known yet."""
        self._program.append(())
        return len(self._program) - 1

    def _branch(self, alternatives: list[_Tree]) -> None:
        ends = []
        for tree in alternatives[:-1]:
            here = self._hold()
            self._emit_all(tree)
            ends.append(self._hold())
            self._program[here] = ("split", len(self._program))
        self._emit_all(alternatives[-1])
        for end in ends:
            self._program[end] = ("jump", len(self._program))

    def _repeat(self, low: int, high: Any, body: _Tree) -> None:
        for _ in range(low):
            self._emit_all(body)
            if len(self._program) > _MAX_PROGRAM:
                self._refuse("repeats too much")
        if high is op.MAXREPEAT:
            here = self._hold()
            self._emit_all(body)
            self._program.append(("jump", here))
            self._program[here] = ("split", len(self._program))
            return
        optional = []
        for _ in range(int(high) - low):
            optional.append(self._hold())
            self._emit_all(body)
            if len(self._program) > _MAX_PROGRAM:
                self._refuse("repeats too much")
        for here in optional:
            self._program[here] = ("split", len(self._program))


def _choices(tree: _Tree, length: int) -> float:
    """An upper bound on the ways a backtracking matcher may try on `length` characters."""
    ways = 1.0
    for kind, arg in tree:
        if kind is op.BRANCH:
            ways *= sum(_choices(alternative, length) for alternative in arg[1])
        elif kind is op.SUBPATTERN:
            ways *= _choices(arg[3], length)
        elif kind in (op.ASSERT, op.ASSERT_NOT):
            ways *= _choices(arg[1], length)
        elif kind is op.ATOMIC_GROUP:
            ways *= _choices(arg, length)
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
            low, high, body = arg
            inner = _choices(body, length)
            # A body with more than one way, again and again: exponential.
            times = min(int(high), length + 1)
            ways *= (min(int(high) - low, length) + 1) * (inner if times <= 1 or inner == 1 else float("inf"))
        elif kind is op.GROUPREF_EXISTS:
            ways *= _choices(arg[1], length) + _choices(arg[2] or (), length)
    return ways


def _literal(code: int) -> _Test:
    char = chr(code)
    return lambda c: c == char


def _other(code: int) -> _Test:
    char = chr(code)
    return lambda c: c != char


def _any(_: Any) -> _Test:
    return lambda c: c != "\n"


def _set(items: list[tuple[Any, Any]]) -> _Test:
    negated = items[0][0] is op.NEGATE
    tests = [_member(kind, arg) for kind, arg in items if kind is not op.NEGATE]
    return lambda c: any(test(c) for test in tests) != negated


def _member(kind: Any, arg: Any) -> _Test:
    if kind is op.RANGE:
        low, high = arg
        return lambda c: low <= ord(c) <= high
    return _CATEGORY[arg] if kind is op.CATEGORY else _literal(arg)


def _is_word(c: str) -> bool:
    return c.isalnum() or c == "_"


def _at_boundary(name: str, at: int) -> bool:
    before = at > 0 and _is_word(name[at - 1])
    after = at < len(name) and _is_word(name[at])
    return before != after


def _at_end(name: str, at: int) -> bool:
    return at == len(name) or (at == len(name) - 1 and name[at] == "\n")


_ONE: dict[Any, Callable[[Any], _Test]] = {
    op.LITERAL: _literal,
    op.NOT_LITERAL: _other,
    op.ANY: _any,
    op.IN: _set,
}

_CATEGORY: dict[Any, _Test] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_WORD: _is_word,
    op.CATEGORY_NOT_WORD: lambda c: not _is_word(c),
}

_AT: dict[Any, Callable[[str, int], bool]] = {
    op.AT_BEGINNING: lambda name, at: at == 0,
    op.AT_BEGINNING_STRING: lambda name, at: at == 0,
    op.AT_END: _at_end,
    op.AT_END_STRING: lambda name, at: at == len(name),
    op.AT_BOUNDARY: _at_boundary,
    op.AT_NON_BOUNDARY: lambda name, at: not _at_boundary(name, at),
}
