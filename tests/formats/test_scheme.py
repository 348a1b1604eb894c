"""`quantization_config` of a converted repo: what is written is read back; later keys do not disturb earlier repos."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from xpuquant.errors import DamagedError
from xpuquant.formats.layouts import Layout, layouts_by_name
from xpuquant.formats.scheme import Scheme, from_config, to_config

FP8 = Scheme("fp8_linear", granularity="channel", scale_dtype="F32")
E5M2 = replace(FP8, weight_dtype="F8_E5M2")


def entry(scheme: Scheme) -> dict[str, Any]:
    (written,) = to_config({"m": scheme}, "tests")["schemes"]
    return dict(written)


def test_the_type_of_fp8_weights_is_written_where_it_is_not_the_usual_one() -> None:
    assert "weight_dtype" not in entry(FP8)
    assert entry(E5M2)["weight_dtype"] == "F8_E5M2"


@pytest.mark.parametrize("scheme", [FP8, E5M2, Scheme("int4_linear", group_size=32)])
def test_what_is_written_is_read_back(scheme: Scheme) -> None:
    config = to_config({"a.0.m": scheme, "a.1.m": scheme}, "tests")
    assert from_config(config) == {"a.0.m": scheme, "a.1.m": scheme}


def test_both_types_in_one_repo() -> None:
    modules = {"a": FP8, "b": E5M2}
    assert from_config(to_config(modules, "tests")) == modules


@pytest.mark.parametrize("value", ["F8_E3M4", "e5m2", "", 5])
def test_another_type_is_refused(value: object) -> None:
    config = to_config({"m": FP8}, "tests")
    config["schemes"][0]["weight_dtype"] = value
    with pytest.raises(DamagedError, match="'weight_dtype' is"):
        from_config(config)


@pytest.mark.parametrize("layout", layouts_by_name().values(), ids=lambda layout: layout.name)
def test_every_layout_names_the_kernel_that_reads_it(layout: Layout) -> None:
    assert layout.kernel and layout.kernel != layout.name
