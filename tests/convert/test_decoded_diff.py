"""`xpuquant diff` of what is stored in other ways: equal values are equal, and one that is not is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import FIXTURES
from support.injected_faults import copy

import xpuquant
from xpuquant.conversion.cli.app import run
from xpuquant.conversion.decoded_diff import Side
from xpuquant.formats.checkpoint import whole
from xpuquant.formats.weights.packed import unpacked_rows

CASES = {
    "linear": "gptqmodel-qwen3-w4g32",
    "asymmetric, zero points minus one": "gptqmodel-qwen3-w4g32-asym-v1",
    "act-order": "gptqmodel-qwen3-w4g32-actorder-static",
    "three bits": "gptqmodel-qwen3-w3g32-asym",
    "experts": "gptqmodel-qwen3moe-w4g32",
    "experts of two matrices in one": "handpacked-gptoss-mxfp4",
    "experts with biases": "llmcompressor-gptoss-w4a16",
    "activation scales": "llmcompressor-llama-fp8-static",
    "fp8 experts, turned": "llmcompressor-qwen3moe-fp8-tensor",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("converted")
    for name, fixture in CASES.items():
        xpuquant.convert(FIXTURES / fixture, room / name, verify=False)
    return {name: room / name for name in CASES}


def changed(folder: Path, to: Path, end: str, at: int = 0) -> tuple[Path, str]:
    """A copy of a folder in which the lowest bit of one byte of a tensor is another; and the tensor's name."""
    repo = copy(folder, to)
    name = next(name for name in sorted(repo.places) if name.endswith(end))
    octets = repo.read(name)
    octets[at] ^= 1
    repo.write(name, octets)
    return to, name


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_and_its_conversion(name: str, converted: dict[str, Path]) -> None:
    for a, b in ((FIXTURES / CASES[name], converted[name]), (converted[name], FIXTURES / CASES[name])):
        found = xpuquant.diff(a, b)
        assert found.same_values and not found.equal and found.decoded and not found.left
        assert all(one.same and one.elements for one in found.decoded)
        assert not xpuquant.diff(a, b, decode=False).same_values


