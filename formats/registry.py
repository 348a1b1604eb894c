"""Finds readers and layouts: a module of this folder with a `READER` or a `LAYOUT` is one.

So that adding a format is adding a file. Modules whose names begin with an underscore are not looked at.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import xpuquant.formats

if TYPE_CHECKING:
    from xpuquant.formats.layout import Layout
    from xpuquant.formats.reader import Reader


@cache
def _modules() -> tuple[object, ...]:
    names = sorted(found.name for found in pkgutil.iter_modules(xpuquant.formats.__path__))
    return tuple(import_module(f"xpuquant.formats.{name}") for name in names if not name.startswith("_"))


def readers() -> tuple[Reader, ...]:
    """Every source format, in alphabetical order of its file; their claims do not overlap."""
    return tuple(module.READER for module in _modules() if hasattr(module, "READER"))


@cache
def layouts(family: str | None = None) -> Mapping[str, Layout]:
    """Every layout by name, or those of one `--layout`."""
    found = (module.LAYOUT for module in _modules() if hasattr(module, "LAYOUT"))
    return {layout.name: layout for layout in found if family in (None, layout.family)}
