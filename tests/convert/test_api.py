"""`import xpuquant`: what a program gets that never sees the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import textwrap
from pathlib import Path

import pytest
import support.injected_faults as inject
from support.checkpoints import FIXTURES
from support.hub.process import Hub, MakeFolder, contents

import xpuquant

pytest_plugins = "support.hub.fixtures"

SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32-asym-v1"
MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
REFUSED = FIXTURES / "llmcompressor-llama-fp8-block-ragged"
DOWN = "model.layers.0.mlp.down_proj"


class Told:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        self.calls.append((phase, done, total))

    def check(self, *phases: str) -> None:
        """Every phase, in order, from nothing to everything, never backwards."""
        assert list(dict.fromkeys(phase for phase, _, _ in self.calls)) == list(phases)
        for phase in phases:
            done = [done for name, done, _ in self.calls if name == phase]
            (total,) = {total for name, _, total in self.calls if name == phase}
            assert done == sorted(done) and done[0] == 0 and done[-1] == total > 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "out"
    xpuquant.convert(SOURCE, folder, max_shard_size="40kB", jobs=2)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_all_names_are_there_and_documented() -> None:
    for name in xpuquant.__all__:
        assert name in dir(xpuquant)
        found = getattr(xpuquant, name)
        assert name == "__version__" or found.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        xpuquant.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("top_k", "releases"),
    [(8, "0.1.15.1 to 0.1.16.x"), (12, "0.1.16.1 to 0.1.16.x"), (5, "none gathers 5 experts per token")],
)
def test_a_plan_says_which_kernels_gather_so_many_experts(top_k: int, releases: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(MOE, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top_k}))
    said = {m.scheme.split()[0]: m.releases for m in xpuquant.inspect(source).modules if m.scheme is not None}
    assert said["int4_experts"] == releases and said["int4_linear"] == "0.1.15.1 to 0.1.16.x"


def test_a_plan_says_which_releases_of_ark_compute_its_experts() -> None:
    found = xpuquant.inspect(MOE.parent / "llmcompressor-qwen3moe-w4a16-asym")
    said = {m.scheme.split()[0]: m.releases for m in found.modules if m.scheme is not None}
    assert said["uint4_experts"] == "0.1.15.1 to 0.1.16.x, auto-round-lib 0.16.x"


def test_inspect() -> None:
    found = xpuquant.inspect(SOURCE, tensor_parallel=[2])
    assert isinstance(found, xpuquant.Inspection)
    assert found.converts and found.model_type == "qwen3" and found.quant_method == "gptq"
    assert found.source.name == str(SOURCE) and found.source.nbytes > 0
    outcome = {module.name: module for module in found.modules}[DOWN]
    assert outcome.scheme is not None and outcome.scheme.startswith("int4_linear g32")
    assert outcome.kernel == "int4_gemm_w4a16" and outcome.decisions
    assert outcome.releases == "0.1.15.1 to 0.1.16.x"
    assert list(found.tensor_parallel) == [2]
    refused = xpuquant.inspect(str(REFUSED))
    assert isinstance(refused, xpuquant.Inspection)
    assert not refused.converts and DOWN in refused.refused
    assert xpuquant.inspect(REFUSED, on_unsupported="dequantize").modules[0].scheme is None


def test_plan_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(SOURCE)
    planned = xpuquant.plan(SOURCE, max_shard_size="40kB", scale_dtype="bfloat16")
    assert (planned.options.max_shard_bytes, planned.options.scale_dtype) == (40_000, "BF16")
    assert planned.write_bytes == sum(shard.nbytes for shard in planned.shards) and len(planned.shards) > 1
    assert {module.name for module in planned.modules} >= {DOWN}
    assert list(tmp_path.iterdir()) == [] and files(SOURCE) == before


def test_convert(tmp_path: Path) -> None:
    told = Told()
    result = xpuquant.convert(str(SOURCE), tmp_path / "out", max_shard_size=40_000, jobs=2, progress=told)
    told.check("convert", "verify")
    assert result.out == tmp_path / "out" and result.is_new and result.pushed is None
    assert result.verdict is not None and result.verdict.passed
    held = files(tmp_path / "out")
    assert {name: shard.sha256 for name, shard in result.shards.items()}.items() <= held.items()
    assert [shard.name for shard in result.plan.shards] == sorted(result.shards)
    assert result.plan == xpuquant.plan(SOURCE, max_shard_size="40kB")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.out = None  # type: ignore[misc]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"xpuquant convert {SOURCE.name} out --max-shard-size 40kB" in card
    assert str(tmp_path) not in card and str(SOURCE.parent) not in card


def test_convert_with_options_is_convert_with_arguments(made: Path, tmp_path: Path) -> None:
    xpuquant.convert(SOURCE, tmp_path / "out", options=xpuquant.Options(max_shard_size=40_000), verify=False)
    ours, theirs = files(tmp_path / "out"), files(made)
    shards = [name for name in theirs if name.endswith(".safetensors")]
    assert shards and all(ours[name] == theirs[name] for name in shards)
    with pytest.raises(xpuquant.UsageError, match="not both"):
        xpuquant.plan(SOURCE, options=xpuquant.Options(), layout="xpu")


def test_parts_and_finish(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        result = xpuquant.convert_part(SOURCE, out, part, max_shard_size="40kB")
        assert result.part == part and 0 < len(result.shards) < result.of
    told = Told()
    assert xpuquant.finish(SOURCE, out, progress=told).verdict is not None
    told.check("convert", "verify")
    ours, theirs = files(out), files(made)
    assert {k: v for k, v in ours.items() if k != "README.md"} == {k: v for k, v in theirs.items() if k != "README.md"}


def test_verify(made: Path, tmp_path: Path) -> None:
    told = Told()
    verdict = xpuquant.verify(made, backends=["reference"], progress=told)
    told.check("verify")
    assert verdict.passed and verdict.failures == []
    assert xpuquant.verify(made, source=SOURCE, backends=["reference"]).passed
    repo = inject.copy(made, tmp_path / "repo")
    shard = next(repo.folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    verdict = xpuquant.verify(repo.folder, backends=["reference"], report=tmp_path / "report")
    assert not verdict.passed and any(shard.name in line for line in verdict.failures)
    assert json.loads((tmp_path / "report" / "verify.json").read_text())["passed"] is False


def test_diff(made: Path) -> None:
    told = Told()
    same = xpuquant.diff(made, str(made), progress=told)
    told.check("compare")
    assert same.equal and same.same > 0
    other = xpuquant.diff(SOURCE, made)
    assert not other.equal and f"{DOWN}.g_idx" in other.only_a


def test_push(hub: Hub, client: str, folder: MakeFolder) -> None:
    told = Told()
    out = folder()
    pushed = xpuquant.push(out, "me/model-xpu", progress=told)
    told.check("push")
    assert pushed.repo_id == "me/model-xpu" and pushed.nbytes > 0
    assert hub.files("me/model-xpu") == contents(out)
    assert xpuquant.push(out, "me/model-xpu").uploaded == ()


def test_convert_and_push(hub: Hub, client: str, tmp_path: Path) -> None:
    told = Told()
    result = xpuquant.convert(SOURCE, tmp_path / "out", push_to="me/model-xpu", progress=told)
    told.check("convert", "verify", "push")
    assert result.pushed is not None and hub.files("me/model-xpu") == contents(tmp_path / "out")
    again = xpuquant.convert(SOURCE, tmp_path / "out", push_to="me/model-xpu")
    assert not again.is_new and again.pushed is not None and again.pushed.uploaded == ()
    assert again.shards == result.shards and again.plan == result.plan


@pytest.mark.parametrize("page", ["README.md", "xpuquant/api.py", "xpuquant/__init__.py"])
def test_what_the_pages_show_runs(page: str, hub: Hub, client: str, tmp_path: Path) -> None:
    """The lines after `import xpuquant`, as they stand there, and once more of what is finished then; a Hub repository
    named there is a folder here."""
    text = (FIXTURES.parents[1] / page).read_text()
    begin = text.index("    import xpuquant\n")
    block = text[begin:].splitlines()
    lines = [*itertools.takewhile(lambda line: not line or line.startswith("    "), block)]
    code = textwrap.dedent("\n".join(lines))
    assert "xpuquant.convert(" in code
    places = {"SRC": SOURCE, "org/model-GPTQ": SOURCE, "OUT": tmp_path / "out", "model-xpu": tmp_path / "out"}
    for name, place in places.items():
        code = code.replace(f'"{name}"', repr(str(place)))
    for _ in range(2):
        exec(compile(code, page, "exec"), {})
    assert (tmp_path / "out" / "config.json").exists()
    if "push(" in code:
        assert hub.files("me/model-xpu") == contents(tmp_path / "out")


def test_doctor() -> None:
    assert "reference" in {one.name for one in xpuquant.doctor().backends}


def test_errors_are_ours(made: Path, tmp_path: Path) -> None:
    cases = [
        (xpuquant.UnsupportedError, lambda: xpuquant.convert(REFUSED, tmp_path / "a")),
        (xpuquant.UsageError, lambda: xpuquant.convert(SOURCE, made)),
        (xpuquant.UsageError, lambda: xpuquant.convert(SOURCE, tmp_path / "a", scale_dtype="int3")),
        (xpuquant.UsageError, lambda: xpuquant.convert_part(SOURCE, tmp_path / "a", "3/2")),
        (xpuquant.UsageError, lambda: xpuquant.finish(SOURCE, tmp_path / "a")),
        (xpuquant.UsageError, lambda: xpuquant.inspect(tmp_path / "nowhere")),
        (xpuquant.UsageError, lambda: xpuquant.verify(SOURCE)),
        (xpuquant.UsageError, lambda: xpuquant.diff(made, tmp_path / "nowhere")),
        (xpuquant.UsageError, lambda: xpuquant.push(SOURCE, "me/x")),
        (xpuquant.EnvironmentFault, lambda: xpuquant.convert(SOURCE, "/proc/nowhere/out")),
    ]
    for kind, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_callback_may_stop_the_work(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "convert" and done > total // 2:
            raise Enough

    out = tmp_path / "out"
    with pytest.raises(Enough):
        xpuquant.convert(MOE, out, max_shard_size="20kB", jobs=1, progress=stop)
    assert not (out / "config.json").exists()
    assert xpuquant.convert(MOE, out, max_shard_size="20kB").verdict is not None
