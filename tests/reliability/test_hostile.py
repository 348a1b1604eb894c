"""Files from strangers through the command line: one line, exit 2 or 3, no traceback, nothing written, nothing run."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command
from support.fuzz.folder import Folder, dumps, load
from support.fuzz.mutations import KEYS, ODD
from support.fuzz.tally import count
from support.headers import BAD_HEADERS
from support.patterns import EVIL

from xpuquant.formats.safetensors import build_header

GPTQ = FIXTURES / "gptqmodel-qwen3-w4g32"
CT = FIXTURES / "llmcompressor-llama-w4a16"
MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
KINDS = [
    GPTQ,
    CT,
    MOE,
    FIXTURES / "autoround-qwen3-w4g32-asym",
    FIXTURES / "autoround-qwen3-w4g32-asym-as-awq",
    FIXTURES / "autoround-qwen3moe-fp8-block",
    FIXTURES / "llmcompressor-llama-mxfp4",
    FIXTURES / "handpacked-gptoss-mxfp4",
]


def refused(source: Path, out: Path, *codes: int, options: tuple[str, ...] = ()) -> str:
    """Convert, expect one of the exit codes and one clean line, and nothing loadable; returns the line."""
    code, text, error = command("convert", str(source), str(out), "--jobs", "1", *options)
    assert code in codes, (code, error)
    assert error.count("\n") == 1 and error.startswith("error: "), error
    assert error.rstrip("\n").isprintable(), ascii(error)
    assert len(error) < 4200 and "internal error" not in error
    assert not text
    assert not (out / "config.json").exists()
    count("hostile: inputs refused in one line")
    return error


def spoil(tmp_path: Path, change: Callable[[Folder], None], fixture: Path = GPTQ) -> Path:
    folder = load(fixture)
    change(folder)
    folder.write(tmp_path / "source")
    return tmp_path / "source"


class TestHeaders:
    @pytest.mark.parametrize("case", BAD_HEADERS)
    def test_in_one_line(self, case: str, tmp_path: Path) -> None:
        header, data_bytes, message = BAD_HEADERS[case]
        source = spoil(tmp_path, lambda folder: None)
        blob = len(header).to_bytes(8, "little") + header + bytes(data_bytes)
        (source / "model.safetensors").write_bytes(blob)
        assert message in refused(source, tmp_path / "out", 3)

    def test_a_sparse_file_of_exabytes(self, tmp_path: Path) -> None:
        source = spoil(tmp_path, lambda folder: None)
        size = 1 << 43
        try:
            os.truncate(source / "model.safetensors", size)
        except OSError:
            pytest.skip("the file system has no sparse files")
        assert "bytes after its last tensor" in refused(source, tmp_path / "out", 3)

    def test_empty_tensors_and_scalars_pass_through(self, tmp_path: Path) -> None:
        def add(folder: Folder) -> None:
            folder.tensors["empty"] = ("F16", (0, 5), b"")
            folder.tensors["scalar"] = ("F32", (), b"1234")
            folder.tensors["counter"] = ("I64", (), b"12345678")

        code, _, error = command("convert", str(spoil(tmp_path, add)), str(tmp_path / "out"), "--json")
        assert (code, error) == (0, "")
        held = (tmp_path / "out" / "model.safetensors").read_bytes()
        header = json.loads(held[8 : 8 + int.from_bytes(held[:8], "little")])
        assert header["empty"]["shape"] == [0, 5] and header["scalar"]["shape"] == []

    @pytest.mark.parametrize("size", [(0, 0), (0, 8), (8, 0)])
    def test_an_empty_quantized_weight_is_damage(self, size: tuple[int, int], tmp_path: Path) -> None:
        def empty(folder: Folder) -> None:
            for suffix in ("qweight", "scales", "qzeros"):
                name = f"model.layers.0.mlp.down_proj.{suffix}"
                dtype = folder.tensors[name][0]
                folder.tensors[name] = (dtype, size, b"")

        assert "is not empty" in refused(spoil(tmp_path, empty), tmp_path / "out", 3)


INDEXES: dict[str, Callable[[dict[str, str]], Any]] = {
    "up": lambda table: {"weight_map": table | {"a": "../model.safetensors"}},
    "absolute": lambda table: {"weight_map": table | {"a": "/etc/passwd.safetensors"}},
    "below": lambda table: {"weight_map": table | {"a": "sub/model.safetensors"}},
    "backslashes": lambda table: {"weight_map": table | {"a": "..\\model.safetensors"}},
    "not a shard": lambda table: {"weight_map": table | {"a": "config.json"}},
    "a number": lambda table: {"weight_map": table | {"a": 7}},
    "an escape": lambda table: {"weight_map": table | {"a": "\x1b[2J.safetensors"}},
    "nowhere": lambda table: {"weight_map": table | {"a": "model-00009-of-00009.safetensors"}},
    "a tensor that is not there": lambda table: {"weight_map": table | {"\x1b[31mred": next(iter(table.values()))}},
    "a list": lambda table: {"weight_map": list(table)},
    "empty": lambda table: {"weight_map": {}},
    "none": lambda table: {},
    "not an object": lambda table: [table],
    "10^5 files": lambda table: {"weight_map": {str(i): f"{i}.safetensors" for i in range(100_000)}},
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes(case: str, tmp_path: Path) -> None:
    folder = load(GPTQ)
    folder.shards = 2
    folder.index = lambda index: INDEXES[case](index["weight_map"])
    folder.write(tmp_path / "source")
    (tmp_path / "model.safetensors").write_bytes(build_header([], {}))
    refused(tmp_path / "source", tmp_path / "out", 3)


class TestLinks:
    @pytest.mark.parametrize("what", ["model.safetensors", "config.json", "tokenizer.json", "sub"])
    @pytest.mark.parametrize("target", ["/etc/passwd", "/etc", "../secret", "/proc/self/mem", "/dev/zero", "nowhere"])
    def test_out_of_the_folder(self, what: str, target: str, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"secret")
        source = spoil(tmp_path, lambda folder: None)
        (source / what).unlink(missing_ok=True)
        (source / what).symlink_to(target)
        line = refused(source, tmp_path / "out", 2)
        assert what in line and ("out of the folder" in line or "leads nowhere" in line)

    def test_in_a_circle(self, tmp_path: Path) -> None:
        source = spoil(tmp_path, lambda folder: None)
        (source / "a").symlink_to("b")
        (source / "b").symlink_to("a")
        refused(source, tmp_path / "out", 2)

    def test_to_a_folder_inside(self, tmp_path: Path) -> None:
        source = spoil(tmp_path, lambda folder: None)
        (source / "around").symlink_to(".")
        assert "link to a folder" in refused(source, tmp_path / "out", 2)

    def test_of_the_hub_cache_are_followed(self, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
        load(GPTQ).write(snapshot)
        blobs.mkdir()
        for path in sorted(snapshot.iterdir()):
            name = hashlib.sha256(path.read_bytes()).hexdigest()
            path.rename(blobs / name)
            path.symlink_to(Path("../../blobs") / name)
        assert command("convert", str(snapshot), str(tmp_path / "out"))[0] == 0
        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))

    def test_pipes_and_sockets_are_never_opened(self, tmp_path: Path) -> None:
        source = spoil(tmp_path, lambda folder: None)
        os.mkfifo(source / "pipe.json")
        assert command("convert", str(source), str(tmp_path / "out"))[0] == 0
        (source / "config.json").unlink()
        os.mkfifo(source / "config.json")
        assert "config.json: is a pipe, not a file" in refused(source, tmp_path / "out2", 3)


class TestConfigs:
    @pytest.mark.parametrize("fixture", KINDS, ids=lambda path: path.name)
    def test_values_of_any_type(self, fixture: Path, tmp_path: Path) -> None:
        """Each key that any reader looks at, with bad values; scripts/lanes/trust takes more of the product."""
        load(fixture).write(tmp_path / "source")
        path = tmp_path / "source" / "config.json"
        whole = json.loads(path.read_text())
        keys = sorted(set(KEYS) | set(whole["quantization_config"]))
        chosen = random.Random(fixture.name)
        for key in keys:
            for value in chosen.sample(ODD, int(os.environ.get("XPUQUANT_TRUST_VALUES", "2"))):
                config = whole | {"quantization_config": whole["quantization_config"] | {key: value}}
                path.write_bytes(dumps(config))
                code, _, error = command("convert", str(tmp_path / "source"), str(tmp_path / "out"), "--dry-run")
                assert code in (0, 2, 3), (key, value, error)
                assert error.count("\n") <= 1 and error.rstrip("\n").isprintable(), (key, value, error)
                assert "internal error" not in error, (key, value, error)
                count("hostile: config keys with a bad value")

    @pytest.mark.parametrize("value", ODD, ids=lambda value: ascii(value)[:20])
    def test_a_quantization_config_of_any_type(self, value: Any, tmp_path: Path) -> None:
        def change(folder: Folder) -> None:
            folder.config["quantization_config"] = value
            folder.files.pop("quantize_config.json", None)

        source = spoil(tmp_path, change)
        if isinstance(value, dict) and value:
            # The tensors speak for themselves; symmetric zero points are measured.
            assert command("convert", str(source), str(tmp_path / "out"))[0] in (0, 2, 3)
        else:
            refused(source, tmp_path / "out", 2, 3)

    @pytest.mark.parametrize("pattern", [*EVIL, "(", "(" * 3000, "\ud800"], ids=lambda pattern: ascii(pattern)[:30])
    @pytest.mark.parametrize("place", ["dynamic", "extra_config", "targets"])
    def test_regular_expressions(self, place: str, pattern: str, tmp_path: Path) -> None:
        def change(folder: Folder) -> None:
            config = folder.config["quantization_config"]
            long = "model.layers.0." + "a" * 300 + "!"
            for name in list(folder.tensors):
                if ".mlp.down_proj." in name:
                    folder.tensors[name.replace("model.layers.0.mlp.down_proj", long)] = folder.tensors.pop(name)
            if place == "targets":
                config["config_groups"]["group_0"]["targets"] = [f"re:{pattern}", f"re:.*{pattern}"]
            elif place == "extra_config":
                config["extra_config"] = {pattern: {"bits": 4}}
            else:
                config["dynamic"] = {f"+:{pattern}": {"bits": 4}, f".*{pattern}": {}}

        source = spoil(tmp_path, change, {"dynamic": GPTQ, "targets": CT, "extra_config": KINDS[3]}[place])
        began = time.process_time()
        code, _, error = command("convert", str(source), str(tmp_path / "out"), "--dry-run")
        assert code in (0, 2, 3) and "internal error" not in error
        assert error.count("\n") == (code != 0) and error.rstrip("\n").isprintable()
        assert time.process_time() - began < 30
        count("hostile: exploding or broken regular expressions")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"[" * 100_000, "not a JSON object"),
            (b'{"a":' * 500 + b"1" + b"}" * 500, "deep"),
            (b"\xff", "not a JSON"),
            (b'{"a": "\\ud800"}', "surrogates"),
            (b"", "not a JSON"),
            (b"[]", "no object"),
            (b"7", "no object"),
            (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
            (b'{"a": [' + b"[]," * 3_000_000 + b"0]}", "objects and lists"),
            (b" " * (33 << 20), "too large"),
        ],
        ids=range(10),
    )
    def test_json(self, data: bytes, message: str, tmp_path: Path) -> None:
        source = spoil(tmp_path, lambda folder: None)
        (source / "config.json").write_bytes(data)
        assert message in refused(source, tmp_path / "out", 3)

    def test_infinity_in_a_config_is_let_through(self, tmp_path: Path) -> None:
        """Mamba's `time_step_limit` is [0.0, Infinity]."""

        def change(folder: Folder) -> None:
            folder.config["time_step_limit"] = [0.0, float("inf")]

        assert command("convert", str(spoil(tmp_path, change)), str(tmp_path / "out"))[0] == 0
        assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [
            0.0,
            float("inf"),
        ]


