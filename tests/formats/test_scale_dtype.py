"""--scale-dtype in the plan: each layout says whether it rounded scales, and where a kernel keeps them as they are."""

from __future__ import annotations

import pytest
from support.checkpoints import FIXTURES

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.errors import UnsupportedError
from xpuquant.formats.dtypes import FLOATS, rounds
from xpuquant.formats.layouts.base import Conversion

KEPT = "whatever --scale-dtype says"


def planned(name: str, family: str, scale_dtype: str | None) -> Plan:
    source = LocalSource(FIXTURES / name)
    try:
        return make_plan(source.checkpoint, Options(layout=family, scale_dtype=scale_dtype))
    except UnsupportedError:
        pytest.skip("refused")


def says_kept(conversion: Conversion) -> bool:
    return any(KEPT in fact for fact in conversion.facts)


@pytest.mark.parametrize("family", ["xpu", "compressed-tensors"])
@pytest.mark.parametrize("name", sorted(path.parent.name for path in FIXTURES.glob("*/config.json")))
def test_scales_are_in_the_dtype_asked_for_or_the_report_says_why_not(name, family):
    before = planned(name, family, None).modules
    assert not any(module.conversion.rounded or says_kept(module.conversion) for module in before)
    for asked in FLOATS:
        for old, new in zip(before, planned(name, family, asked).modules, strict=True):
            was, now = old.conversion, new.conversion
            assert was.scheme is not None and now.scheme is not None
            assert (now.scheme.scale_dtype == asked) is not says_kept(now)
            changed = was.scheme.scale_dtype in FLOATS and rounds(was.scheme.scale_dtype, asked)
            assert now.rounded == (asked if changed and not says_kept(now) else None)


@pytest.mark.parametrize(
    ("source", "asked", "changes"),
    [
        ("F16", "BF16", True),
        ("BF16", "F16", True),
        ("F32", "BF16", True),
        ("F16", "F32", False),
        ("BF16", "BF16", False),
        ("F8_E8M0", "BF16", False),
        ("F8_E8M0", "F16", True),
    ],
)
def test_a_cast_rounds_where_the_target_lacks_a_value_of_the_source(source, asked, changes):
    assert rounds(source, asked) is changes
