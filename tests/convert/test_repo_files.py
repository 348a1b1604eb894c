"""Which files of a folder are what; names only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command

from xpuquant.conversion.options import Options
from xpuquant.conversion.repo.checksums import hash_file, is_sealed, seal
from xpuquant.conversion.repo.journal import STAGING, Finished
from xpuquant.conversion.repo.replace import clear_output
from xpuquant.conversion.repo.staging import Staging, check_told_apart
from xpuquant.conversion.sources.quantization import quantization_config
from xpuquant.conversion.sources.repo_files import MAX_COPIED_BYTES, extra_files, find_files, list_files, parse_json
from xpuquant.conversion.sources.weight_files import WeightFiles, parse_index, pick_weight_files
from xpuquant.conversion.tree import Tree
from xpuquant.errors import DamagedError, UsageError


def test_everything_but_weights_and_our_own_files_is_copied() -> None:
    names = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "a/b.jinja",
        "LICENSE",
        "modeling_x.py",
        "merges.txt",
    ]
    weights = [
        "pytorch_model.bin",
        "model.gguf",
        "original/consolidated.pth",
        "x/y.safetensors",
        "onnx/model.onnx",
    ]
    ours = ["README.md", "xpuquant.json", "verify.json", "quantize_config.json", ".gitattributes"]
    copied, left = extra_files([*names, *weights, *ours], WeightFiles(("model.safetensors",)))
    assert set(copied) == set(names) - {"config.json", "model.safetensors"}
    assert set(left) == {*weights, *ours} and all(left.values())


@pytest.mark.parametrize(
    ("present", "index", "message"),
    [
        (["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], None, "shard 2 of 3 is missing"),
        (["model-00001-of-99999.safetensors"], None, "shard 2 of 99999 is missing"),
        ([], {"a": "model.safetensors"}, r"model\.safetensors is missing"),
    ],
)
def test_missing_shards(present: list[str], index: dict[str, str] | None, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        pick_weight_files(present, index, "model.safetensors.index.json" if index else None)


def test_shards_of_two_sets_and_beside_the_index() -> None:
    complete = [
        "a-00001-of-00002.safetensors",
        "a-00002-of-00002.safetensors",
        "b-00001-of-00001.safetensors",
    ]
    assert pick_weight_files(complete, None, None) == WeightFiles(tuple(complete))
    found = pick_weight_files([*complete, "extra.safetensors"], dict.fromkeys("xyz", complete[0]), "i.json")
    assert found.shards == (complete[0],) and len(found.notes) == 3 == len(found.left)


def test_no_weights_and_pickled_ones() -> None:
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        pick_weight_files(["config.json"], None, None)
    with pytest.raises(UsageError, match="never opened"):
        pick_weight_files(["config.json", "pytorch_model.bin"], None, None)


def test_index() -> None:
    assert parse_index({"weight_map": {"a": "x.safetensors"}}, "i") == {"a": "x.safetensors"}
    for bad in (
        {},
        {"weight_map": []},
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": "x.bin"}},
    ):
        with pytest.raises(DamagedError):
            parse_index(bad, "i")


def test_quantization_config_is_found_wherever_producers_put_it() -> None:
    wanted = {"quant_method": "gptq", "bits": 4}
    for config in (
        {"quantization_config": wanted},
        {"text_config": {"quantization_config": wanted}},
        {"compression_config": wanted},
    ):
        assert quantization_config(config, {}) == (wanted, [])
    merged, notes = quantization_config({"quantization_config": wanted}, {"quantize_config.json": {"bits": 3}})
    assert merged["bits"] == 4 and "bits=4" in notes[0]
    assert quantization_config({}, {"quant_config.json": {"zero_point": True}})[0]["quant_method"] == "awq"


def test_json_depth_and_halves_of_characters() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "😀"}
    for bad in (b'{"a": "\\ud83d"}', b'{"a":' * 200 + b"1" + b"}" * 200):
        with pytest.raises(DamagedError):
            parse_json(bad, "x")


def test_hidden_folders_of_tools_are_not_the_model(tmp_path: Path) -> None:
    for name in (".git/HEAD", ".cache/x", ".xpuquant/lock", "__pycache__/x.pyc", "sub/file", "config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert list_files(tmp_path) == ["config.json", "sub/file"]
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        find_files(tmp_path)


SIZES = dict.fromkeys(("a", "b", "c"), 0)


class TestJournal:
    def test_a_line_that_was_cut_short_is_dropped(self, tmp_path: Path) -> None:
        """And what is noted after it is not glued to its stump."""
        with Staging(tmp_path) as staging:
            staging.begin("plan", Options(), SIZES, force=False)
            for name in ("a", "b", "c"):
                (staging.folder / name).write_bytes(b"")
                staging.finish(name, Finished(EMPTY, 0))
            path = tmp_path / STAGING / "journal.jsonl"
            path.write_bytes(path.read_bytes()[:-20])
        with Staging(tmp_path) as staging:
            assert set(staging.begin("plan", Options(), SIZES, force=False)) == {"a", "b"}
            staging.finish("c", Finished(EMPTY, 0))
        with Staging(tmp_path) as staging:
            assert set(staging.begin("plan", Options(), SIZES, force=False)) == {"a", "b", "c"}

    def test_a_shard_that_is_not_what_was_noted_is_made_again(self, tmp_path: Path) -> None:
        with Staging(tmp_path) as staging:
            staging.begin("plan", Options(), SIZES, force=False)
            (staging.folder / "a").write_bytes(b"torn")
            staging.finish("a", Finished(EMPTY, 0))
        with Staging(tmp_path) as staging:
            assert staging.begin("plan", Options(), SIZES, force=False) == {}

    def test_a_shard_of_another_size_than_the_plan_s_is_not_read(self, tmp_path: Path) -> None:
        """A journal may be a stranger's, and a sparse terabyte costs him nothing."""
        with Staging(tmp_path) as staging:
            staging.begin("plan", Options(), SIZES, force=False)
            with (staging.folder / "a").open("wb") as file:
                file.truncate(1 << 40)
            staging.finish("a", Finished(EMPTY, 1 << 40))
        with Staging(tmp_path) as staging:
            assert staging.begin("plan", Options(), SIZES, force=False) == {}

    def test_nothing_is_left_of_a_run_that_was_refused(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "out"):
            pass
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_run_that_waited_does_not_drop_what_another_finished(self, tmp_path: Path) -> None:
        (tmp_path / "xpuquant.json").write_text("{}")
        with Staging(tmp_path) as staging, pytest.raises(UsageError, match="already holds a converted model"):
            staging.begin("plan", Options(), SIZES, force=False)

    def test_an_open_file_that_stays_until_it_is_closed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """NFS and FUSE give a file that is removed while it is open, as the lock is, another name: the folder is not
        empty until it is closed."""

        def kept(path: str, dir_fd: int) -> None:
            shutil.move(tmp_path / STAGING / "lock", tmp_path / STAGING / ".nfs0001")
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

        with Staging(tmp_path) as staging:
            monkeypatch.setattr(shutil, "rmtree", kept)
            staging.drop()
            monkeypatch.undo()
            staging.files.path.rmdir()
            (tmp_path / STAGING / ".nfs0001").unlink()
        assert not any(tmp_path.iterdir())

    def test_the_lock_is_of_the_file_that_is_there(self, tmp_path: Path) -> None:
        """One that another run has just removed locks nobody out."""
        with Staging(tmp_path) as first:
            first.begin("plan", Options(), SIZES, force=False)
            with pytest.raises(UsageError, match="another conversion"), Staging(tmp_path):
                pass


