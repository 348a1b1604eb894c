"""The reference of the site shows every field of every class that it names: scripts/lanes/field_lists.py."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest

import xpuquant

griffe = pytest.importorskip("griffe", reason="griffe is not installed: it comes with the extra docs")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lists() -> ModuleType:
    path = ROOT / "scripts" / "lanes" / "field_lists.py"
    spec = importlib.util.spec_from_file_location("field_lists", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results() -> Iterator[type]:
    """Every class at the top of the package that has fields."""
    for name in xpuquant.__all__:
        found = getattr(xpuquant, name)
        if inspect.isclass(found) and is_dataclass(found):
            yield found


@pytest.mark.parametrize("found", list(results()), ids=lambda found: found.__name__)
def test_every_field_stands_by_itself(found: type, lists: ModuleType) -> None:
    text, described = lists.separated(inspect.cleandoc(found.__doc__ or ""))
    held = {field.name for field in fields(found)}  # type: ignore[arg-type]
    assert described.keys() <= held | set(dir(found))
    assert not [line for line in text if re.match(r"\w+(, \w+)* {2,}\S", line)]
    assert all(described.values())


def test_a_class_as_the_site_shows_it(lists: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    code = '''
class Shown:
    """A thing.

    a, b   two things
    c      a third, whose description
           goes on
    gone   no field

    Raises:
        ValueError: sometimes.
    """

    a: int
    b: int = 2
    c: str
    d: str

    @property
    def e(self) -> int:
        """A property."""
'''
    module = griffe.visit("m", ROOT / "m.py", code)
    lists.FieldLists().on_class(cls=module["Shown"])
    sections = module["Shown"].docstring.parse("google")
    rows = next(section.value for section in sections if section.kind.value == "attributes")
    assert {row.name: row.description for row in rows} == {
        "a": "two things",
        "b": "two things",
        "c": "a third, whose description goes on",
        "d": "",
    }
    assert sections[0].value == "A thing." and [str(row.annotation) for row in rows] == ["int", "int", "str", "str"]
    assert "the docstring describes 'gone', which is no field" in caplog.text
    assert "raises" in [section.kind.value for section in sections]
