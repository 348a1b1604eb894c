"""Plans of published models at full width, from headers alone: `scripts/lanes/models` makes docs/models.md of all."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.0")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("models.table")
    sys.path.remove(str(SCRIPTS))


def published(models: Any, name: str, scheme: str) -> Any:
    return next(each for each in models.PUBLISHED if (each.model.name, each.scheme) == (name, scheme))


def test_gpt_oss_20b(models: Any, tmp_path: Path) -> None:
    """13.8 GB, as published (openai/gpt-oss-20b); every expert in the grouped GEMM."""
    one = published(models, "gpt-oss-20b", "gpt-oss mxfp4")
    size = models.write(tmp_path, one)
    assert 13.7e9 < size < 13.9e9
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 10e6, "holes take no disk"
    row = models.planned(tmp_path)
    assert row.refused == [] and row.kernels == ["grouped GEMM mxfp4"]
    assert abs(row.per_gpu["1"] - size) < size / 1000
    assert row.per_gpu["2"] < 0.51 * size and row.expert_parallel == [4, 8]


@pytest.mark.parametrize(
    ("name", "scheme", "kernel"),
    [
        ("Step-3.5-Flash", "fp8 block", "grouped GEMM fp8"),
        ("Qwen3-30B-A3B", "mxfp4", "grouped GEMM mxfp4"),
        ("Qwen3.6-35B-A3B", "gptq int4", "grouped GEMM s4"),
    ],
)
def test_the_first_layers_of_others(models: Any, tmp_path: Path, name: str, scheme: str, kernel: str) -> None:
    models.write(tmp_path, published(models, name, scheme), limit=5)
    row = models.planned(tmp_path)
    assert row.refused == [] and kernel in row.kernels


def test_every_model_has_a_source_and_a_known_scheme(models: Any) -> None:
    for each in models.PUBLISHED:
        assert each.model.source and each.scheme in models.SCHEMES


def test_the_page_names_the_models(models: Any) -> None:
    """docs/models.md is of the last `scripts/lanes/models`, run whole."""
    text = (SCRIPTS.parent / "docs" / "models.md").read_text()
    named = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.count(" | ") == 8}
    assert named - {"model", "---"} == {each.model.name for each in models.PUBLISHED}


def test_what_engines_keep_whole_is_no_obstacle(models: Any, tmp_path: Path) -> None:
    """DeepSeek's `kv_a_proj_with_mqa` has 576 rows, which no two GPUs share in whole blocks: each has all of it."""
    models.write(tmp_path, published(models, "DeepSeek-V3", "fp8 block"), limit=1)
    row = models.planned(tmp_path)
    assert row.why == {} and row.per_gpu["8"] is not None
