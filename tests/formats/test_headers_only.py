"""What is planned where small tensors cannot be read: what the config says, and said so in the facts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.ints import DOWN, Pico, awq, awq_config, ct_config, gptq, gptq_config, ints, pack_quantized

from xpuquant.errors import UnsupportedError
from xpuquant.formats.readers.reading import read


def blind(checkpoint: Pico, folder):
    """Its weight, or the reason why not, without a look at any value."""
    source = checkpoint.write(folder)
    reading = read(replace(source.checkpoint, peek=lambda tensor: None))
    if reading.refused:
        raise UnsupportedError(reading.refused[DOWN])
    return reading.weights[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_symmetry_is_the_configs(tmp_path, symmetric):
    weight = ints(symmetric=symmetric)
    sources = [
        Pico(gptq_config(sym=symmetric), {DOWN: gptq(weight)}),
        Pico(awq_config(zero_point=not symmetric), {DOWN: awq(weight)}),
        Pico(ct_config(symmetric=symmetric), {DOWN: pack_quantized(weight)}),
    ]
    for number, checkpoint in enumerate(sources):
        found = blind(checkpoint, tmp_path / str(number))
        assert found.symmetric == symmetric
        assert "as the config says" in "; ".join(found.facts)


def test_columns_are_in_order_unless_the_config_says_otherwise(tmp_path):
    found = blind(Pico(gptq_config(), {DOWN: gptq(ints())}), tmp_path / "a")
    assert "columns in order, as the config says" in found.facts
    with pytest.raises(UnsupportedError, match="decides the column order and cannot be read from headers alone"):
        blind(Pico(gptq_config(desc_act=True), {DOWN: gptq(ints(act_order=True))}), tmp_path / "b")
    tensors = pack_quantized(ints(act_order=True), zeros="none")
    with pytest.raises(UnsupportedError, match="decides the column order and cannot be read from headers alone"):
        blind(Pico(ct_config(), {DOWN: tensors}), tmp_path / "c")


def test_a_bias_nobody_looked_at_passes_through(tmp_path):
    plain = {f"{DOWN}.bias": np.zeros(16, np.float16)}
    found = blind(Pico(gptq_config(), {DOWN: gptq(ints())}, plain), tmp_path)
    assert "the architecture has no bias here: passed through unseen" in found.facts


def test_k_is_what_fills_the_words(tmp_path):
    assert blind(Pico(ct_config(), {DOWN: pack_quantized(ints(K=96), zeros="none")}), tmp_path).K == 96
