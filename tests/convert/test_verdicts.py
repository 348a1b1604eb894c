"""The three verdicts: only what was checked passes, everything beside the weights is compared, and what was never
verified is not published by mistake."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support.injected_faults as inject
from support.checkpoints import FIXTURES
from support.fuzz.case import command
from support.fuzz.tally import count

import xpuquant
from xpuquant.conversion.hub.publish import never_verified
from xpuquant.conversion.report.markdown import checks
from xpuquant.conversion.report.sentences import headline
from xpuquant.conversion.verify.contents import differences
from xpuquant.conversion.verify.foreign import loadable
from xpuquant.conversion.verify.proof import Checked, Claim, Rounding
from xpuquant.conversion.verify.verdict import Agreement, Demands, Finding, Outcome, Verdict
from xpuquant.kernels import backends

SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32"
MOE = FIXTURES / "gptqmodel-qwen3moe-w4g32"
NO_KERNEL = FIXTURES / "llmcompressor-llama-fp8-block-ragged"
ABSENT = [name for name, backend in backends().items() if backend.unavailable() is not None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all that repos hold beside weights."""
    folder = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(SOURCE, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_x.py").write_text("pass\n")
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    options = {
        "exact": (str(source), "--max-shard-size", "60kB"),
        "rounded": (str(source), "--scale-dtype", "bfloat16"),
        "dequantized": (str(NO_KERNEL), "--on-unsupported", "dequantize"),
        "portable": (str(source), "--layout", "compressed-tensors"),
        "unverified": (str(source), "--no-verify"),
    }
    for name, (checkpoint, *more) in options.items():
        code, _, error = command("convert", checkpoint, str(folder / name), "--jobs", "1", *more)
        assert code == 0, error
    return {name: folder / name for name in options}


def verify(folder: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, verify.json, what was said on standard error)."""
    code, text, error = command("verify", str(folder), "--jobs", "1", "--json", *more)
    assert error.count("\n") == (code != 0) and "internal error" not in error, error
    return code, json.loads(text), error


class TestOutcomes:
    @pytest.mark.parametrize("name", ["exact", "rounded", "portable", "dequantized"])
    def test_verified_with_the_source_and_against_the_record(
        self, name: str, made: dict[str, Path], source: Path
    ) -> None:
        origin = str(NO_KERNEL if name == "dequantized" else source)
        code, said, _ = verify(made[name], "--backend", "reference", "--source", origin)
        assert (code, said["verdict"], said["passed"], said["not_checked"]) == (0, "verified", True, [])
        assert said["sentence"].startswith("verified against every value of the source")
        code, later, _ = verify(made[name], "--backend", "reference")
        assert (code, later["verdict"]) == (0, "verified")
        assert later["sentence"].startswith("verified against the digests recorded at conversion")
        assert "only a comparison with the source" in later["sentence"]
        matrices = later["exact"]["matrices_by_claim"]["recorded"]
        assert matrices == sum(
            n
            for claim, n in said["exact"]["matrices_by_claim"].items()
            if claim in ("exact", "scales rounded", "dequantized")
        )
        assert "exactly" not in later["sentence"]
        assert ("exactly" in said["sentence"]) == (said["exact"]["matrices_by_claim"].get("exact", 0) > 0)
        assert ("exactly" in said["sentence"]) == (name != "rounded")

    def test_rounded_and_dequantized_are_said_later_too(self, made: dict[str, Path]) -> None:
        assert "with scales rounded to bfloat16 (" in verify(made["rounded"])[1]["sentence"]
        assert "of them dequantized to bf16" in verify(made["dequantized"])[1]["sentence"]

    def test_not_verified_is_its_own_exit_code(self, made: dict[str, Path], source: Path) -> None:
        code, said, error = verify(made["unverified"], "--backend", "reference")
        assert (code, said["verdict"], said["passed"], said["failures"]) == (5, "not verified", False, [])
        assert "compared with nothing" in error and said["exact"]["matrices_by_claim"] == {"not checked": 7}
        assert verify(made["unverified"], "--source", str(source))[0] == 0

    def test_require_exact(self, made: dict[str, Path], source: Path) -> None:
        asked = ("--require-exact", "--backend", "reference")
        assert verify(made["exact"], *asked, "--source", str(source))[0] == 0
        code, _, error = verify(made["exact"], *asked)
        assert code == 5 and "compared with its own record only" in error
        for name, origin, what in (("rounded", source, "scales rounded"), ("dequantized", NO_KERNEL, "dequantized")):
            for more in (("--source", str(origin)), ()):
                code, _, error = verify(made[name], *asked, *more)
                assert code == 1 and what in error
        verdict = xpuquant.verify(made["rounded"], source=source, backends=["reference"], require_exact=True)
        assert verdict.outcome is Outcome.FAILED

    def test_a_kernel_that_was_named_has_to_run(self, made: dict[str, Path]) -> None:
        for name in ABSENT:
            code, said, error = verify(made["exact"], "--require-backend", name)
            assert code == 5 and name in error and said["verdict"] == "not verified"
            assert command("verify", str(made["exact"]), "--backend", name)[0] == 4
        assert verify(made["exact"], "--require-backend", "reference", "--backend", "reference", "--all")[0] == 0
        code, _, error = verify(made["exact"], "--require-backend", "reference", "--backend", "reference")
        assert code == 5 and "reference: computed" in error, "it computes one module of each shape"
        assert command("verify", str(made["exact"]), "--require-backend", "cuda")[0] == 2

    @pytest.mark.skipif(backends()["onednn"].unavailable() is not None, reason="oneDNN is not installed")
    def test_a_kernel_that_ran_and_computed_every_module(self, made: dict[str, Path]) -> None:
        assert verify(made["exact"], "--require-backend", "onednn")[0] == 0

    def test_convert_reports_integrity_of_its_own(self, made: dict[str, Path]) -> None:
        said = json.loads((made["exact"] / "verify.json").read_text())
        assert said["integrity"]["shards_read_again"] == len(list(made["exact"].glob("*.safetensors"))) > 1
        assert "| integrity | pass | headers and sizes of" in (made["exact"] / "verify.md").read_text()

    def test_convert_without_verification_says_what_it_did_not_do(self, tmp_path: Path, source: Path) -> None:
        code, text, _ = command("convert", str(source), str(tmp_path / "out"), "--no-verify", "--json")
        assert code == 0 and json.loads(text)["proof"] == {"verdict": "not verified", "matrices": {"not checked": 7}}
        made = (tmp_path / "out" / "README.md").read_text().partition("## How it was made")[2]
        assert f"xpuquant convert {source.name} out --no-verify\n" in made
        code, text, _ = command("convert", str(MOE), str(tmp_path / "moe"), "--no-verify")
        words = " ".join(text.split())
        assert (
            code == 0
            and "not verified" in words
            and "matrices compared with nothing" in words
            and "exactly" not in words
        )
        card = (tmp_path / "moe" / "README.md").read_text()
        assert "exactly" not in card and "--no-verify" in card


def verdicts() -> Iterator[Verdict]:
    """Verdicts of every kind that the sentences have to tell apart."""
    ran = Agreement("onednn", "m", "linear", None, "s", 8, 32, 8, (1,), "F32", 1e-7, 1e-7, tolerance=1e-6)
    everything = [
        [],
        *(
            [Checked("m", 2, error, "00", claim, rounding, recorded)]
            for error in (None, "differs")
            for claim, rounding, recorded in (
                (Claim.EXACT, None, None),
                (Claim.ROUNDED, Rounding("F16", 9, 3, 0.1), None),
                (Claim.DEQUANTIZED, Rounding("BF16", 9, 3, 0.1), None),
                (Claim.RECORDED, None, Claim.EXACT),
                (Claim.RECORDED, Rounding("F16", 9, 3, 0.1), Claim.ROUNDED),
                (Claim.RECORDED, None, Claim.DEQUANTIZED),
                (Claim.NOT_CHECKED, None, None),
            )
        ),
    ]
    demands = [
        Demands(),
        Demands(exact=True),
        Demands(backends=("ark",)),
        Demands(required=("onednn",)),
        Demands(backends=("onednn",)),
    ]
    for exact in everything:
        for demand in demands:
            for kernels in ([], [ran], [replace(ran, backend="reference")], [replace(ran, deviation=1.0)]):
                for unavailable in ({}, {"ark": "is not installed", "onednn": "is not installed"}):
                    for findings in (
                        [],
                        [Finding("integrity", "f", "changed")],
                        [Finding("sanity", "m", "odd", False)],
                    ):
                        yield Verdict(
                            "r",
                            "p",
                            "the source",
                            3,
                            exact=exact,
                            kernels=kernels,
                            unavailable=unavailable,
                            findings=findings,
                            schemes={"m": "s"},
                            demands=demand,
                        )


def test_every_sentence_is_true_of_what_it_is_made_of() -> None:
    """An oracle of its own decides from the parts what may be said."""
    for verdict in verdicts():
        count("verdicts judged by an oracle of its own")
        wrong = any(f.fails for f in verdict.findings) or any(c.error for c in verdict.exact)
        wrong = wrong or any(run.deviation > run.tolerance for run in verdict.kernels)
        held = {c.claim if c.claim is not Claim.RECORDED else c.recorded for c in verdict.exact if c.error is None}
        lossy = {Claim.ROUNDED, Claim.DEQUANTIZED} & held
        wrong = wrong or bool(verdict.demands.exact and lossy)
        against_record = any(c.claim is Claim.RECORDED for c in verdict.exact)
        computed = {run.backend for run in verdict.kernels}
        named = {*verdict.demands.backends, *verdict.demands.required}
        missing = not verdict.exact or Claim.NOT_CHECKED in held or (verdict.demands.exact and against_record)
        missing = missing or bool(named - computed) or bool(named & verdict.unavailable.keys())
        expected = Outcome.FAILED if wrong else Outcome.NOT_VERIFIED if missing else Outcome.VERIFIED
        assert verdict.outcome is expected and verdict.passed == (expected is Outcome.VERIFIED)
        sentence = headline(verdict)
        assert sentence.startswith(
            {"verified": "verified against", "failed": "failed: "}.get(expected, "not verified: ")
        )
        exact_now = any(c.claim is Claim.EXACT and c.error is None for c in verdict.exact)
        assert "exactly" not in sentence or exact_now
        rows = {row[0]: row for row in checks(verdict)}
        real = computed - {"reference"}
        assert rows["kernels"][1].startswith("pass") == bool(
            real
            and not any(r.deviation > r.tolerance for r in verdict.kernels)
            and not (named - computed)
            and not (named & verdict.unavailable.keys())
        )
        assert not rows["exactness"][1].startswith("pass") or (held and Claim.NOT_CHECKED not in held)
        assert "by no real kernel" not in str(rows)


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "rope": ("rope_theta", lambda c: c.update(rope_theta=5.0)),
    "tie flag": ("tie_word_embeddings", lambda c: c.update(tie_word_embeddings=not c.get("tie_word_embeddings"))),
    "epsilon": ("rms_norm_eps", lambda c: c.update(rms_norm_eps=0.1)),
    "heads": ("num_attention_heads", lambda c: c.update(num_attention_heads=1)),
    "code": ("auto_map", lambda c: c.update(auto_map={"AutoModel": "x.Y"})),
    "end": ("eos_token_id", lambda c: c.update(eos_token_id=7)),
    "class": ("architectures", lambda c: c.update(architectures=["Other"])),
    "a key less": ("hidden_act", lambda c: c.pop("hidden_act")),
}
QUANTIZATION: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "bits": ("num_bits", lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=8)),
    "type": ("type", lambda q: q["config_groups"]["group_0"]["weights"].update(type="float")),
    "symmetric": ("symmetric", lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False)),
    "format": ("format", lambda q: q.update(format="dense")),
    "ignore": ("ignore", lambda q: q.update(ignore=["lm_head", "re:.*"])),
    "cache": ("kv_cache_scheme", lambda q: q.update(kv_cache_scheme={"num_bits": 8})),
    "block": ("block size is 1", lambda q: q["config_groups"]["group_0"]["weights"].update(block_structure=1)),
    "group": ("group_size", lambda q: q["config_groups"]["group_0"]["weights"].update(group_size="x")),
}


class TestContents:
    def check(self, folder: Path, source: Path, named: str) -> None:
        """After the hashes were recorded again, only the source can tell."""
        inject.reseal(folder)
        code, said, error = verify(folder, "--source", str(source), "--backend", "reference")
        assert code in (1, 3), error
        assert any(named in line for line in said["failures"]), said["failures"]
        count("contents: changes with hashes recorded again, found with the source")

    @pytest.mark.parametrize("change", CHANGES)
    def test_config(self, change: str, made: dict[str, Path], source: Path, tmp_path: Path) -> None:
        repo = inject.copy(made["exact"], tmp_path / "repo")
        named, edit = CHANGES[change]
        repo.json("config.json", edit)
        self.check(repo.folder, source, named)

    def test_layout_of_ours(self, made: dict[str, Path], source: Path, tmp_path: Path) -> None:
        repo = inject.copy(made["exact"], tmp_path / "repo")
        repo.json("config.json", lambda c: c["quantization_config"].update(layout="other"))
        self.check(repo.folder, source, "quantization_config.layout")

    @pytest.mark.parametrize("change", QUANTIZATION)
    def test_keys_of_compressed_tensors(self, change: str, made: dict[str, Path], source: Path, tmp_path: Path) -> None:
        repo = inject.copy(made["portable"], tmp_path / "repo")
        named, edit = QUANTIZATION[change]
        repo.json("config.json", lambda c: edit(c["quantization_config"]))
        self.check(repo.folder, source, named)

    @pytest.mark.parametrize(
        "name", ["tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_x.py"]
    )
    @pytest.mark.parametrize("how", ["changed", "removed"])
    def test_copied_files(self, name: str, how: str, made: dict[str, Path], source: Path, tmp_path: Path) -> None:
        repo = inject.copy(made["exact"], tmp_path / "repo")
        if how == "changed":
            (repo.folder / name).write_text("other")
        else:
            (repo.folder / name).unlink()
            repo.json("xpuquant.json", lambda record: record["files"].pop(name))
        self.check(repo.folder, source, name)

    def test_added_and_recorded(self, made: dict[str, Path], source: Path, tmp_path: Path) -> None:
        repo = inject.copy(made["exact"], tmp_path / "repo")
        (repo.folder / "modeling_y.py").write_text("import os")
        repo.json("xpuquant.json", lambda record: record["files"].update({"modeling_y.py": ""}))
        self.check(repo.folder, source, "modeling_y.py")

    def test_metadata_of_a_shard(self, made: dict[str, Path], source: Path, tmp_path: Path) -> None:
        repo = inject.copy(made["exact"], tmp_path / "repo")
        path = next(repo.folder.glob("*.safetensors"))
        header, start = inject.read_header(path)
        header["__metadata__"]["note"] = "other"
        data = path.read_bytes()[start:]
        inject.write_header(path, header, data)
        size = path.stat().st_size
        repo.json("xpuquant.json", lambda record: record["shards"][path.name].update(bytes=size))
        self.check(repo.folder, source, "__metadata__.note is 'other'")

    def test_a_key_that_stands_twice(self, made: dict[str, Path], source: Path, tmp_path: Path) -> None:
        """The first is taken by some loaders, the last by Python."""
        repo = inject.copy(made["exact"], tmp_path / "repo")
        path = repo.folder / "config.json"
        path.write_text(path.read_text().replace("{", '{"architectures": ["Other"],', 1))
        self.check(repo.folder, source, "names 'architectures' twice")

    def test_recorded_again_is_found_with_the_source_alone(
        self, made: dict[str, Path], source: Path, tmp_path: Path
    ) -> None:
        """Who can write all files can write the records: what then passes says against what."""
        repo = inject.copy(made["exact"], tmp_path / "repo")
        repo.json("config.json", lambda c: c.update(rope_theta=5.0))
        inject.reseal(repo.folder)
        code, said, _ = verify(repo.folder, "--backend", "reference")
        assert code == 0 and said["sentence"].startswith("verified against the digests recorded at conversion")
        assert "only a comparison with the source" in said["sentence"]
        self.check(repo.folder, source, "rope_theta")

    def test_differences_are_named(self) -> None:
        held = {"a": 1, "b": [1, {"c": 2}], "d": float("nan"), "e": 1}
        assert list(differences(held, held)) == []
        assert list(differences({"a": 1.0}, {"a": 1})) == ["a is 1, the source gives 1.0"]
        assert list(differences({"b": [1, {"c": 2}]}, {"b": [1, {"c": 3}]})) == ["b[1].c is 3, the source gives 2"]
        assert list(differences({}, {"x": True})) == ["x is True, the source gives no such key"]


FOREIGN = [
    "x.py",
    "deep/er/x.py",
    "__pycache__/x.cpython-312.pyc",
    ".cache/x.py",
    ".git/hooks/x.py",
    ".hidden/x.so",
    "lib.so.1",
    "model.pkl",
    "a/model.pth",
    "model.ckpt",
    "pytorch_model.bin",
    ".cache/x.pt",
    "x.npy",
    "X.PKL",
    ".xpuquant/x.pkl",
    "chat_template.jinja2",
    "other.jinja",
    "additional_chat_templates/x.jinja",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.model",
    "generation_config.json",
    "other.safetensors",
    "x.gguf",
]


class TestForeignFiles:
    @pytest.mark.parametrize("name", FOREIGN)
    def test_fails_by_name(self, name: str, made: dict[str, Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(made["rounded"], tmp_path / "out"))
        (folder / "generation_config.json").unlink()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        if name == "generation_config.json":
            repo = inject.Repo(folder)
            repo.json("xpuquant.json", lambda record: record["files"].pop(name))
            inject.reseal(folder)
        code, said, _ = verify(folder, "--backend", "reference")
        assert code in (1, 3) and any(name in line and "may" in line for line in said["failures"]), said["failures"]

    @pytest.mark.parametrize(
        "name", ["notes.txt", "eval.json", "picture.png", ".git/config", ".git/refs/heads/fix.py", ".cache/x.lock"]
    )
    def test_others_do_not(self, name: str, made: dict[str, Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(made["exact"], tmp_path / "out"))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
        assert verify(folder, "--backend", "reference")[0] == 0
        assert loadable(name) is None


class TestRunAgain:
    """What was finished without verification is not taken for the end of a call that asks for it."""

    @pytest.mark.parametrize("words", [("convert",), ("finish",), ("convert", "-q"), ("convert", "--push-to", "me/x")])
    def test_what_was_never_verified_is_not_passed_on(
        self, words: tuple[str, ...], source: Path, made: dict[str, Path]
    ) -> None:
        name, *options = words
        code, said, error = command(name, str(source), str(made["unverified"]), *options)
        assert code == 5 and said == "" and "--force" in error and error.count("\n") == 1
        with pytest.raises(xpuquant.NotVerifiedError, match="force=True"):
            xpuquant.convert(source, made["unverified"])

    def test_it_is_left_alone_where_no_verification_is_asked_for(self, source: Path, made: dict[str, Path]) -> None:
        for name in ("convert", "finish"):
            assert command(name, str(source), str(made["unverified"]), "--no-verify")[0] == 0

    def test_force_verifies_it(self, source: Path, made: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "out"
        shutil.copytree(made["unverified"], out)
        code, said, error = command("convert", str(source), str(out), "--force", "--json")
        assert (code, error) == (0, "") and json.loads(said)["proof"]["verdict"] == "verified"
        assert not never_verified(out) and command("convert", str(source), str(out))[0] == 0

    @pytest.mark.parametrize("name", ["rounded", "dequantized", "portable"])
    def test_what_was_verified_is_finished(self, name: str, source: Path, made: dict[str, Path]) -> None:
        options = {
            "rounded": xpuquant.Options(scale_dtype="BF16"),
            "dequantized": xpuquant.Options(on_unsupported="dequantize"),
            "portable": xpuquant.Options(layout="compressed-tensors"),
        }[name]
        checkpoint = NO_KERNEL if name == "dequantized" else source
        assert not xpuquant.convert(checkpoint, made[name], options=options).is_new


class TestPush:
    def test_what_was_never_verified_needs_a_word(self, made: dict[str, Path], tmp_path: Path) -> None:
        code, _, error = command("push", str(made["unverified"]), "me/x")
        assert code == 5 and "--unverified" in error and error.count("\n") == 1
        with pytest.raises(xpuquant.NotVerifiedError):
            xpuquant.push(made["unverified"], "me/x")
        code, _, error = command("convert", str(SOURCE), str(tmp_path / "out"), "--no-verify", "--push-to", "me/x")
        assert code == 2 and "--unverified" in error and not (tmp_path / "out").exists()
        assert [name for name, folder in made.items() if never_verified(folder)] == ["unverified"]

    @pytest.mark.parametrize(("answer", "code"), [("y\n", 4), ("n\n", 5), ("", 5)])
    def test_on_a_terminal_it_asks(
        self, answer: str, code: int, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        shown = Terminal()
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        monkeypatch.setattr(sys, "stderr", shown)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        from xpuquant.conversion.cli.app import run

        assert run(["push", str(made["unverified"]), "me/x"]) == code
        assert "Publish it all the same? [y/N]" in shown.getvalue()
