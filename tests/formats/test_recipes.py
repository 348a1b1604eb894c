"""Recipes: the inputs of a range serve every range inside it, and decoding does without the conversion's loops."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from support.checkpoints import FIXTURES
from support.ints import DOWN, Ints, Pico, ct_config, ints, pack_quantized

from xpuquant.conversion.sources.base import Source, read_slice
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.formats import packing
from xpuquant.formats.checkpoint import rows
from xpuquant.formats.layouts.modules import gather_modules
from xpuquant.formats.readers.reading import read
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Recipe, Weight, all_inputs, deal
from xpuquant.formats.weights.decoded import difference
from xpuquant.formats.weights.integers import IntWeight
from xpuquant.formats.weights.packed import rows_difference, unpacked_rows
from xpuquant.formats.weights.parts import IntRows, JoinedIntRows, RowStride, join_rows, split_gate_up

NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))


def matrices(source: Source) -> list[Weight]:
    """One matrix of each kind and role, as they stand in the modules."""
    found: dict[tuple[str, str, type], Weight] = {}
    reading = read(source.checkpoint)
    if reading.refused:
        return list(reading.weights[:1])
    for module in gather_modules(source.checkpoint, reading.weights):
        for role, _, weight in module.matrices():
            found.setdefault((weight.kind, role, type(weight)), weight)
    return list(found.values())


def made(source: Source, recipe: Recipe):
    return recipe.build([read_slice(source, part) for part in recipe.inputs])


@pytest.mark.parametrize("name", NAMES)
def test_the_inputs_of_a_range_serve_the_ranges_inside_it(name):
    source = LocalSource(FIXTURES / name)
    for weight in matrices(source):
        outer = weight.decoded(0, weight.N)
        arrays = [read_slice(source, part) for part in outer.inputs]
        whole = outer.build(arrays).values()
        half = weight.N // 2 // 32 * 32
        for start, stop in ((0, half), (half, weight.N)):
            inner = weight.decoded(start, stop)
            both = zip(inner.inputs, outer.inputs, arrays, strict=True)
            narrowed = [part.inside(of, array) for part, of, array in both]
            if start < stop:
                assert np.array_equal(inner.build(narrowed).values(), whole[start:stop], equal_nan=True)


@pytest.fixture
def without_loops(monkeypatch):
    """The conversion's compiled loops cannot be imported."""
    nothing = ModuleType("xpuquant.formats.packing.convert_loops")
    monkeypatch.setitem(sys.modules, nothing.__name__, nothing)
    monkeypatch.setattr(packing, "convert_loops", nothing, raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_uses_nothing_of_the_fast_path(name, without_loops):
    source = LocalSource(FIXTURES / name)
    for weight in matrices(source):
        assert made(source, weight.decoded(0, weight.N)).codes.shape == (weight.N, weight.K)


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_mean_what_the_decoded_ones_do(name, without_loops):
    source = LocalSource(FIXTURES / name)
    for weight in matrices(source):
        for start in range(0, weight.N, 32):
            stop = min(start + 32, weight.N)
            packed = unpacked_rows(made(source, weight.as_packed(start, stop)))
            decoded = made(source, weight.decoded(start, stop))
            if packed.number == decoded.number:
                assert difference(decoded, packed) is None
            else:  # NVFP4 is compared as the integers that it becomes
                assert np.array_equal(packed.values(), decoded.values())


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_compared_as_they_lie_differ_where_the_upright_ones_do(name, without_loops):
    source, seed = LocalSource(FIXTURES / name), np.random.default_rng(0)
    for weight in matrices(source):
        for start in range(0, weight.N, 32):
            stop = min(start + 32, weight.N)
            packed = made(source, weight.as_packed(start, stop))
            lying = made(source, weight.as_compared(start, stop))
            assert rows_difference(lying, packed) is None
            codes = packed.codes.copy()
            place = tuple(seed.integers(codes.shape))
            codes.view(f"u{codes.itemsize}")[place] ^= 1
            spoilt = replace(packed, codes=codes)
            assert rows_difference(lying, spoilt) == rows_difference(packed, spoilt) is not None


def test_the_fast_path_does_need_its_loops(without_loops):
    source = LocalSource(FIXTURES / "gptqmodel-qwen3moe-w4g32")
    weight = matrices(source)[0]
    assert isinstance(weight, IntWeight)
    with pytest.raises(ImportError):
        words(source, weight, 0, weight.N)


def two_matrices(folder, first: Ints, second: Ints) -> tuple[Source, IntWeight, IntWeight]:
    """Asymmetric matrices as a compressed-tensors source has them."""
    up = DOWN.replace("down", "up")
    tensors = {name: pack_quantized(weight) for name, weight in ((DOWN, first), (up, second))}
    source = Pico(ct_config(symmetric=False), tensors).write(folder / "in")
    a, b = read(source.checkpoint).weights
    assert isinstance(a, IntWeight) and isinstance(b, IntWeight)
    return source, a, b


def words(source: Source, weight: IntWeight, start: int, stop: int):
    recipe, out = weight.words(start, stop), np.empty((stop - start, weight.K // 8), np.uint32)
    recipe.build([read_slice(source, part) for part in recipe.inputs], out)
    return out


def test_joined_rows_have_the_words_scales_and_zero_points_of_both(tmp_path):
    source, a, b = two_matrices(tmp_path, ints(symmetric=False, seed=1), ints(symmetric=False, seed=2))
    joined = join_rows("both", a, b, "joined")
    assert isinstance(joined, JoinedIntRows) and joined.N == 32 and joined.has_zero_points
    assert np.array_equal(words(source, joined, 0, 32), np.concatenate([words(source, each, 0, 16) for each in (a, b)]))
    assert np.array_equal(words(source, joined, 8, 24), words(source, joined, 0, 32)[8:24])
    assert np.array_equal(words(source, joined, 16, 32), words(source, b, 0, 16))
    for take in (lambda weight: weight.scales(), lambda weight: weight.zeros(0, weight.N)):
        separate = [made(source, take(each)) for each in (a, b)]
        assert np.array_equal(made(source, take(joined)), np.concatenate(separate, axis=1))
    assert np.array_equal(made(source, joined.zeros(8, 24)), made(source, joined.zeros(0, 32))[:, 8:24])


def test_a_joined_matrix_without_zero_points_counts_as_eight(tmp_path):
    source, a, b = two_matrices(tmp_path, ints(symmetric=False, seed=1), ints(seed=2))
    joined = join_rows("both", a, b, "joined")
    assert isinstance(joined, JoinedIntRows) and not b.has_zero_points
    assert (made(source, joined.zeros(16, 32)) == 8).all()


def test_some_rows_have_their_words_scales_and_zero_points(tmp_path):
    source, fused, _ = two_matrices(tmp_path, ints(symmetric=False, seed=1), ints(seed=2))
    assert split_gate_up(fused, alternating=True) == "fused gate and up rows with zero points"
    odd = IntRows(
        **{**{name: getattr(fused, name) for name in IntWeight.__dataclass_fields__}, "N": 8},
        fused=fused,
        stride=RowStride(1, 2),
    )
    assert np.array_equal(words(source, odd, 2, 6), words(source, fused, 0, 16)[1::2][2:6])
    assert np.array_equal(made(source, odd.scales()), made(source, fused.scales())[:, 1::2])
    assert np.array_equal(made(source, odd.zeros(2, 6)), made(source, fused.zeros(0, 16))[:, 1::2][:, 2:6])
    assert np.array_equal(
        made(source, odd.decoded(2, 6)).values(), made(source, fused.decoded(0, 16)).values()[1::2][2:6]
    )


def test_arrays_are_dealt_in_order():
    parts = [rows(Tensor(name, "U8", (4,), "", 0, 4), 0, 4) for name in "abc"]
    recipes = [Recipe(tuple(inputs), len) for inputs in (parts[:2], parts[2:])]
    arrays = [np.full(4, i) for i in range(3)]
    assert all_inputs(recipes) == tuple(parts)
    assert [[int(array[0]) for array in mine] for mine in deal(recipes, arrays)] == [[0, 1], [2]]
