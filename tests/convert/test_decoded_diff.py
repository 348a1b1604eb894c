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
from support.hub.fixtures import split_shards
from support.hub.process import Hub
from support.injected_faults import copy

import xpuquant
from xpuquant.conversion.cli.app import run
from xpuquant.conversion.diff_sides import Side
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.formats.checkpoint import whole
from xpuquant.formats.weights.packed import unpacked_rows

pytest_plugins = "support.hub.fixtures"

LFS = pytest.mark.parametrize("client", ["lfs"], indirect=True)

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
    assert "1 module is of other values" in said.out and said.err.count("\n") == 1


@pytest.mark.parametrize(("name", "end"), [("experts with biases", "_bias"), ("activation scales", "input_scale")])
def test_what_stands_beside_the_matrices_counts(
    name: str, end: str, converted: dict[str, Path], tmp_path: Path
) -> None:
    other, _ = changed(converted[name], tmp_path / "other", end)
    found = xpuquant.diff(FIXTURES / CASES[name], other)
    (wrong,) = [one for one in found.decoded if not one.same]
    assert not found.same_values and wrong.beside is not None
    assert wrong.problem is None and wrong.differ == 0


# gpt-oss: gate and up in one matrix, in alternating rows, or each by itself


def taken_apart(tmp_path: Path, whole: Path) -> Path:
    """The same model as a compressed-tensors checkpoint of somebody else, each expert's gate and up by itself."""
    xpuquant.convert(whole, tmp_path / "apart", layout="compressed-tensors", verify=False)
    for mine in ("xpuquant.json", "verify.json"):
        (tmp_path / "apart" / mine).unlink(missing_ok=True)
    return tmp_path / "apart"


def test_gate_and_up_in_one_and_each_by_itself(tmp_path: Path) -> None:
    whole = FIXTURES / CASES["experts of two matrices in one"]
    apart = taken_apart(tmp_path, whole)
    for a, b in ((whole, apart), (apart, whole)):
        found = xpuquant.diff(a, b)
        assert found.same_values and not found.left and not found.equal
        assert all(one.same and one.elements for one in found.decoded)


@pytest.mark.parametrize(
    ("end", "said"), [("1.up_proj.weight_packed", "expert 1 up"), ("1.gate_proj.bias", "bias of gate, expert 1")]
)
def test_one_value_of_gate_or_up(end: str, said: str, tmp_path: Path) -> None:
    whole = FIXTURES / CASES["experts of two matrices in one"]
    apart = taken_apart(tmp_path, whole)
    other, _ = changed(apart, tmp_path / "other", f".{end}")
    for a, b in ((whole, other), (other, whole)):
        found = xpuquant.diff(a, b)
        (wrong,) = [one for one in found.decoded if not one.same]
        assert not found.left and said in f"{wrong.first} {wrong.beside}"


def begin_unquantized(source: Path, plain: Path) -> tuple[Side, dict[str, np.ndarray]]:
    """A folder with the config of an unquantized twin; the source, and what of its tensors the twin has as they are."""
    plain.mkdir()
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    (plain / "config.json").write_text(json.dumps(config))
    side = Side(LocalSource(source))
    return side, {name: side.read(whole(tensor)) for name, tensor in side.plain.items()}


def test_a_quantized_gpt_oss_and_one_that_is_not(tmp_path: Path) -> None:
    """Transformers has the experts of a layer in `[E, H, 2I]` and `[E, I, H]`; values of MXFP4 are exact in bf16."""
    source, plain = FIXTURES / CASES["experts of two matrices in one"], tmp_path / "plain"
    side, made = begin_unquantized(source, plain)
    for module in side.names():
        of: dict[str, list[np.ndarray]] = {}
        for (role, _), matrix in side.views(module).items():
            of.setdefault(role, []).append(unpacked_rows(matrix.rows(0, matrix.N)).values().T)
        for role, those in of.items():
            made[f"{module}.{role}_proj"] = np.ascontiguousarray(np.stack(those).astype(ml_dtypes.bfloat16))
    save_file(made, plain / "model.safetensors", {"format": "pt"})
    xpuquant.convert(source, tmp_path / "converted", verify=False)
    for other in (source, tmp_path / "converted", taken_apart(tmp_path, source)):
        found = xpuquant.diff(other, plain)
        assert found.same_values and not found.left and len(found.decoded) == len(side.names())
    name = f"{module}.gate_up_proj"
    made[name][0, 3, 5] = 100
    save_file(made, plain / "model.safetensors", {"format": "pt"})
    (wrong,) = [one for one in xpuquant.diff(source, plain).decoded if not one.same]
    assert wrong.name == module and wrong.differ == 1 and "expert 0 gate_up, [5, 3]" in str(wrong.first)


# On the Hub


@LFS
@pytest.mark.parametrize("name", ["asymmetric, zero points minus one", "experts", "experts of two matrices in one"])
def test_by_their_names_on_the_hub(
    name: str, hub: Hub, client: str, converted: dict[str, Path], tmp_path: Path
) -> None:
    hub.seed("theirs/model", split_shards(FIXTURES / CASES[name], tmp_path / "source", 2))
    hub.seed("me/model-xpu", converted[name])
    for a, b in (("theirs/model", "me/model-xpu"), ("me/model-xpu", "theirs/model")):
        found = xpuquant.diff(a, b)
        assert found.same_values and not found.equal and found.decoded and not found.left
    wrong, _ = changed(converted[name], tmp_path / "wrong", "down_proj" if "experts" in name else "qweight")
    hub.seed("me/wrong", wrong)
    assert not xpuquant.diff("theirs/model", "me/wrong").same_values


@LFS
def test_only_shards_that_differ_are_downloaded(hub: Hub, client: str, tmp_path: Path) -> None:
    one = tmp_path / "one"
    xpuquant.convert(FIXTURES / CASES["linear"], one, verify=False, max_shard_size="40kB")
    other, tensor = changed(one, tmp_path / "other", "layers.0.mlp.down_proj.qweight")
    for name, folder in (("me/one", one), ("me/other", other)):
        hub.seed(name, folder)
    found = xpuquant.diff("me/one", "me/other")
    (wrong,) = [module for module in found.decoded if not module.same]
    assert tensor.startswith(wrong.name) and wrong.differ == 1 and wrong.first
    index = json.loads((one / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith(f"{wrong.name}.")}
    fetched = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert fetched == needed and len(needed) < len(set(index.values()))


@LFS
def test_what_the_hub_sends_is_compared_with_what_it_lists(
    hub: Hub, client: str, converted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.seed("me/model-xpu", converted["linear"])
    commit = hub.store.commit(repo := hub.store.repo("me/model-xpu"), repo.refs["main"])
    path = hub.store.content(commit.files["model.safetensors"])
    octets = bytearray(path.read_bytes())
    octets[-1] ^= 1
    path.write_bytes(octets)
    assert run(["diff", str(FIXTURES / CASES["linear"]), "me/model-xpu"]) == 3
    said = capsys.readouterr()
    assert "model.safetensors has sha256" in said.err and said.err.count("\n") == 1


@LFS
def test_offline_from_the_cache(
    hub: Hub, client: str, converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    hub.seed("me/model-xpu", converted["linear"])
    snapshot_download("me/model-xpu")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert xpuquant.diff(FIXTURES / CASES["linear"], "me/model-xpu").same_values


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
    side, made = begin_unquantized(source, plain)
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
    assert "values of modules that are stored otherwise were not compared: " in capsys.readouterr().out
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