class TestNames:
    def test_escapes_never_reach_the_terminal(self, tmp_path: Path) -> None:
        escape = "\x1b]0;owned\x07\x9b31m\u202e"

        def change(folder: Folder) -> None:
            config = folder.config["quantization_config"]
            config |= {"checkpoint_format": escape, "meta": {escape: escape}, "quant_method": f"gptq{escape}"}
            folder.config["architectures"] = [escape]

        source = spoil(tmp_path, change)
        refused(source, tmp_path / "out", 2, 3)
        for arguments in (("inspect",), ("inspect", "--json"), ("convert", "--dry-run")):
            _, text, error = command(arguments[0], str(source), *arguments[1:])
            assert not set(text + error) & set(escape[:1] + "\x07\x9b\u202e"), arguments

    @pytest.mark.parametrize("name", ["\x1b[2J.txt", "a\nb.json", "x\x9b.txt", os.fsdecode(b"\xff.txt")])
    def test_files_with_control_characters(self, name: str, tmp_path: Path) -> None:
        source = spoil(tmp_path, lambda folder: None)
        (source / name).write_bytes(b"")
        assert "control characters" in refused(source, tmp_path / "out", 2)

    @pytest.mark.parametrize("name", ["lock", "journal.jsonl", "config.json.new", "files/lock", "sub/config.json"])
    def test_files_that_are_called_like_ours(self, name: str, tmp_path: Path) -> None:
        source, out = spoil(tmp_path, lambda folder: None), tmp_path / "out"
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"theirs")
        assert command("convert", str(source), str(out))[0] == 0
        assert (out / name).read_bytes() == b"theirs"
        assert not (out / ".xpuquant").exists()

    @pytest.mark.parametrize("number", ["07", "٣", "9" * 5000, "1" * 300, "{0-9}", "-1"])
    def test_numbers_of_experts_and_layers(self, number: str, tmp_path: Path) -> None:
        """Whatever is in the place of a number: every tensor comes out, or nothing does."""

        def change(folder: Folder) -> None:
            for name in list(folder.tensors):
                if ".experts.3." in name:
                    folder.tensors[name.replace(".experts.3.", f".experts.{number}.")] = folder.tensors[name]
                    extra = name.replace("layers.0.mlp.experts.3.", f"layers.{number}.x.")
                    folder.tensors[extra] = folder.tensors[name]

        out = tmp_path / "out"
        code, _, error = command("convert", str(spoil(tmp_path, change, MOE)), str(out), "--json")
        assert code in (0, 2, 3) and "internal error" not in error and error.count("\n") == (code != 0)
        if code == 0:
            code, _, error = command("verify", str(out), "--source", str(tmp_path / "source"))
            assert code == 0, error