@pytest.mark.parametrize(
    ("name", "end", "elements"),
    [
        ("linear", "qweight", 1),
        ("linear", ".scales", 32),
        ("asymmetric, zero points minus one", ".qzeros", 32),
        ("experts", "experts.gate_up_proj", 1),
        ("experts", "experts.down_proj_scale", 32),
        ("experts of two matrices in one", "experts.gate_up_proj", 1),
        ("fp8 experts, turned", "experts.down_proj", 1),
    ],
)
def test_one_value_is_found_and_named(
    name: str, end: str, elements: int, converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, tensor = changed(converted[name], tmp_path / "other", end)
    found = xpuquant.diff(FIXTURES / CASES[name], other)
    (wrong,) = [one for one in found.decoded if not one.same]
    assert not found.same_values and not found.left and tensor.startswith(wrong.name)
    # A code of 0 has no other value under another scale.
    assert elements / 2 < wrong.differ <= elements and wrong.max_abs > 0 and wrong.first and wrong.problem is None
    assert run(["diff", str(FIXTURES / CASES[name]), str(other)]) == 1
    said = capsys.readouterr()
    assert wrong.name in said.out and f"{wrong.differ} of {wrong.elements}" in said.out
    assert "1 differ in value" in said.out and said.err.count("\n") == 1


@pytest.mark.parametrize(("name", "end"), [("experts with biases", "_bias"), ("activation scales", "input_scale")])
def test_what_stands_beside_the_matrices_counts(
    name: str, end: str, converted: dict[str, Path], tmp_path: Path
) -> None:
    other, _ = changed(converted[name], tmp_path / "other", end)
    found = xpuquant.diff(FIXTURES / CASES[name], other)
    (wrong,) = [one for one in found.decoded if not one.same]
    assert not found.same_values and wrong.problem is not None


def test_an_unquantized_tensor_of_another_type(converted: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(converted["linear"], tmp_path / "other"))
    path = next(other.glob("*.safetensors"))
    tensors = load_file(path)
    name = "model.norm.weight"
    save_file({**tensors, name: tensors[name].astype(np.float32)}, path, {"format": "pt"})
    assert xpuquant.diff(FIXTURES / CASES["linear"], other).same_values
    moved = tensors[name].astype(np.float32)
    moved[3] += 0.25
    save_file({**tensors, name: moved}, path, {"format": "pt"})
    (wrong,) = [one for one in xpuquant.diff(FIXTURES / CASES["linear"], other).decoded if not one.same]
    assert (wrong.name, wrong.differ, wrong.max_abs) == (name, 1, 0.25)


def test_two_layouts_and_two_scale_dtypes(converted: dict[str, Path], tmp_path: Path) -> None:
    """Two conversions of one source: of equal values, but where scales were rounded."""
    source = FIXTURES / CASES["linear"]
    xpuquant.convert(source, tmp_path / "portable", layout="compressed-tensors", verify=False)
    assert xpuquant.diff(converted["linear"], tmp_path / "portable").same_values
    xpuquant.convert(source, tmp_path / "wide", scale_dtype="float32", verify=False)
    assert xpuquant.diff(converted["linear"], tmp_path / "wide").same_values
    xpuquant.convert(source, tmp_path / "rounded", scale_dtype="bfloat16", verify=False)
    rounded = xpuquant.diff(converted["linear"], tmp_path / "rounded")
    assert not rounded.same_values and all(0 < one.max_abs < one.largest / 100 for one in rounded.decoded)


def test_a_quantized_model_and_one_that_is_not(tmp_path: Path) -> None:
    """How far a quantized model is from the one that it was made of: here, from its own values rounded to bf16."""
    source, plain = FIXTURES / "llmcompressor-llama-mxfp4", tmp_path / "plain"
    plain.mkdir()
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    (plain / "config.json").write_text(json.dumps(config))
    side = Side(source)
    made = {name: side.read(whole(tensor)) for name, tensor in side.plain.items()}
    for module in side.names():
        (matrix,) = side.views(module).values()
        values = unpacked_rows(matrix.rows(0, matrix.N)).values()
        made[f"{module}.weight"] = (values * 1.003).astype(np.float32).astype(ml_dtypes.bfloat16)
    save_file(made, plain / "model.safetensors", {"format": "pt"})
    found = xpuquant.diff(source, plain)
    assert not found.left and len(found.decoded) == 7
    assert all(one.problem is None and 0 < one.max_abs <= one.largest / 100 for one in found.decoded)
    tensors = load_file(plain / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    far = tensors[name].copy()
    far[1, 2] = ml_dtypes.bfloat16(100)
    save_file({**tensors, name: far}, plain / "model.safetensors", {"format": "pt"})
    worst = max(xpuquant.diff(source, plain).decoded, key=lambda one: one.max_abs)
    assert worst.name == name.removesuffix(".weight") and 95 < worst.max_abs < 105


def test_another_shape_is_said(tmp_path: Path) -> None:
    a, b = FIXTURES / "gptqmodel-qwen3-w4g32", FIXTURES / "gptqmodel-qwen3-w4g64-ragged"
    found = xpuquant.diff(a, b)
    assert not found.same_values and any("in A and" in str(one.problem) for one in found.decoded)


def test_what_is_not_decoded_says_why(
    converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(converted["linear"].glob("*.safetensors"))
    assert run(["diff", str(FIXTURES / CASES["linear"]), str(file)]) == 1
    assert "values of modules that are stored otherwise were not compared: only folders here" in capsys.readouterr().out
    broken = Path(shutil.copytree(converted["linear"], tmp_path / "broken"))
    (broken / "config.json").write_text("[]")
    assert run(["diff", str(FIXTURES / CASES["linear"]), str(broken)]) == 1
    said = capsys.readouterr()
    assert "config.json" in said.out and said.err.count("\n") == 1


def test_for_a_program_and_in_one_line(converted: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diff", str(FIXTURES / CASES["linear"]), str(converted["linear"])]
    assert run([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["same_values"] is True and said["equal"] is False and len(said["decoded"]) == 7 and said["left"] == []
    assert run([*words, "-q"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("7 modules are stored otherwise, of equal values")
    assert run([*words, "--no-decode", "-q"]) == 1
