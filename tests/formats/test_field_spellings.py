"""Configs that people and their scripts have edited: numbers and truths in other spellings say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.floats import block, deepseek_config
from support.ints import (
    DOWN,
    Pico,
    Tensors,
    awq_config,
    convert,
    ct_config,
    gptq,
    gptq_config,
    ints,
    pack_quantized,
    refusal,
    unpacked,
)

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.sources.open import open_source
from xpuquant.errors import DamagedError, UsageError
from xpuquant.formats.readers.spellings import number_said, numbers_said, same, truth

SPELT: dict[str, Callable[[Any], Any]] = {"strings": str, "floats": float, "strings of floats": lambda n: str(float(n))}

_NUMBERS = ("bits", "num_bits", "group_size", "weight_block_size", "block_structure")
_TRUTHS = ("sym", "desc_act", "zero_point", "symmetric")


def respelt(value: Any, number: Callable[[Any], Any]) -> Any:
    """A config with its numbers and truths spelt otherwise, at any depth."""
    if isinstance(value, dict):
        return {
            key: [number(side) for side in member]
            if key in _NUMBERS and isinstance(member, list)
            else number(member)
            if key in _NUMBERS and member is not None
            else str(member)
            if key in _TRUTHS and isinstance(member, bool)
            else respelt(member, number)
            for key, member in value.items()
        }
    return value


DYNAMIC = {"+:.*down_proj": {"bits": 8, "group_size": 64}}
EXTRA = {"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": 64, "sym": True}, ".*": {"bits": 16}}

CASES: dict[str, tuple[dict[str, Any], Tensors]] = {
    "gptq": (gptq_config(), gptq(ints())),
    "gptq, asymmetric": (gptq_config(sym=False), gptq(ints(symmetric=False))),
    "gptq, dynamic": (gptq_config(dynamic=DYNAMIC), gptq(ints(8, K=128, group=64))),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 2, "group_size": 32, "sym": True, "extra_config": EXTRA},
        gptq(ints(K=128, group=64), v1=True),
    ),
    "pack-quantized": (ct_config(), pack_quantized(ints(), zeros="none")),
    "pack-quantized, asymmetric": (ct_config(symmetric=False), pack_quantized(ints(symmetric=False))),
    "int-quantized, 4 bits": (ct_config(format="int-quantized"), unpacked(ints())),
    "fp8 in ragged blocks": (
        deepseek_config(),
        {"weight": block(208, 256).fp8, "weight_scale_inv": block(208, 256).scales},
    ),
    "int8 in ragged blocks": (
        {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]},
        {"weight": block(208, 256).codes.view(np.int8), "weight_scale_inv": block(200, 256, scale=np.float32).scales},
    ),
}


@pytest.mark.parametrize("spelt", SPELT)
@pytest.mark.parametrize("case", CASES)
def test_numbers_and_truths_are_read_in_any_spelling(case: str, spelt: str, tmp_path: Path) -> None:
    config, tensors = CASES[case]
    outcomes = []
    for number, said in enumerate((config, respelt(config, SPELT[spelt]))):
        source = Pico(said, {DOWN: tensors}).write(tmp_path / f"in{number}")
        converted = convert(source, tmp_path / f"out{number}")
        outcomes.append((converted.facts(DOWN), converted.values(DOWN)))
    assert outcomes[0][0] == outcomes[1][0] and np.array_equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("spelt", SPELT)
def test_two_places_that_say_the_same_in_two_spellings_agree(spelt: str, tmp_path: Path) -> None:
    config = awq_config()
    source = Pico(config, {DOWN: gptq(ints())}, config={"text_config": {"quantization_config": config}})
    source.write(tmp_path)
    said = respelt(config, SPELT[spelt])
    (tmp_path / "quantize_config.json").write_text(json.dumps(said))
    inner = json.loads((tmp_path / "config.json").read_text())
    inner["text_config"]["quantization_config"] = said
    (tmp_path / "config.json").write_text(json.dumps(inner))
    assert not open_source(str(tmp_path)).checkpoint.notes


@pytest.mark.parametrize("bits", ["four", "4.5", 4.5, True, [4], "", "1e1"])
def test_what_is_no_number_is_named(bits: Any, tmp_path: Path) -> None:
    assert number_said(bits) is None
    assert "'bits' is" in refusal(tmp_path / "a", Pico(gptq_config(bits=bits), {DOWN: gptq(ints())}), UsageError)
    config = ct_config()
    config["config_groups"]["group_0"]["weights"]["num_bits"] = bits
    said = refusal(tmp_path / "b", Pico(config, {DOWN: pack_quantized(ints(), zeros="none")}), UsageError)
    assert "'num_bits' is" in said


def test_what_says_the_same() -> None:
    assert (
        same(4, "4") and same("4.0", 4) and same([128, 128], ["128", 128.0]) and same(True, "true") and same(None, None)
    )
    assert not same(4, 8) and not same(True, 0) and not same(True, "2") and not same("gptq", "gptq_v2")
    assert not same([128, 128], [128]) and not same([128, 64], "128") and not same(None, False)
    assert [truth(value) for value in (True, "False", " yes ", 0, None, "maybe")] == [
        True,
        False,
        True,
        False,
        None,
        None,
    ]
    assert numbers_said(["1", 2.0]) == (1, 2) and numbers_said([1, "x"]) is None and numbers_said("12") is None


def indexed(folder: Path, *shards: str) -> Path:
    """A checkpoint whose index has its file under these paths, one for each tensor."""
    checkpoint = Pico(gptq_config(), {DOWN: gptq(ints())})
    tensors = list(checkpoint.write(folder).checkpoint.tensors)
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    table = {name: shards[number % len(shards)] for number, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def test_paths_of_an_index(tmp_path: Path) -> None:
    """`os.path.join` of loaders takes `./w.safetensors` for what it is."""
    folder = indexed(tmp_path / "a", "./w.safetensors", "w.safetensors", ".//./w.safetensors")
    checkpoint = open_source(str(folder)).checkpoint
    assert make_plan(checkpoint, Options()).modules and not checkpoint.notes
    for number, shard in enumerate(("/w.safetensors", "../w.safetensors", "a/w.safetensors", ".\\w.safetensors")):
        with pytest.raises(DamagedError, match="outside the folder"):
            open_source(str(indexed(tmp_path / f"b{number}", shard)))
