"""Regular expressions of strangers: the same answers as `re`, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.patterns import EVIL

from xpuquant.errors import UsageError
from xpuquant.formats.readers.patterns import Pattern, matches, searches

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


@pytest.mark.parametrize("pattern", EVIL)
@pytest.mark.parametrize("name", ["a" * 60 + "!", "a" * 1000 + "!"])
def test_exploding_patterns_end(pattern: str, name: str) -> None:
    began = time.process_time()
    assert matches(pattern, name) is False or pattern.startswith("(?!")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("(" * 2000 + "a" + ")" * 2000, "not a regular expression"),
        ("a" * 5000, "has 5000 characters"),
        ("((a{1,1000}){1,1000}){1,1000}$", "repeats too much"),
        (r"(a)(\1|b)*(.*)*$", "too many ways"),
        ("(?i)(a|A)*(.*)*$", "too many ways"),
        ("a{99999999999999999999}", "not a regular expression"),
    ],
)
def test_refused_in_one_line(pattern: str, message: str) -> None:
    for _ in range(2):  # the same answer when it is asked again
        with pytest.raises(UsageError, match=message) as raised:
            matches(pattern, "a" * 100 + "!")
        assert str(raised.value).isprintable() and len(str(raised.value)) < 400


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
    ]
)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeats = st.sampled_from(["*", "+", "?", "{1,2}", "{0,3}", "{2}", "*?", "+?", "??"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, repeats).map(lambda two: f"(?:{two[0]}){two[1]}"),
        st.tuples(st.sampled_from("=!"), inner, inner).map(lambda three: f"(?{three[0]}{three[1]}){three[2]}"),
    )


@settings(max_examples=500)
@given(st.recursive(ATOMS, larger, max_leaves=10), st.text("abc1. _", min_size=1, max_size=9))
def test_the_matcher_agrees_with_re(pattern: str, name: str) -> None:
    try:
        wanted = re.match(pattern, name) is not None
    except re.error:
        assume(False)
    compiled = Pattern(pattern)
    compiled._cheap[len(name)] = False  # not to `re`
    assert compiled(name) is wanted
    assert Pattern(pattern)(name) is wanted


def test_searches() -> None:
    assert searches(r"experts\.\d+", NAME) and not searches("vision", NAME)
    assert searches("^model", NAME) and not searches("^layers", NAME)
    assert searches("(?i)MODEL", NAME)
