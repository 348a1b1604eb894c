"""Regular expressions of strangers: the same answers as `re`, or a refusal, in bounded time and memory."""

from __future__ import annotations

import importlib
import re
import time
import warnings
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.patterns import EVIL

from xpuquant.errors import UsageError
from xpuquant.formats.readers import patterns
from xpuquant.formats.readers.patterns import MAX_PATTERNS, Pattern, check_count, matches, searches

PARSER: Any = importlib.import_module("re._parser")
NAME = "model.language_model.layers.17.mlp.experts.113.down_proj"

REAL = {
    r".*\.layers\..*\.(gate|down)_proj$": True,
    r"model\.layers\.0\..*": False,
    r"^(?!.*shared).*experts.*down_proj": True,
    r".*layers\.(?!17\b)\d+\..*": False,
    r".*layers.*mlp.*experts.*down.*": True,
    r"(\w+\.)+down_proj$": True,
    r"(model|vision)\.(\w+\.)*(mlp|self_attn)\.(\w+\.)+(up|down)_proj": True,
    r"model\.(layers|language_model\.layers)\.(1[0-9]|2)\.mlp\.experts\.\d{1,3}\.[a-z]+_proj": True,
}


@pytest.mark.parametrize(("pattern", "found"), REAL.items())
def test_patterns_of_real_configs(pattern: str, found: bool) -> None:
    assert matches(pattern, NAME) is found is (re.match(pattern, NAME) is not None)


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_real_configs_on_many_modules(pattern: str) -> None:
    names = [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in range(20) for e in range(100)]
    began = time.process_time()
    for name in names:
        searches(pattern, name)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("pattern", EVIL)
