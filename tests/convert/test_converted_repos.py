"""A converted repo is no dead end: `inspect`, `verify` and `diff` take it by its folder and by its name on the Hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES
from support.hub.process import Hub

import xpuquant
from xpuquant.conversion.cli.app import run
from xpuquant.errors import DamagedError, UsageError

pytest_plugins = "support.hub.fixtures"

SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32-asym-v1"
OTHER = FIXTURES / "gptqmodel-qwen3-w4g32-actorder"
REPO = "me/model-xpu"
LFS = pytest.mark.parametrize("client", ["lfs"], indirect=True)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model-xpu"
    xpuquant.convert(SOURCE, out, max_shard_size="40kB")
    return out


def test_it_says_what_it_is(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = xpuquant.inspect(converted)
    assert isinstance(found, xpuquant.ConvertedRepo)
    assert found.origin.name == SOURCE.name and found.producer == f"xpuquant {xpuquant.__version__}"
    assert {module.scheme for module in found.modules} == {"int4_linear g32 asymmetric"}
    assert found.modules == tuple(
        sorted(found.modules, key=lambda module: [one.name for one in found.modules].index(module.name))
    )
    planned = {module.name: module for module in xpuquant.plan(SOURCE).modules}
    assert {module.name: module for module in found.modules} == planned
    assert run(["inspect", str(converted)]) == 0
    said = capsys.readouterr().out
    for words in (
        "converted by xpuquant",
        "max_shard_size='40kB'",
        SOURCE.name,
        "int4_gemm_w4a16",
        ">=0.32",
        "verified",
    ):
        assert words in said
    assert run(["inspect", str(converted), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["from"]["name"] == SOURCE.name
    assert run(["inspect", "-q", str(converted)]) == 0
    assert capsys.readouterr().out.count("\n") == 1


KINDS = (
    "autoawq-mixtral-w4g32-asym",
    "gptqmodel-qwen3moe-w4g32",
    "llmcompressor-llama-mxfp4",
    "llmcompressor-qwen3moe-fp8-block",
    "llmcompressor-qwen3moe-mxfp8",
)
"""Linears and experts, integers and floats, of which each layout family takes some."""


@pytest.mark.parametrize("layout", ["xpu", "compressed-tensors"])
@pytest.mark.parametrize("name", KINDS)
def test_every_module_says_what_was_planned_of_it(
    name: str, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"layout": layout, "on_unsupported": "dequantize"}
    source, out = FIXTURES / name, tmp_path / "out"
    xpuquant.convert(source, out, verify=False, **options)  # type: ignore[arg-type]
    planned = {
        module.name: replace(module, matrices=1)
        for module in xpuquant.plan(source, **options).modules  # type: ignore[arg-type]
    }
    found = xpuquant.inspect(out)
    assert isinstance(found, xpuquant.ConvertedRepo)
    assert {module.name: replace(module, matrices=1) for module in found.modules} == planned
    for module in found.modules:
        told = xpuquant.explain(out, module.name)
        assert isinstance(told, xpuquant.StoredModule)
        assert told.outcome == module and told.origin.name == name
        assert sum(tensor.nbytes for tensor in told.stored) == module.nbytes > 0
        for tensor in (told.stored[-1].name, told.source_tensors[0]):
            assert xpuquant.explain(out, tensor) == told
    assert isinstance(told, xpuquant.StoredModule)
    assert run(["explain", str(out), told.source_tensors[0]]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in (told.name, told.outcome.source, told.stored[0].name, name))


def test_what_is_no_module_of_it_is_said(converted: Path) -> None:
    with pytest.raises(UsageError, match=r"embed_tokens is not quantized: it stays as it is, byte for byte"):
        xpuquant.explain(converted, "model.embed_tokens")
    with pytest.raises(UsageError, match=r"no module is called .*qproj; did you mean .*q_proj\?"):
        xpuquant.explain(converted, "model.layers.0.self_attn.qproj")


@pytest.mark.parametrize("layout", ["xpu", "compressed-tensors"])
def test_one_that_was_not_verified_says_so(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xpuquant.convert(SOURCE, tmp_path / "out", verify=False, layout=layout)
    found = xpuquant.inspect(tmp_path / "out")
    assert isinstance(found, xpuquant.ConvertedRepo)
    assert found.verified is None and found.modules
    assert set(found.needs) == {"vLLM", "Transformers"}  # in each layout by the name that people know
    assert run(["inspect", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert all(f"served by {engine} " in said for engine in found.needs)


def test_a_report_s_words_are_given_as_its_words(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who can write a repo's files can write that they were verified: `inspect` checks nothing, and says whose words
    they are."""
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    (out / "verify.json").write_text(json.dumps({"sentence": "verified against\nall \x1b[31m of it" + "x" * 5000}))
    assert run(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "verified against" in line)
    assert line.startswith("its report says ") and "\x1b" not in said and len(said) < 5000
    assert run(["inspect", "-q", str(out)]) == 0
    assert "; its report says: verified against" in capsys.readouterr().out
    (out / "verify.json").unlink()
    assert run(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "its report says" in said and "nothing: there is none" in said


@LFS
def test_by_its_name_on_the_hub(
    hub: Hub, client: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xpuquant.push(converted, REPO)
    hub.forget_requests()
    found = xpuquant.inspect(REPO)
    assert isinstance(found, xpuquant.ConvertedRepo) and found.repo.revision
    sent = sum(request.sent for request in hub.requests() if request.path.endswith(".safetensors"))
    assert sent < sum(path.stat().st_size for path in converted.glob("*.safetensors")), "headers only"
    assert xpuquant.inspect(converted).modules == found.modules
    same = xpuquant.diff(REPO, converted)
    assert same.equal and same.same == len(xpuquant.diff(converted, converted).values) + same.same
    hub.forget_requests()
    assert xpuquant.diff(REPO, REPO).equal
    assert not [r for r in hub.requests() if r.path.endswith(".safetensors") and r.sent > 70_000]
    differs = xpuquant.diff(REPO, SOURCE)
    assert not differs.equal
    assert run(["verify", REPO, "--source", str(SOURCE), "--backend", "reference"]) == 0
    verdict = xpuquant.verify(REPO, backends=["reference"])
    assert verdict.passed and verdict.repo == REPO


@LFS
def test_a_revision_is_named_behind_the_repo(
    hub: Hub, client: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command that takes a name on the Hub; main and the branch hold the conversions of two models."""
    other = tmp_path / "other"
    xpuquant.convert(OTHER, other)
    xpuquant.push(converted, REPO)
    xpuquant.push(other, REPO, branch="v2")
    at_v2 = f"{REPO}@v2"
    assert not xpuquant.diff(REPO, at_v2).equal
    assert xpuquant.diff(at_v2, other).equal and xpuquant.diff(converted, f"{REPO}@main").equal
    found = xpuquant.inspect(at_v2)
    assert isinstance(found, xpuquant.ConvertedRepo)
    assert found.origin.name == OTHER.name and found == xpuquant.inspect(REPO, revision="v2")
    told = xpuquant.explain(at_v2, found.modules[0].name)
    assert isinstance(told, xpuquant.StoredModule) and told.outcome == found.modules[0]
    assert xpuquant.verify(at_v2, source=OTHER, backends=["reference"]).passed
    commit = hub.seed("producer/model", OTHER, xet=False)
    assert xpuquant.verify(at_v2, source=f"producer/model@{commit}", backends=["reference"]).passed
    source = f"producer/model@{commit}"
    assert run(["convert", source, "--dry-run"]) == 0
    assert " to model-xpu\n" in capsys.readouterr().out
    xpuquant.convert(source, tmp_path / "third")
    assert xpuquant.verify(tmp_path / "third", source=source, backends=["reference"]).passed
    assert f"xpuquant convert {source} third" in (tmp_path / "third" / "README.md").read_text()
    for words, why in (
        (["inspect", f"{at_v2}9"], "has no such revision"),
        (["diff", REPO, f"{REPO}@"], f"{REPO}@: no revision follows the @"),
        (["inspect", at_v2, "--revision", "main"], f"{at_v2} names a revision already; leave out --revision"),
    ):
        assert run(words) == 2
        assert why in capsys.readouterr().err


@LFS
def test_what_is_no_converted_repo_is_said(hub: Hub, client: str, tmp_path: Path) -> None:
    hub.seed("producer/model", SOURCE, xet=False)
    with pytest.raises(UsageError, match=r"producer/model: has no xpuquant.json; it was not converted"):
        xpuquant.verify("producer/model")
    for call in (xpuquant.inspect, xpuquant.verify, lambda name: xpuquant.diff(name, SOURCE)):
        with pytest.raises(UsageError, match=r"producer/nothing: no such folder here; on the Hub: .*no such model"):
            call("producer/nothing")  # type: ignore[operator]


def test_a_mistyped_path_is_called_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model-GPTQ").mkdir()
    for words in (["inspect"], ["verify"], ["convert"]):
        assert run([*words, str(tmp_path / "model-GPTW")]) == 2
        said = capsys.readouterr().err
        assert f"no such folder here (did you mean {tmp_path / 'model-GPTQ'}?)" in said and said.count("\n") == 1


# A finished conversion is run again


def test_a_finished_conversion_says_so_and_is_left_alone(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in converted.iterdir()}
    assert run(["convert", str(SOURCE), str(converted), "--max-shard-size", "40kB"]) == 0
    said = capsys.readouterr().out
    assert f"{converted} is finished already: nothing was left to do" in said and "took" not in said
    assert {path.name: path.stat().st_mtime_ns for path in converted.iterdir()} == before
    assert run(["convert", str(SOURCE), str(converted)]) == 2, "other shards were asked for"
    assert "--force" in capsys.readouterr().err


def change(source: Path, suffix: str, at: int) -> None:
    """Flip a bit of the first tensor of that name."""
    from xpuquant.formats.safetensors import parse_header

    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    tensors = parse_header(bytes(data[8 : 8 + length]), path.name, len(data))
    tensor = next(tensor for name, tensor in tensors.items() if name.endswith(suffix))
    data[tensor.begin + at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["v_proj.qweight", "down_proj.scales", "q_proj.qzeros", "embed_tokens.weight"])
def test_another_model_of_the_same_name_and_size_is_noticed(suffix: str, tmp_path: Path) -> None:
    """A fine-tuned model has the names and sizes of the one it was tuned from."""
    one, other, out = tmp_path / "a" / "model", tmp_path / "b" / "model", tmp_path / "out"
    for folder in (one, other):
        shutil.copytree(SOURCE, folder)
    xpuquant.convert(one, out, verify=False)
    assert not xpuquant.convert(one, out, verify=False).is_new
    change(other, suffix, 0)
    with pytest.raises(UsageError, match=r"holds the conversion of another source .*force=True"):
        xpuquant.convert(other, out)
    assert xpuquant.convert(other, out, force=True, verify=False).is_new


LOOKED_AT = {
    "a header": ("model.safetensors", 20),
    "its length": ("model.safetensors", 1),
    "rows that are compared": ("model.safetensors", -1),
    "the config": ("config.json", 20),
}
"""Where a bit is turned over, as far as a conversion that is run again looks: file and byte."""


@pytest.mark.parametrize("case", LOOKED_AT)
def test_a_file_that_changed_since_is_not_another_source(
    case: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    name, at = LOOKED_AT[case]
    path = sorted(out.glob("*.safetensors"))[0] if name == "model.safetensors" else out / name
    data = bytearray(path.read_bytes())
    if at < 0:
        at = 8 + int.from_bytes(data[:8], "little")
    data[at] ^= 1
    path.write_bytes(data)
    assert run(["convert", str(SOURCE), str(out), "--max-shard-size", "40kB"]) == 3
    said = capsys.readouterr().err
    assert f"{path} is not what the conversion wrote; to convert again, pass --force" in said
    assert run(["finish", str(SOURCE), str(out)]) == 3
    said = capsys.readouterr().err
    assert f"{path} is not what the conversion wrote; choose another folder" in said


def test_what_was_looked_at_is_said_with_what_looks_at_all(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    path = max(out.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\xee")
    assert run(["convert", str(SOURCE), str(out), "--max-shard-size", "40kB"]) == 0
    said = capsys.readouterr().out
    assert "the options, the sizes of the shards, some rows of each module and the start of each other tensor" in said
    assert "the sha256 of the other files" in said
    assert f"all of it: xpuquant verify {out}" in said
    assert run(["verify", str(out), "--backend", "reference", "-q"]) == 1


def test_a_shard_that_is_gone_is_no_finished_conversion(tmp_path: Path) -> None:
    xpuquant.convert(SOURCE, tmp_path / "out", verify=False)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"model\.safetensors is not what the conversion wrote.*force=True"):
        xpuquant.convert(SOURCE, tmp_path / "out")
