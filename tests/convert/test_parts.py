"""One conversion by many processes: parts that share a disk, and a Ray cluster that loses a node."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from support.checkpoints import FIXTURES
from support.hub.process import Hub, contents

import xpuquant
from xpuquant.conversion.cli.app import run
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.repo.journal import STAGING, JournalFile
from xpuquant.conversion.runs.parts import Part, parse_part, share
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.tree import Identity
from xpuquant.conversion.verify import exactness
from xpuquant.errors import UsageError

pytest_plugins = "support.hub.fixtures"

MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
SMALL = ["--max-shard-size", "20kB", "--jobs", "1"]


def digests(folder: Path) -> dict[str, str]:
    """What must be equal however it was made: everything but the card, which quotes the command."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }


def convert(out: Path, *options: str) -> int:
    return run(["convert", str(MOE), str(out), *SMALL, *options])


@pytest.fixture
def wanted(tmp_path: Path) -> dict[str, str]:
    """An ordinary conversion of the same; all outputs have the same name, which reports quote."""
    assert convert(tmp_path / "wanted" / "out") == 0
    return digests(tmp_path / "wanted" / "out")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_every_shard_is_in_exactly_one_part(count: int) -> None:
    plan = make_plan(open_source(str(MOE)).checkpoint, Options(max_shard_size=20_000))
    shares = [share(plan, Part(index, count)) for index in range(1, count + 1)]
    assert [shard.name for part in shares for shard in part] == [shard.name for shard in plan.shards]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_bad_parts(text: str) -> None:
    with pytest.raises(UsageError, match="want i/n"):
        parse_part(text)


