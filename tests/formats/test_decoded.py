"""The common form of both ends of a conversion: when two mean the same, however each cuts its scales."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpuquant.formats.weights.decoded import Decoded, difference, distinct_pairs


def test_the_example_of_the_docstring():
    a, b = distinct_pairs(np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 2, 2, 3, 3]))
    assert (a.tolist(), b.tolist()) == ([0, 0, 1, 1], [0, 1, 2, 3])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**31 - 1)), max_size=40))
def test_every_pair_once(pairs):
    a, b = (np.array(side, np.int64) for side in (zip(*pairs, strict=True) if pairs else ((), ())))
    found = list(zip(*(side.tolist() for side in distinct_pairs(a, b)), strict=True))
    assert sorted(found) == sorted(set(pairs)) if sorted(pairs) != pairs else set(found) == set(pairs)


class TestRegroupedScales:
    """Groups of 4 columns on one side, of 2 on the other."""

    source = Decoded("int", np.zeros((2, 8), np.int8), np.array([[1, 2], [3, np.nan]]), np.arange(2), np.arange(8) // 4)
    output = replace(source, scale=np.repeat(source.scale, 2, axis=1), col=np.arange(8) // 2)

    def test_the_same_values_are_no_difference(self):
        assert difference(self.source, self.output) is None
        order = np.array([5, 0, 7, 2, 1, 4, 3, 6])
        shuffled = (replace(side, col=side.col[order]) for side in (self.source, self.output))
        assert difference(*shuffled) is None, "act-order: columns of a group lie apart"

    @pytest.mark.parametrize("value", [2.5, np.inf, np.nan])
    def test_one_other_scale_is_found_and_named(self, value):
        scale = self.output.scale.copy()
        scale[0, 3] = value
        said = difference(self.source, replace(self.output, scale=scale))
        assert said is not None and said.startswith("scale [0, 3] is ") and "source has 2.0 (1 of 8 differ)" in said

    def test_minus_zero_is_another_value(self):
        zero = replace(self.source, scale=np.zeros((2, 2)))
        assert difference(zero, zero) is None
        assert difference(zero, replace(zero, scale=-zero.scale)) is not None