class TestNothingRuns:
    def test_code_in_the_source_is_copied_and_never_run(self, tmp_path: Path) -> None:
        witness = tmp_path / "ran"
        code = f"import pathlib; pathlib.Path({str(witness)!r}).write_text('x')\n"

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return exec, (code,)

        def change(folder: Folder) -> None:
            folder.config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}
            folder.config["trust_remote_code"] = True
            for name in (
                "modeling_x.py",
                "conftest.py",
                "sitecustomize.py",
                "numpy.py",
                "__init__.py",
                "setup.py",
            ):
                folder.files[name] = code.encode()
            for name in ("pytorch_model.bin", "training_args.bin", "x.pt", "x.pkl"):
                folder.files[name] = pickle.dumps(Evil())

        source = spoil(tmp_path, change)
        process = subprocess.run(
            [sys.executable, "-P", "-m", "xpuquant", "convert", ".", "../out", "--json"],
            cwd=source,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        assert not witness.exists()
        assert (tmp_path / "out" / "modeling_x.py").read_text() == code
        assert not list((tmp_path / "out").glob("*.bin")) + list((tmp_path / "out").glob("*.p*k*"))

    def test_the_package_has_nothing_that_could(self) -> None:
        """No unpickling, no evaluation, no code from repositories: by the syntax tree, not by hope."""
        import xpuquant
        import xpuquant.conversion
        import xpuquant.formats
        import xpuquant.kernels

        banned = {"eval", "exec", "compile", "__import__"}
        modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
        packages = (xpuquant, xpuquant.conversion, xpuquant.formats, xpuquant.kernels)
        for folder in {place for package in packages for place in package.__path__}:
            paths = list(Path(folder).rglob("*.py"))
            assert paths
            for path in paths:
                text = path.read_text()
                assert "trust_remote_code" not in text, path
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                        assert node.func.id not in banned, (path, node.lineno)
                    if isinstance(node, ast.Import):
                        assert not {name.name for name in node.names} & modules, path
                    if isinstance(node, ast.ImportFrom):
                        assert node.module not in modules, path
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                        assert (node.value.id, node.attr) not in {
                            ("torch", "load"),
                            ("yaml", "load"),
                            ("np", "load"),
                            ("os", "system"),
                            ("os", "popen"),
                        }


class TestPlaces:
    def test_output_in_source_and_source_in_output(self, tmp_path: Path) -> None:
        source = spoil(tmp_path, lambda folder: None)
        for out in (source, source / "out", source / "a" / "b", tmp_path, source / ".." / "source" / "x"):
            code, _, error = command("convert", str(source), str(out))
            assert code == 2 and error.count("\n") == 1, (out, error)
        assert {path.name for path in tmp_path.iterdir()} == {"source"}
        assert not (source / "out").exists() and not (source / ".xpuquant").exists()

    def test_force_removes_only_what_a_conversion_wrote(self, tmp_path: Path) -> None:
        source, out = spoil(tmp_path, lambda folder: None), tmp_path / "out"
        assert command("convert", str(source), str(out), "--max-shard-size", "20kB")[0] == 0
        (out / ".git").mkdir()
        (out / ".git" / "HEAD").write_text("ref")
        (out / "notes.txt").write_text("precious")
        (tmp_path / "beside.txt").write_text("precious")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "file").write_text("precious")
        (out / "linked").symlink_to(tmp_path / "elsewhere")
        record = json.loads((out / "xpuquant.json").read_text())
        record["files"] |= {
            "../beside.txt": "",
            str(tmp_path / "beside.txt"): "",
            "linked/file": "",
            ".": "",
            "": "",
        }
        (out / "xpuquant.json").write_text(json.dumps(record))
        assert command("convert", str(source), str(out), "--force")[0] == 0
        for kept in (
            out / ".git" / "HEAD",
            out / "notes.txt",
            tmp_path / "beside.txt",
            tmp_path / "elsewhere" / "file",
        ):
            assert kept.exists(), kept
        assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()

    def test_a_provenance_file_that_is_none(self, tmp_path: Path) -> None:
        source = spoil(tmp_path, lambda folder: None)
        for i, data in enumerate((b"", b"[]", b'{"shards": 7, "files": [1]}', b"[" * 100_000, b"\xff")):
            out = tmp_path / f"out{i}"
            out.mkdir()
            (out / "xpuquant.json").write_bytes(data)
            assert command("convert", str(source), str(out), "--force")[0] == 0

    def test_journals_of_strangers(self, tmp_path: Path) -> None:
        source = spoil(tmp_path, lambda folder: None)
        (tmp_path / "victim").write_text("precious")
        lines = [
            b"",
            b"\n",
            b"{}\n",
            b"[]\n",
            b'{"plan": 7}\n',
            b"\xff\n",
            b'{"plan": "x"',
            b'{"plan": "x"}\n[]\n',
            b'{"plan": "x"}\n{"shard": "../../victim", "sha256": "", "nbytes": 1}\n',
            b"[" * 100_000 + b"\n",
        ]
        for i, data in enumerate(lines):
            out = tmp_path / f"out{i}"
            (out / ".xpuquant").mkdir(parents=True)
            (out / ".xpuquant" / "journal.jsonl").write_bytes(data)
            code, _, error = command("convert", str(source), str(out), "--force")
            assert code == 0, (data, error)
        assert (tmp_path / "victim").read_text() == "precious"

    def test_a_journal_that_lists_what_is_nobody_s_shard(self, tmp_path: Path) -> None:
        """A staging folder that came with a clone, of this very plan: what it lists besides is not published."""
        source, out = spoil(tmp_path, lambda folder: None), tmp_path / "out"
        assert command("convert", str(source), str(out), "--part", "1/1")[0] == 0
        staging = out / ".xpuquant"
        journal = next(staging.glob("*.jsonl"))
        for name in ("evil.py", "model-00009-of-00009.safetensors", "config.json"):
            (staging / "files" / name).write_bytes(b"evil")
            line = {"shard": name, "sha256": hashlib.sha256(b"evil").hexdigest(), "nbytes": 4}
            with journal.open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert command("finish", str(source), str(out))[0] == 0
        assert not any(path.read_bytes() == b"evil" for path in out.rglob("*") if path.is_file())
        assert command("verify", str(out), "--backend", "reference")[0] == 0


