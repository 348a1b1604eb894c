"""`xpuquant diff`: what differs, and that nothing else is said to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.checkpoints import FIXTURES

from xpuquant.conversion.cli.app import run

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.qweight": np.arange(8, dtype=np.int32),
    "c.scale": np.ones((2, 2), ml_dtypes.bfloat16),
    "d.scalar": np.array(1.5, np.float64),
    "e.flags": np.array([True, False]),
}


def write(path: Path, tensors: dict[str, np.ndarray]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return str(path)


def diff(a: str, b: str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    code = run(["diff", a, b, "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def test_equal_whatever_the_sharding(tmp_path, capsys):
    one = write(tmp_path / "one.safetensors", TENSORS)
    names = sorted(TENSORS)
    for i, part in enumerate((names[:2], names[2:]), 1):
        write(tmp_path / "two" / f"model-0000{i}-of-00002.safetensors", {name: TENSORS[name] for name in part})
    code, said = diff(one, str(tmp_path / "two"), capsys)
    assert code == 0 and said["equal"] is True and said["same"] == len(TENSORS)


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_one_value_of_any_dtype(name, tmp_path, capsys):
    other = {key: value.copy() for key, value in TENSORS.items()}
    octets = other[name].reshape(-1).view(np.uint8)
    octets[-1] ^= 1
    code, said = diff(write(tmp_path / "a.safetensors", TENSORS), write(tmp_path / "b.safetensors", other), capsys)
    (found,) = said["values"]
    assert code == 1 and found["name"] == name and found["differ"] == 1
    assert found["first"] == TENSORS[name].size - 1 and found["elements"] == TENSORS[name].size


def test_how_much_two_values_differ(tmp_path, capsys):
    other = {**TENSORS, "a.weight": TENSORS["a.weight"] + np.float32(0.5)}
    _, said = diff(write(tmp_path / "a.safetensors", TENSORS), write(tmp_path / "b.safetensors", other), capsys)
    assert said["values"][0]["max_abs"] == 0.5 and said["values"][0]["differ"] == 12


def test_minus_zero_is_not_zero_and_nan_is_itself(tmp_path, capsys):
    a = write(tmp_path / "a.safetensors", {"x": np.array([0.0, np.nan], np.float32)})
    b = write(tmp_path / "b.safetensors", {"x": np.array([-0.0, np.nan], np.float32)})
    assert diff(a, b, capsys)[1]["values"][0]["differ"] == 1
    assert diff(a, a, capsys)[0] == 0


def test_names_dtypes_and_shapes(tmp_path, capsys):
    other = {
        "a.weight": TENSORS["a.weight"].reshape(4, 3),
        "b.qweight": TENSORS["b.qweight"].view(np.uint32),
        "z.new": TENSORS["a.weight"],
    }
    mine = {name: TENSORS[name] for name in ("a.weight", "b.qweight", "c.scale")}
    code, said = diff(write(tmp_path / "a.safetensors", mine), write(tmp_path / "b.safetensors", other), capsys)
    assert code == 1
    assert said["only_a"] == ["c.scale"] and said["only_b"] == ["z.new"]
    assert said["types"] == {"a.weight": ["F32 [3, 4]", "F32 [4, 3]"], "b.qweight": ["I32 [8]", "U32 [8]"]}


def test_without_values_only_headers_are_read(tmp_path, capsys):
    other = {**TENSORS, "a.weight": TENSORS["a.weight"] * 2}
    a, b = write(tmp_path / "a.safetensors", TENSORS), write(tmp_path / "b.safetensors", other)
    code, said = diff(a, b, capsys, "--no-values")
    assert code == 0 and said["compared_values"] is False


def test_for_a_reader(tmp_path, capsys):
    other = {**TENSORS, "a.weight": TENSORS["a.weight"] * 2}
    a, b = write(tmp_path / "a.safetensors", TENSORS), write(tmp_path / "b.safetensors", other)
    assert run(["diff", a, b]) == 1
    said = capsys.readouterr()
    assert "11 of 12 values differ, the first at 1, by 11 at the most" in said.out
    assert "4 tensors" in said.out and said.err.count("\n") == 1


def test_a_source_and_its_conversion(tmp_path, capsys):
    source = FIXTURES / "gptqmodel-qwen3-w4g32"
    assert run(["convert", str(source), str(tmp_path / "out"), "--no-verify"]) == 0
    capsys.readouterr()
    code, said = diff(str(source), str(tmp_path / "out"), capsys, "--no-decode")
    assert code == 1 and "model.embed_tokens.weight" not in {one["name"] for one in said["values"]}
    assert diff(str(tmp_path / "out"), str(tmp_path / "out"), capsys)[0] == 0


@pytest.mark.parametrize(("name", "code"), [("nowhere", 2), ("broken.safetensors", 3)])
def test_bad_input(name, code, tmp_path, capsys):
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    good = write(tmp_path / "good.safetensors", TENSORS)
    assert run(["diff", good, str(tmp_path / name)]) == code
    assert capsys.readouterr().err.count("\n") == 1