def test_parts_make_the_same_repo(tmp_path: Path, wanted: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parts" / "out"
    for part in ("2/3", "1/3"):
        assert convert(out, "--shard", part) == 0
    assert run(["finish", str(MOE), str(out)]) == 3
    assert "shards have not been made" in capsys.readouterr().err
    assert not (out / "config.json").exists()
    assert convert(out, "--shard", "3/3") == 0
    assert convert(out, "--shard", "3/3") == 0, "a part can be run again"
    assert run(["finish", str(MOE), str(out)]) == 0
    assert digests(out) == wanted


def test_finish_before_any_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finish", str(MOE), str(tmp_path / "out")]) == 2
    assert "no part was converted there" in capsys.readouterr().err


def test_parts_of_different_conversions_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused before it makes anything, whichever option differs; what was made before stays good."""
    out = tmp_path / "out"
    assert convert(out, "--part", "1/2") == 0
    before = digests(out)
    others = (
        (["--scale-dtype", "bf16"], ["--scale-dtype keep", "--scale-dtype bfloat16"]),
        (["--max-shard-size", "5GB"], ["--max-shard-size 20kB", "--max-shard-size 5GB"]),
        (["--layout", "compressed-tensors"], ["--layout xpu", "--layout compressed-tensors"]),
        (["--on-unsupported", "dequantize"], ["--on-unsupported refuse", "--on-unsupported dequantize"]),
        (["--fold-act-order", "--scale-dtype", "fp32"], ["no --fold-act-order", "--scale-dtype float32"]),
    )
    for options, said in others:
        for part in ("1/2", "2/2"):
            capsys.readouterr()
            assert convert(out, "--part", part, *options) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "part 1/2 there was made with" in error and "another folder" in error
            assert all(word in error for word in said), error
    other = tmp_path / "other"
    shutil.copytree(MOE, other)
    os.utime(other / "model.safetensors", (1, 1))
    assert run(["convert", str(other), str(out), *SMALL, "--part", "2/2"]) == 2
    assert "part 1/2 there is of another source" in capsys.readouterr().err
    after = digests(out)
    assert {name for name in after if name not in before} == {
        f".xpuquant/{Part(2, 2).journal.replace('jsonl', 'lock')}"
    }
    assert all(after[name] == digest for name, digest in before.items())
    assert convert(out, "--part", "2/2") == 0
    assert run(["finish", str(MOE), str(out)]) == 0


def test_parts_that_begin_together_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's journal appears after the first look."""
    out = tmp_path / "out"
    begin = JournalFile.begin

    def beside(self: JournalFile, plan: str, options: Options, sources: Mapping[str, Identity]) -> None:
        begin(JournalFile(self._tree, Part(2, 2).journal), "another", Options(scale_dtype="float32"), {})
        begin(self, plan, options, sources)

    monkeypatch.setattr(JournalFile, "begin", beside)
    assert convert(out, "--part", "1/2") == 2
    assert not (out / ".xpuquant" / Part(1, 2).journal).exists()


def test_a_plain_conversion_names_what_differs_from_an_unfinished_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(out, "--part", "1/2") == 0
    assert convert(out, "--scale-dtype", "float16") == 2
    error = capsys.readouterr().err
    assert "conversion with --scale-dtype keep, not with --scale-dtype float16" in error and "--force" in error


def test_finish_says_which_parts_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert convert(out, "--part", "2/3") == 0
    assert run(["finish", str(MOE), str(out)]) == 3
    assert "convert parts 1/3, 3/3 of it" in capsys.readouterr().err


def test_finish_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished folder is finished, however it was made; what is not it is refused."""
    out = tmp_path / "out"
    assert convert(out) == 0
    before = digests(out)
    for told in ([], SMALL, ["--json"]):
        capsys.readouterr()
        assert run(["finish", str(MOE), str(out), *told]) == 0
        said = capsys.readouterr()
        assert said.err == "" and ("is finished already" in said.out or "--json" in told)
    assert not xpuquant.finish(MOE, out).is_new
    assert run(["finish", str(MOE), str(out), "--scale-dtype", "float32"]) == 2
    assert "was converted with --scale-dtype keep, not with --scale-dtype float32" in capsys.readouterr().err
    assert run(["finish", str(FIXTURES / "gptqmodel-qwen3-w4g32-asym-v1"), str(out)]) == 2
    assert "finished conversion of another source" in capsys.readouterr().err
    assert digests(out) == before


def test_a_part_of_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not told to use an option that it does not take."""
    out = tmp_path / "out"
    assert convert(out) == 0
    assert convert(out, "--part", "1/2") == 2
    error = capsys.readouterr().err
    assert "already holds a converted model" in error and "another folder" in error and "force" not in error


def test_what_was_found_wrong_is_not_gone_on_with(
    tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpuquant.formats.packing import convert_loops

    real, out = convert_loops.transpose_words, tmp_path / "parts" / "out"

    def spoiling(source: Any, out: Any) -> None:
        real(source, out)
        out[0, 0] ^= 1

    monkeypatch.setattr(convert_loops, "transpose_words", spoiling)
    assert convert(out, "--part", "1/2") == 1
    monkeypatch.undo()
    assert convert(out, "--part", "1/2") == 0
    assert convert(out, "--part", "2/2") == 0
    assert run(["finish", str(MOE), str(out)]) == 0
    assert digests(out) == wanted


def test_finish_of_what_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finish", str(MOE), str(MOE)]) == 2
    assert "was not written by xpuquant" in capsys.readouterr().err


def test_finish_after_a_run_that_was_stopped_while_it_cleaned_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(out) == 0
    (out / ".xpuquant" / "files").mkdir(parents=True)
    assert run(["finish", str(MOE), str(out)]) == 0


def test_the_plan_of_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert convert(tmp_path / "out", "--dry-run", "--json", *options) == 0
        plan: dict[str, Any] = json.loads(capsys.readouterr().out)
        return plan

    whole, parts = planned(), [planned("--part", f"{index}/3") for index in (1, 2, 3)]
    assert [part["part"] for part in parts] == ["1/3", "2/3", "3/3"]
    assert [shard for part in parts for shard in part["output"]] == whole["output"]
    assert sum(part["write_bytes"] for part in parts) == whole["write_bytes"]
    assert convert(tmp_path / "out", "--dry-run", "--part", "1/3") == 0
    assert "output shards of part 1/3" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_finish_publishes(hub: Hub, client: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        xpuquant.convert_part(MOE, out, part, max_shard_size=20_000)
    for is_new in (True, False):
        finished = xpuquant.finish(MOE, out, push_to="me/parts")
        assert finished.pushed is not None and finished.is_new is is_new
        assert hub.files("me/parts") == contents(out)


def test_finish_knows_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They may be given again, as they once had to be, where they are the same."""
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        assert convert(out, "--shard", part, "--scale-dtype", "bfloat16") == 0
    finish = ["finish", str(MOE), str(out), "--jobs", "1"]
    for option, value in (("--scale-dtype", "keep"), ("--max-shard-size", "5GB"), ("--layout", "compressed-tensors")):
        assert run([*finish, option, value]) == 2
        error = capsys.readouterr().err
        assert f"was converted with {option} " in error and f"leave {option} out" in error and error.count("\n") == 1
    assert run([*finish, *SMALL, "--scale-dtype", "bfloat16"]) == 0
    record = json.loads((out / "xpuquant.json").read_text())
    assert (record["options"]["scale_dtype"], record["options"]["max_shard_bytes"]) == ("BF16", 20_000)
    assert run(["finish", "--help"]) == 0
    assert "--scale-dtype" not in capsys.readouterr().out


def spoil(note: Path) -> None:
    """Make a note speak of other bytes."""
    said = json.loads(note.read_text())
    said["shards"] = dict.fromkeys(said["shards"], "0" * 64)
    note.write_text(json.dumps(said))


def noted_shards(out: Path) -> set[str]:
    """The shards that the journals of all parts call finished."""
    lines = [line for path in (out / ".xpuquant").glob("*.jsonl") for line in path.read_text().splitlines()]
    return {said["shard"] for line in lines if "nbytes" in (said := json.loads(line))}


@pytest.mark.parametrize("forget", [None, Path.unlink, lambda note: os.truncate(note, 40), spoil])
def test_what_a_part_has_verified_is_compared_once(
    forget: Callable[[Path], object] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte of the source changes, unseen, after the parts were made of it: whoever reads the source again finds that.
    `finish` does so where there is no verdict on the very shards that it found."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(MOE, source)
    for part in ("1/2", "2/2"):
        assert run(["convert", str(source), str(out), *SMALL, "--part", part]) == 0
    weights = source / "model.safetensors"
    status = weights.stat()
    with weights.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(length))["model.norm.weight"]["data_offsets"]
        file.seek(8 + length + start)
        byte = file.read(1)[0]
        file.seek(8 + length + start)
        file.write(bytes([byte ^ 1]))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    for journal in (out / ".xpuquant").glob("*.jsonl"):  # of machines that number the files otherwise
        journal.write_text(journal.read_text().replace(f'"host": "{os.uname().nodename}"', '"host": "another"'))
    notes = [out / ".xpuquant" / Part(index, 2).verified for index in (1, 2)]
    assert all(note.is_file() for note in notes)
    if forget is None:
        assert run(["finish", str(source), str(out)]) == 0
        return
    for note in notes:
        forget(note)
    capsys.readouterr()
    made = noted_shards(out)
    assert run(["finish", str(source), str(out)]) == 1
    assert "model.norm.weight: bytes differ from the source's" in capsys.readouterr().err
    (wrong,) = made - noted_shards(out)
    with safe_open(out / ".xpuquant" / "files" / wrong, "numpy") as shard:
        assert "model.norm.weight" in shard.keys(), "that shard alone is made again"  # noqa: SIM118


@pytest.mark.parametrize("cut", [1, 40, 150])
def test_a_torn_journal_of_a_part_heals(cut: int, tmp_path: Path, wanted: dict[str, str]) -> None:
    out = tmp_path / "parts" / "out"
    for part in ("1/2", "2/2"):
        assert convert(out, "--shard", part) == 0
    journal = out / ".xpuquant" / Part(2, 2).journal
    os.truncate(journal, journal.stat().st_size - cut)
    assert run(["finish", str(MOE), str(out)]) == 3, "a shard is not known to be complete"
    assert convert(out, "--shard", "2/2") == 0
    assert run(["finish", str(MOE), str(out)]) == 0
    assert digests(out) == wanted


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"{}",
        b"7",
        b'{"shard": 1, "sha256": "", "nbytes": 0}',
        b'{"shard": "a", "sha256": "x", "nbytes": 0}',
        *(
            json.dumps({"shard": name, "sha256": "0" * 64, "nbytes": 1}).encode()
            for name in ("../../victim", "..", "", "a\0b", "x" * 5000, "\ud800", "\xe9" * 200)
        ),
        b'{"shard": "a", "sha256": "%s", "nbytes": true}' % (b"0" * 64),
        b"[" * 3000,
        b"\xff",
    ],
    ids=range(15),
)
def test_lines_of_strangers_end_a_journal(line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever reads it: the part, `finish`, or a whole conversion."""
    out = tmp_path / "out"
    assert convert(out, "--shard", "1/2") == 0
    journal = out / ".xpuquant" / Part(1, 2).journal
    sound = journal.read_bytes()
    head, _, rest = sound.partition(b"\n")
    journal.write_bytes(head + b"\n" + line + b"\n" + rest)
    capsys.readouterr()
    assert run(["finish", str(MOE), str(out)]) == 3
    assert "shards have not been made" in capsys.readouterr().err
    assert journal.read_bytes() == head + b"\n"
    assert convert(out, "--shard", "1/2") == 0
    assert journal.read_bytes() == sound
    for first in (line, head[:-1], b'{"plan": "x"}', b'{"plan": "x", "options": {"layout": []}}'):
        journal.write_bytes(first + b"\n" + rest)
        assert run(["finish", str(MOE), str(out)]) == 2
        assert "no part was converted there" in capsys.readouterr().err
        assert convert(out, "--shard", "1/2") == 0


def test_a_whole_conversion_goes_on_from_parts(tmp_path: Path, wanted: dict[str, str]) -> None:
    out = tmp_path / "parts" / "out"
    assert convert(out, "--shard", "2/2") == 0
    made = {path.name: path.stat().st_ino for path in (out / ".xpuquant" / "files").iterdir()}
    assert convert(out) == 0
    assert digests(out) == wanted and made
    assert all((out / name).stat().st_ino == inode for name, inode in made.items())


def test_journals_and_locks_are_no_links(tmp_path: Path) -> None:
    """What is appended to one would land elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("journal.jsonl", Part(1, 2).journal, "lock", "files"):
        out = tmp_path / f"out-{name}"
        (out / ".xpuquant").mkdir(parents=True)
        (out / ".xpuquant" / name).symlink_to(victim)
        assert convert(out, "--shard", "1/2") in (0, 2, 4)
        assert convert(out) in (0, 2, 4)
    assert victim.read_text() == "precious"


def test_a_whole_conversion_does_not_run_beside_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from xpuquant.conversion.runs.parts import PartStaging

    with PartStaging(tmp_path / "out", Part(1, 2)):
        assert convert(tmp_path / "out") == 2
        assert "another conversion is writing there" in capsys.readouterr().err
        assert convert(tmp_path / "out", "--shard", "1/2") == 2
        assert "part 1/2 is being converted already" in capsys.readouterr().err


class TestRay:
    @pytest.fixture(autouse=True)
    def _ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Read when Ray is imported: nodes keep to the loopback address instead of finding out the machine's own.
        monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        pytest.importorskip("ray")

    def test_local(self, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        """The driver compares what lies in two shards, and nothing else: the rest has been, where it was made."""
        plan = make_plan(open_source(str(MOE)).checkpoint, Options(max_shard_size=20_000))
        alone = {m.conversion.name for shard in plan.shards for m in plan.part([shard]).modules}
        compared: list[str] = []
        result = exactness._ModuleCheck.result

        def counted(check: Any) -> Any:
            compared.append(check._planned.conversion.name)
            return result(check)

        def passed(*arguments: object) -> None:
            raise AssertionError("bytes compared on the driver")

        monkeypatch.setattr(exactness._ModuleCheck, "result", counted)
        monkeypatch.setattr(exactness, "_check_bytes", passed)
        assert convert(tmp_path / "ray" / "out", "--ray", "local") == 0
        assert sorted(compared) == sorted({m.conversion.name for m in plan.modules} - alone) and alone
        assert digests(tmp_path / "ray" / "out") == wanted

    def test_no_such_cluster(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert convert(tmp_path / "out", "--ray", "127.0.0.1:1") == 4
        assert "cannot connect" in capsys.readouterr().err

    def test_a_repository_is_read_where_it_was_downloaded(self, hub: Hub, tmp_path: Path) -> None:
        """Workers ask the Hub for nothing: Ray or not, the same requests."""
        hub.seed("producer/model", MOE)
        made, asked = [], []
        for ray in ([], ["--ray", "local"]):
            folder = tmp_path / f"with{len(ray)}"
            folder.mkdir()
            command = [
                sys.executable,
                "-P",
                "-m",
                "xpuquant",
                "convert",
                "producer/model",
                "out",
                *SMALL,
                *ray,
            ]
            subprocess.run(command, cwd=folder, env=hub.environment(folder / "home"), check=True)
            made.append(digests(folder / "out"))
            asked.append(sorted((request.method, request.path) for request in hub.requests()))
            hub.forget_requests()
        assert made[0] == made[1]
        assert asked[0] == asked[1]

    def test_a_node_is_killed_midway(self, tmp_path: Path) -> None:
        """Two real nodes on this machine; one is killed while its worker is writing. Same bytes as a local run."""
        import ray
        from ray.cluster_utils import Cluster
        from support.real_shapes import Model, write_checkpoint

        from xpuquant.conversion.runs.local import convert_checkpoint
        from xpuquant.conversion.runs.ray import execute_on_ray

        source = tmp_path / "source"
        write_checkpoint(source, "gptq", Model(dense=3, moe=1, experts=16, hidden=1024, intermediate=2816))
        options = Options(max_shard_size=2_000_000)
        local = convert_checkpoint(open_source(str(source)), tmp_path / "local", options, jobs=2, verify=False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "node_ip_address": "127.0.0.1"})
        doomed = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        killed = threading.Event()

        def executor(plan, opened, staging, *, jobs, done, progress, read_again):  # type: ignore[no-untyped-def]
            def count(nbytes: int) -> None:
                if not killed.is_set():
                    killed.set()
                    cluster.remove_node(doomed, allow_graceful=False)
                progress(nbytes)

            return execute_on_ray(plan, opened, staging, jobs=1, done=done, progress=count, address=cluster.address)

        try:
            result = convert_checkpoint(
                open_source(str(source)), tmp_path / "ray", options, jobs=1, verify=False, executor=executor
            )
        finally:
            ray.shutdown()
            cluster.shutdown()
        assert killed.is_set() and len(result.shards) > 5
        assert result.shards == local.shards
        left = {path.name for path in (tmp_path / "ray").iterdir()}
        assert not any(name.startswith((".xpuquant", "attempt")) for name in left)


@pytest.mark.parametrize("folder", ["absent", "incomplete"])
def test_a_node_that_does_not_see_the_download(
    folder: str, hub: Hub, client: str, tmp_path: Path, wanted: dict[str, str]
) -> None:
    """It downloads the source's shards it needs, and no others, into its own cache."""
    from huggingface_hub import try_to_load_from_cache
    from support.hub.fixtures import split_shards

    from xpuquant.conversion.runs.ray import Assignment, write_shard

    source = split_shards(MOE, tmp_path / "source", 4)
    commit = hub.seed("producer/model", source)
    if folder == "incomplete":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((source / "config.json").read_bytes())
    options = Options(max_shard_size=20_000)
    plan = make_plan(open_source(str(source)).checkpoint, options)
    assignment = Assignment(
        "producer/model",
        commit,
        tmp_path / folder,
        options,
        plan.digest(f"producer/model@{commit}"),
        tmp_path / "t",
        1,
    )
    (tmp_path / "t").mkdir()
    first = plan.shards[0]
    finished = write_shard(assignment, first.name)
    content = (tmp_path / "t" / STAGING / "files" / first.name).read_bytes()
    assert finished.sha256 == hashlib.sha256(content).hexdigest() == wanted[first.name]
    needed = {part.tensor.file for t in first.tensors for piece in t.pieces for part in piece.inputs}
    shards = {path.name for path in source.glob("*.safetensors")}
    cached = {
        name for name in shards if isinstance(try_to_load_from_cache("producer/model", name, revision=commit), str)
    }
    assert needed == cached < shards


def test_parts_that_are_not_put_together_yet_name_the_command_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        assert convert(out, "--part", part) == 0
    for words in (["verify", str(out)], ["inspect", str(out)], ["push", str(out), "me/x"]):
        capsys.readouterr()
        assert run(words) == 2
        said = capsys.readouterr().err
        assert f"{out}: holds parts of an unfinished conversion" in said and f"xpuquant finish SRC {out}" in said
