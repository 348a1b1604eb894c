"""Slices read from a shard are those of its tensors, however far apart their runs lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpuquant.conversion.sources.shard_reader import ShardReader
from xpuquant.conversion.tree import Tree
from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import columns, rows
from xpuquant.formats.safetensors import build_header


def written(folder: Path, shape: tuple[int, int]) -> tuple[ShardReader, np.ndarray]:
    """A shard of one tensor of random bytes, at the end of the file."""
    values = np.random.default_rng(0).integers(0, 1 << 32, shape, np.uint32).view(np.int32)
    (folder / "model.safetensors").write_bytes(
        build_header([("w", "I32", shape, values.nbytes)], {}) + values.tobytes()
    )
    return ShardReader(Tree(folder), ("model.safetensors",)), values


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 700),  # more than are read at once
    st.sampled_from([1, 2, 500, 4095, 4096, 4097, 6000]),  # around the distance that is read through
    st.data(),
)
def test_rows_and_columns_of_any_distance(tmp_path_factory, height, width, data):
    reader, values = written(tmp_path_factory.mktemp("shard"), (height, width))
    tensor = reader.header("model.safetensors")["w"]
    for cut, size, of in ((columns, width, values), (rows, height, values.T)):
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        expected = of[:, start:stop] if cut is columns else of[:, start:stop].T
        assert np.array_equal(reader.read(cut(tensor, start, stop)), expected)
    reader.close()


@pytest.mark.parametrize("width", [16, 6000])
def test_a_shard_that_became_shorter_is_named(tmp_path, width):
    reader, _ = written(tmp_path, (40, width))
    tensor = reader.header("model.safetensors")["w"]
    shard = tmp_path / "model.safetensors"
    reader.read(columns(tensor, width - 1, width))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    with pytest.raises(DamagedError, match=r"model\.safetensors: is truncated inside 'w'; download it again"):
        reader.read(columns(tensor, width - 1, width))
    reader.read(columns(tensor, 0, 1))