@pytest.fixture
def blind(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk that does not tell capitals: the one that XPUQUANT_CAPITALS_BLIND names (a mounted FAT, an
    APFS), or a folder of an ext4 that is mounted for it, where the kernel has such and this user may."""
    named = os.environ.get("XPUQUANT_CAPITALS_BLIND")
    disk, image = Path(named) if named else tmp_path / "disk", tmp_path / "image"
    folder = disk / f"room-{os.getpid()}"
    if not named:
        disk.mkdir()
        image.touch()
        os.truncate(image, 64 << 20)
        for words in (
            ["mkfs.ext4", "-q", "-O", "casefold", "-E", "encoding=utf8", str(image)],
            ["mount", "-o", "loop", str(image), str(disk)],
            ["mkdir", str(folder)],
            ["chattr", "+F", str(folder)],
        ):
            if shutil.which(words[0]) is None or subprocess.run(words, capture_output=True, check=False).returncode:
                subprocess.run(["umount", "--lazy", str(disk)], capture_output=True, check=False)
                pytest.skip(f"needs root, and a kernel with ext4's casefold: {shlex.join(words)} failed")
    folder.mkdir(exist_ok=True)
    (folder / "a").touch()
    assert (folder / "A").exists(), f"{folder} tells capitals"
    yield folder
    shutil.rmtree(folder)
    if not named:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


TWICE = {
    "NOTES.txt": "notes.txt",
    "Sub/x.txt": "sub/y.txt",
    "Extra": "extra/x.txt",
    "Readme.md": "README.md",
    "Config.json": "config.json",
    "Model-00001-of-00002.safetensors": "model-00001-of-00002.safetensors",
    "re\u0301sume\u0301.txt": "r\u00e9sum\u00e9.txt",
}
"""Names that such a disk takes for one."""


class TestOneNameForTwo:
    @pytest.mark.parametrize("one", TWICE)
    def test_it_is_said(self, one: str, tmp_path: Path) -> None:
        """The lock is found under other capitals too, as on such a disk."""
        with Staging(tmp_path):
            names = ["tokenizer.json", TWICE[one], "sub/z.txt", one]
            check_told_apart(tmp_path, names)
            os.link(tmp_path / STAGING / "lock", tmp_path / STAGING / "LOCK")
            with pytest.raises(UsageError, match="the file system there does not tell"):
                check_told_apart(tmp_path, names)
            check_told_apart(tmp_path, ["sub/a.txt", "sub/b.txt", "config.json", "config.json"])

    def test_on_such_a_disk(self, blind: Path, tmp_path: Path) -> None:
        """Nothing is lost and nothing untrue said: two names that are one there are refused before the work; what has
        none converts, is known, verified and converted again."""
        source, out = tmp_path / "source", blind / "out"
        shutil.copytree(FIXTURES / "gptqmodel-qwen3-w4g32", source)
        (source / "Tokenizer.json").write_text("{}")
        code, _, error = command("convert", str(source), str(out))
        assert code == 2 and "does not tell" in error and "okenizer.json" in error and not any(out.iterdir())
        (source / "Tokenizer.json").unlink()
        for arguments in ([], [], ["--force"]):
            assert command("convert", str(source), str(out), *arguments)[0] == 0
            assert command("verify", str(out), "--source", str(source), "--backend", "reference")[0] == 0
        shutil.copytree(source, blind / "model")
        code, _, error = command("convert", str(blind / "model"), str(blind / "MODEL" / "out"))
        assert code == 2 and "source and output must not lie in each other" in error
        code, _, error = command("convert", str(blind / "model"), str(blind / "Model"), "--force")
        assert code == 2 and "was not written by xpuquant" in error


class TestChecksums:
    def test_a_file_has_one_sha256_whether_or_not_progress_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "shard"
        path.write_bytes(bytes(range(256)) * 40_000)
        told: list[int] = []
        assert (
            hash_file(Tree(tmp_path), "shard", MAX_COPIED_BYTES, told.append)
            == hash_file(Tree(tmp_path), "shard", MAX_COPIED_BYTES)
            == hashlib.sha256(path.read_bytes()).hexdigest()
        )
        assert sum(told) == path.stat().st_size and len(told) > 1

    def test_no_file_has_none_and_no_folder_any(self, tmp_path: Path) -> None:
        assert hash_file(Tree(tmp_path), "nothing", 9) is None
        (tmp_path / "folder").mkdir()
        with pytest.raises(DamagedError, match="is a folder, not a file"):
            hash_file(Tree(tmp_path), "folder", 9)

    def test_a_sealed_file_tells_any_change(self) -> None:
        sealed = seal(b'{"sha256": "' + b"0" * 64 + b'", "files": {"a": "b"}}')
        assert is_sealed(sealed)
        for change in (sealed.replace(b'"b"', b'"c"'), sealed.replace(b"sha256", b"sha512"), b"{}"):
            assert not is_sealed(change)


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_only_what_was_recorded_is_cleared(tmp_path: Path) -> None:
    record = {
        "shards": {"model.safetensors": {}},
        "files": {"sub/a.txt": EMPTY, "sub/mine.txt": "", "../x": EMPTY, "/etc/x": EMPTY, "config.json": ""},
    }
    for name in (
        "model.safetensors",
        "sub/a.txt",
        "sub/mine.txt",
        "adapter_model.safetensors",
        "config.json",
    ):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("")
    (tmp_path / "x").write_text("")
    (tmp_path / "out" / "xpuquant.json").write_text(json.dumps(record))
    clear_output(tmp_path / "out")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"x", "out/sub/mine.txt", "out/adapter_model.safetensors"}
