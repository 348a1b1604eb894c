"""`xpuquant convert` as its users meet it: the result, the messages, interruption and resume."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import typer
from support.checkpoints import FIXTURES

from xpuquant.conversion.cli.app import explain, run
from xpuquant.formats.safetensors import build_header

GPTQ = FIXTURES / "gptqmodel-qwen3-w4g32"
ASYMMETRIC = FIXTURES / "gptqmodel-qwen3-w4g32-asym-v2"
MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a GPTQ checkpoint, to be damaged."""
    return Path(shutil.copytree(GPTQ, tmp_path / "source"))


def convert(source: Path, out: Path, *options: str) -> int:
    return run(["convert", str(source), str(out), "--jobs", "2", *options])


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a failed command printed."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: "), error
    return error


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (value | changes).items() if v is not None}))


def shard_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def rewrite(shard: Path, change: Any) -> None:
    """Rewrite a shard's tensors: `change` gets and returns {name: (dtype, shape, bytes)}."""
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {k: v for k, v in json.loads(raw[8 : 8 + length]).items() if k != "__metadata__"}
    data = raw[8 + length :]
    tensors = {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
    tensors = change(tensors)
    prefix = build_header([(n, d, s, len(b)) for n, (d, s, b) in tensors.items()], {"format": "pt"})
    shard.write_bytes(prefix + b"".join(b for _, _, b in tensors.values()))


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class TestResult:
    def test_repo_is_complete(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        source = Path(shutil.copytree(GPTQ, tmp_path / "source"))
        (source / "tokenizer.json").write_text("{}")
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool.jinja").write_text("x")
        (source / "pytorch_model.bin").write_bytes(b"never opened")
        assert convert(source, out) == 0
        held = set(files(out))
        assert {"config.json", "model.safetensors", "README.md", "xpuquant.json", "verify.json"} <= held
        assert {"tokenizer.json", "additional_chat_templates/tool.jinja", "generation_config.json"} <= held
        assert not held & {"pytorch_model.bin", "quantize_config.json"}
        assert not (out / ".xpuquant").exists()
        left = json.loads((out / "xpuquant.json").read_text())["left_files"]
        assert left["pytorch_model.bin"] == "weights of another format"

    def test_config_names_exact_modules(self, tmp_path: Path) -> None:
        assert convert(MOE, tmp_path / "out") == 0
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        quantization = config["quantization_config"]
        assert quantization["quant_method"] == "xpuquant" and quantization["format_version"] == 1
        names = [name for scheme in quantization["schemes"] for name in scheme["modules"]]
        assert "model.layers.0.mlp.experts" in names
        assert not any(name.rpartition("layers.0.")[2] == "mlp.gate" for name in names), "the router is not quantized"
        source = json.loads((MOE / "config.json").read_text())
        assert {k: v for k, v in config.items() if k != "quantization_config"} == {
            k: v for k, v in source.items() if k != "quantization_config"
        }

    @pytest.mark.parametrize(("part", "names"), [(3, 1), (1.5, 2), (0.9, 2), (0.4, 3)])
    def test_shards_are_even_and_one_is_at_most_half_full(self, tmp_path: Path, part: float, names: int) -> None:
        convert(GPTQ, tmp_path / "whole", "--max-shard-size", "1GB")
        whole = (tmp_path / "whole" / "model.safetensors").stat().st_size
        assert convert(GPTQ, tmp_path / "out", "--max-shard-size", f"{int(part * whole)}B") == 0
        sizes = [shard.stat().st_size for shard in (tmp_path / "out").glob("*.safetensors")]
        assert len(sizes) == names and max(sizes) < 2 * min(sizes)

    def test_recorded_hashes_are_those_of_the_files(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert convert(GPTQ, out, "--max-shard-size", "40kB") == 0
        record, held = json.loads((out / "xpuquant.json").read_text()), files(out)
        assert len(record["shards"]) > 1
        for name, entry in record["shards"].items():
            assert (held[name], (out / name).stat().st_size) == (entry["sha256"], entry["bytes"])
        assert record["files"].items() <= held.items()
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(record["shards"])

    def test_modes_follow_the_umask(self, tmp_path: Path) -> None:
        old = os.umask(0o022)
        try:
            assert convert(GPTQ, tmp_path / "out") == 0
        finally:
            os.umask(old)
        for name in ("model.safetensors", "config.json", "xpuquant.json"):
            assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o644

    def test_bytes_do_not_depend_on_jobs_or_folder(self, tmp_path: Path) -> None:
        size = ["--max-shard-size", "50kB"]
        assert run(["convert", str(MOE), str(tmp_path / "a" / "x"), "--jobs", "1", *size]) == 0
        assert run(["convert", str(MOE), str(tmp_path / "b" / "x"), "--jobs", "7", *size]) == 0
        a, b = files(tmp_path / "a"), files(tmp_path / "b")
        assert {k: v for k, v in a.items() if "README" not in k} == {k: v for k, v in b.items() if "README" not in k}

    def test_scales_keep_their_dtype_or_are_rounded_when_asked(self, tmp_path: Path) -> None:
        for option, label in (("keep", "F16"), ("bfloat16", "BF16"), ("float32", "F32")):
            out = tmp_path / option
            assert convert(GPTQ, out, "--scale-dtype", option) == 0
            schemes = json.loads((out / "config.json").read_text())["quantization_config"]["schemes"]
            assert {scheme["scale_dtype"] for scheme in schemes} == {label}
            assert json.loads((out / "verify.json").read_text())["passed"] is True

    def test_dry_run_writes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert convert(GPTQ, tmp_path / "out", "--dry-run") == 0
        assert "int4_gemm_w4a16" in capsys.readouterr().out
        assert not (tmp_path / "out").exists()

    def test_json_is_one_object(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert convert(GPTQ, tmp_path / "out", "--json") == 0
        data = json.loads(capsys.readouterr().out)
        assert data["verification"]["passed"] is True
        assert data["modules"]["model.layers.0.mlp.down_proj"]["scheme"] == "int4_linear g32"


class TestMessages:
    """Each bad input: exit code, one line that names the file or tensor and the fix, nothing that looks whole."""

    def expect(
        self,
        capsys: pytest.CaptureFixture[str],
        source: Path,
        code: int,
        *parts: str,
        out: Path | None = None,
    ) -> None:
        target = out or source.parent / "out"
        before = files(source) if source.is_dir() else {}
        assert convert(source, target) == code
        error = failure(capsys)
        for part in parts:
            assert part in error
        assert not (target / "config.json").exists()
        assert (files(source) if source.is_dir() else {}) == before, "the source is never touched"

    def test_no_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.expect(capsys, tmp_path / "nowhere" / "at" / "all", 2, "no such folder")

    def test_no_quantization_config(self, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        edit_json(source / "config.json", quantization_config=None)
        (source / "quantize_config.json").unlink(missing_ok=True)
        self.expect(capsys, source, 2, "no quantization config", "quantize_config.json")

    def test_unknown_method(self, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        edit_json(source / "config.json", quantization_config={"quant_method": "bitsandbytes"})
        self.expect(capsys, source, 2, "quant_method 'bitsandbytes' is not supported", "gptq")

    def test_already_converted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert convert(GPTQ, tmp_path / "once") == 0
        capsys.readouterr()
        assert convert(tmp_path / "once", tmp_path / "twice") == 2
        assert "already converted" in failure(capsys)

    def test_missing_shard(self, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        index = {"weight_map": {"a": shard_of(source).name, "b": "model-00002-of-00002.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        self.expect(capsys, source, 3, "model-00002-of-00002.safetensors is missing", "download it again")

    def test_truncated_shard(self, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        os.truncate(shard_of(source), shard_of(source).stat().st_size - 5)
        self.expect(capsys, source, 3, "is truncated", "download it again")

    def test_tensor_missing(self, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        gone = "model.layers.0.mlp.up_proj.scales"
        rewrite(shard_of(source), lambda tensors: {k: v for k, v in tensors.items() if k != gone})
        self.expect(capsys, source, 3, f"{gone} is missing")

    def test_tensor_of_the_wrong_shape(self, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        name = "model.layers.0.mlp.up_proj.qzeros"

        def cut(tensors: dict[str, Any]) -> dict[str, Any]:
            dtype, (rows, columns), data = tensors[name]
            return tensors | {name: (dtype, (rows - 1, columns), data[: -columns * 4])}

        rewrite(shard_of(source), cut)
        self.expect(capsys, source, 3, name, "rows")

    def test_qzeros_absent_where_asymmetric(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = Path(shutil.copytree(ASYMMETRIC, tmp_path / "source"))
        gone = "model.layers.0.mlp.up_proj.qzeros"
        rewrite(shard_of(source), lambda tensors: {k: v for k, v in tensors.items() if k != gone})
        self.expect(capsys, source, 3, gone, "missing", "symmetric")

    def test_pickled_weights(self, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shard_of(source).rename(source / "pytorch_model.bin")
        self.expect(capsys, source, 2, "pytorch_model.bin", "never opened", "safe_serialization=True")

    def test_output_is_not_ours(self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "holiday"
        out.mkdir()
        (out / "photo.jpg").write_bytes(b"precious")
        for option in ("--force", "--no-verify"):
            assert convert(source, out, option) == 2
            assert "was not written by xpuquant" in failure(capsys)
        assert (out / "photo.jpg").read_bytes() == b"precious"

    def test_output_is_finished(self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        assert convert(source, out) == 0
        before = files(out)
        capsys.readouterr()
        assert convert(source, out) == 0
        assert "finished already" in capsys.readouterr().out
        assert convert(source, out, "--scale-dtype", "bfloat16") == 2
        assert "pass --force" in failure(capsys)
        assert files(out) == before
        assert convert(source, out, "--force") == 0
        assert files(out) == before

    def test_disk_too_small(
        self, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(source)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        self.expect(capsys, source, 4, "free", "choose another disk")

    def test_bad_options(self, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for option, value, part in (
            ("--max-shard-size", "5 bananas", "5 bananas': want a size"),
            ("--scale-dtype", "int3", "want float16, bfloat16, float32"),
            ("--layout", "marlin", "want one of xpu"),
            ("--on-unsupported", "pray", "want one of refuse, dequantize"),
        ):
            assert convert(source, source.parent / "out", option, value) == 2
            assert part in failure(capsys)


class TestInterruption:
    def test_finished_shards_are_not_made_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from xpuquant.conversion.write import shard_writer

        out = tmp_path / "out"
        written: list[str] = []
        run = shard_writer.ShardWriter.run

        def failing(self: Any) -> Any:
            written.append(self._shard.name)
            if len(written) == 3:
                raise KeyboardInterrupt
            return run(self)

        monkeypatch.setattr(shard_writer.ShardWriter, "run", failing)
        options = ["--max-shard-size", "20kB", "--jobs", "1"]
        assert convert(MOE, out, *options) == 130
        assert not (out / "config.json").exists()
        first = written[:2]
        assert convert(MOE, out, *options) == 0
        assert not set(written[3:]) & set(first)

    def test_unfinished_output_of_something_else(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        (out / ".xpuquant").mkdir(parents=True)
        (out / ".xpuquant" / "journal.jsonl").write_text('{"plan": "of another", "options": {}}\n')
        assert convert(GPTQ, out) == 2
        assert "unfinished conversion of another source" in failure(capsys)
        assert convert(GPTQ, out, "--force") == 0

    def test_two_runs_into_one_output(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from xpuquant.conversion.repo.staging import Staging

        with Staging(tmp_path / "out"):
            assert convert(GPTQ, tmp_path / "out") == 2
        assert "another conversion is writing there" in failure(capsys)

    def test_failed_verification_leaves_nothing_loadable(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from xpuquant.formats.packing import convert_loops as _packing

        def corrupt(source: Any, out: Any) -> None:
            out[...] = source.T
            out[0, 0] ^= 1

        monkeypatch.setattr(_packing, "transpose_words", corrupt)
        assert convert(GPTQ, tmp_path / "out") == 1
        error = failure(capsys)
        assert "verification failed: model.layers.0." in error and "code [0, 0]" in error
        assert not (tmp_path / "out" / "config.json").exists()
        assert not list((tmp_path / "out").glob("*.safetensors"))
        assert (tmp_path / "out" / ".xpuquant" / "files" / "verify.json").exists(), "all that failed"

        monkeypatch.undo()
        assert convert(GPTQ, tmp_path / "out") == 0, "what was found wrong is not gone on with"
        assert "kept" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "end"),
    [(name, "again to resume") for name in ("convert", "finish", "push")]
    + [(name, "again") for name in ("verify", "inspect", "diff", "explain", "doctor")],
)
def test_an_interrupt_promises_to_resume_only_what_resumes(command: str, end: str) -> None:
    said, code = explain(typer.Abort(), [command, "SRC"])
    assert code == 130 and said == f"interrupted; run the same command {end}"