@pytest.mark.parametrize("name", ["a" * 60 + "!", "a" * 1000 + "!"])
def test_exploding_patterns_end(pattern: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS_PER_NAME", 0.2)
    for ask in (matches, searches):
        began = time.process_time()
        try:
            found = ask(pattern, name)
        except UsageError as error:
            assert "takes too long to match" in str(error) or "repeats too much" in str(error)
        else:
            # `name` lacks a letter of each, or has a `!` before the end; one of them may be empty there.
            assert found is (pattern == r"(a|a?)+$" and ask is searches)
        assert time.process_time() - began < 1


def test_all_names_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name is quick, but there may be a million."""
    monkeypatch.setattr(patterns, "SECONDS_PER_PATTERN", 0.05)
    pattern = Pattern(r"(a|a?)+$")
    with pytest.raises(UsageError, match="to match"):
        for _ in range(100):
            pattern.found("a" * 300 + "!", anywhere=False)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("(" * 2000 + "a" + ")" * 2000, "not a regular expression"),
        ("a" * 5000, "has 5000 characters"),
        ("((a{1,1000}){1,1000}){1,1000}$", "repeats too much"),
        ("((a{1000}){1000}){1000}", "repeats too much"),
        ("(" * 300 + "a" + ")*" * 300, "too many ways"),
        ("a{99999999999999999999}", "not a regular expression"),
        # What only the `regex` library understands is refused, as `re` refuses it.
        (r"\p{L}", "not a regular expression"),
        (r"\X", "not a regular expression"),
        ("(?V1)[a--b]", "not a regular expression"),
        ("(?r)a", "not a regular expression"),
        ("(?|(a)|(b))", "not a regular expression"),
        ("(?R)", "not a regular expression"),
        ("(a)(?1)", "not a regular expression"),
        # What the two read differently is refused where `re` might not end.
        ("([[:alpha:]]+)+$", "too many ways"),
        ("(a+)+{e<=1}$", "too many ways"),
        ("(?x)(a+) {1, 9}$", "too many ways"),
        ("(é+)+$", "too many ways"),
    ],
)
def test_refused_in_one_line(pattern: str, message: str) -> None:
    for _ in range(2):  # the same answer when it is asked again
        with pytest.raises(UsageError, match=message) as raised:
            matches(pattern, "a" * 100 + "!")
        assert str(raised.value).isprintable() and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "pattern",
    [
        "[[:alpha:]]",
        "[[:alpha:]]+",
        "[a[:digit:]b]+",
        "a{e<=1}",
        "a{i}",
        "[a~~b]",
        "[a&&b]",
        "[[a]b]",
        r"\w+$",
        "(?i)I$",
    ],
)
@pytest.mark.parametrize("name", ["a", "ah]", "[:h]", "a{e<=1}", "a{i}", "-", "&", "[b]", "a²", "e\u0301", "ı", "İ"])
def test_what_the_two_libraries_read_differently_is_what_re_says(pattern: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = re.compile(pattern)
    assert matches(pattern, name) is (wanted.match(name) is not None)
    assert searches(pattern, name) is (wanted.search(name) is not None)


def test_a_name_beyond_ascii_and_a_pattern_that_may_explode() -> None:
    with pytest.raises(UsageError, match="beyond ASCII"):
        matches(r"(\w+\.)+x$", "model.é.x")


def test_a_config_has_so_many() -> None:
    check_count("targets", MAX_PATTERNS)
    with pytest.raises(UsageError, match="'targets' has 4097 regular expressions, at most 4096 are read"):
        check_count("targets", MAX_PATTERNS + 1)


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\d",
        r"\w",
        r"\s",
        r"\D",
        r"\W",
        "[ab]",
        "[^a]",
        "[a-c1]",
        r"[^\d.]",
        "1",
        r"\.",
        "$",
        "^",
        r"\b",
        r"\B",
        r"\A",
        r"\Z",
        "[[a]",
        "[]a]",
        "[a-]",
        "(?<=a)",
        "(?<!b)",
    ]
)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeats = st.sampled_from(["*", "+", "?", "{1,2}", "{0,3}", "{2}", "{,2}", "*?", "+?", "??", "*+", "{1,2}+"])
    groups = st.sampled_from(["(?=", "(?!", "(?>", "(?:", "(?i:", "(?s:", "(", "(?:a|"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, repeats).map(lambda two: f"(?:{two[0]}){two[1]}"),
        st.tuples(groups, inner, inner).map(lambda three: f"{three[0]}{three[1]}){three[2]}"),
        inner.map(lambda one: rf"({one})\1"),
        st.tuples(inner, inner).map(lambda two: f"({two[0]})?(?(1){two[1]}|b)"),
    )


def asks_an_open_group(parsed: Any, inside: tuple[int, ...] = ()) -> bool:
    """Whether a conditional asks for the group that it lies in: what `re` answers depends on what it tried before."""
    if isinstance(parsed, PARSER.SubPattern | list | tuple):
        items = list(parsed)
        if len(items) == 2 and str(items[0]) == "GROUPREF_EXISTS" and items[1][0] in inside:
            return True
        if len(items) == 2 and str(items[0]) == "SUBPATTERN":
            inside = (*inside, items[1][0])
        return any(asks_an_open_group(item, inside) for item in items)
    return False


@settings(max_examples=1000)
@given(
    st.sampled_from(["", "", "(?i)", "(?s)", "(?m)", "(?a)"]),
    st.recursive(ATOMS, larger, max_leaves=10),
    st.text("abcA1. _[]{", min_size=1, max_size=9),
)
def test_the_matcher_agrees_with_re(flags: str, pattern: str, name: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = re.compile(flags + pattern)
            assume(not asks_an_open_group(PARSER.parse(flags + pattern)))
        answers = {False: wanted.match(name) is not None, True: wanted.search(name) is not None}
    except (re.error, SystemError):  # SystemError: "please report a bug for the re module"
        assume(False)
    compiled = Pattern(flags + pattern)
    for anywhere, answer in answers.items():
        assert compiled.found_in_time(name, anywhere=anywhere) is answer
        assert compiled.found(name, anywhere=anywhere) is answer


def test_searches() -> None:
    assert searches(r"experts\.\d+", NAME) and not searches("vision", NAME)
    assert searches("^model", NAME) and not searches("^layers", NAME)
    assert searches("(?i)MODEL", NAME)