def test_a_million_tensors_through_the_command_line(tmp_path: Path) -> None:
    """XPUQUANT_TRUST_TENSORS of them (a million in scripts/lanes/trust), in bounded memory and time."""
    tensors = int(os.environ.get("XPUQUANT_TRUST_TENSORS", "20000"))
    (tmp_path / "source").mkdir()
    shutil.copy(GPTQ / "config.json", tmp_path / "source")
    header = build_header(((f"x.{i // 1000}.y.{i % 1000}.w", "U8", (1,), 1) for i in range(tensors)), {})
    (tmp_path / "source" / "model.safetensors").write_bytes(header + bytes(tensors))
    program = (
        "import sys; from xpuquant.conversion.cli.app import run; code = run(sys.argv[1:]); "
        "import time; status = open('/proc/self/status').read(); "
        "print(status.partition('VmHWM:')[2].split()[0], time.process_time()); sys.exit(code)"
    )
    process = subprocess.run(
        [sys.executable, "-P", "-c", program, "convert", str(tmp_path / "source"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    kilobytes, seconds = map(float, process.stdout.split()[-2:])
    megabytes = kilobytes / 1024
    # U8 tensors called `w` are nothing quantized that is known: refused, after all of them were looked at.
    assert process.returncode in (2, 3) and process.stderr.count("\n") == 1, process.stderr[:500]
    assert megabytes < 250 + tensors / 1500, megabytes
    assert seconds < 10 + tensors / 40_000, seconds
    count("hostile: tensors of the largest header", tensors)
    count("hostile: its seconds of processor time", round(seconds))
    count("hostile: its megabytes", round(megabytes))
