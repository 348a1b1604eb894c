"""`xpuquant verify`: verdicts, exit codes, reports where they were asked for, and nothing skipped silently."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import support.injected_faults as inject
import xxhash
from support.checkpoints import FIXTURES

from xpuquant.conversion.cli.app import run
from xpuquant.conversion.verify.column_cache import ColumnCache
from xpuquant.conversion.verify.digests import MatrixDigest
from xpuquant.conversion.verify.proof import Checked, Claim
from xpuquant.conversion.verify.sanity import SanityCount, findings
from xpuquant.conversion.verify.verdict import Agreement, Finding, Sanity, Verdict
from xpuquant.formats.checkpoint import Slice, columns, whole
from xpuquant.formats.layouts.base import Matrix
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.formats.weights.packed import Packed
from xpuquant.kernels import backends

SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32-asym-v1"
STACKS = FIXTURES / "gptqmodel-qwen3moe-w4g32"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    assert run(["convert", str(SOURCE), str(folder / "linear"), "--jobs", "1"]) == 0
    assert run(["convert", str(STACKS), str(folder / "experts"), "--jobs", "1"]) == 0
    assert run(["convert", str(SOURCE), str(folder / "unverified"), "--no-verify"]) == 0
    return {name: folder / name for name in ("linear", "experts", "unverified")}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class TestCommand:
    def test_a_sound_repo_passes_with_and_without_its_source(self, made, capsys):
        before = contents(made["linear"])
        assert run(["verify", str(made["linear"]), "--backend", "onednn"]) == 0
        assert "against the digests recorded at conversion" in capsys.readouterr().out
        assert run(["verify", str(made["linear"]), "--source", str(SOURCE), "--backend", "reference"]) == 0
        assert f"every value of the source, {SOURCE.name}" in capsys.readouterr().out
        assert contents(made["linear"]) == before, "OUT is only read"

    def test_a_damaged_repo_is_exit_1_and_named(self, made, tmp_path, capsys):
        repo = inject.copy(made["linear"], tmp_path / "repo")
        inject.FAULTS["one nibble of a linear"](repo)
        inject.reseal(repo.folder)
        command = ["verify", str(repo.folder), "--source", str(SOURCE), "--backend", "reference"]
        assert run(command) == 1
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and "must not be deployed" in said.err
        assert "mlp.down_proj" in said.err and "source has" in said.err

    def test_json_is_one_object_even_where_it_fails(self, made, tmp_path, capsys):
        repo = inject.copy(made["linear"], tmp_path / "repo")
        inject.FAULTS["shard truncated"](repo)
        assert run(["verify", str(repo.folder), "--json", "--backend", "reference"]) == 1
        verdict = json.loads(capsys.readouterr().out)
        assert verdict["passed"] is False and any("truncated" in line for line in verdict["failures"])

    def test_reports_are_written_where_asked(self, made, tmp_path):
        out = tmp_path / "deep" / "reports"
        assert run(["verify", str(made["linear"]), "--report", str(out), "--backend", "reference"]) == 0
        assert sorted(path.name for path in out.iterdir()) == [
            "verify.html",
            "verify.json",
            "verify.md",
            "verify.svg",
        ]

    def test_reports_do_not_go_into_what_is_checked(self, made, capsys):
        assert run(["verify", str(made["linear"]), "--report", str(made["linear"])]) == 2
        assert "name another folder" in capsys.readouterr().err

    def test_an_unknown_backend_is_a_usage_error_that_lists_them(self, made, capsys):
        assert run(["verify", str(made["linear"]), "--backend", "cuda"]) == 2
        assert "onednn" in capsys.readouterr().err

    @pytest.mark.parametrize(("folder", "said"), [("nowhere", "no such folder"), (".", "not converted by xpuquant")])
    def test_something_else_than_a_conversion_is_a_usage_error(self, folder, said, tmp_path, capsys):
        assert run(["verify", str(tmp_path / folder)]) == 2
        assert said in capsys.readouterr().err

    def test_an_unfinished_conversion_says_how_to_finish(self, tmp_path, capsys):
        (tmp_path / ".xpuquant").mkdir()
        assert run(["verify", str(tmp_path)]) == 2
        assert "run the same convert command again" in capsys.readouterr().err


class TestNothingIsSkippedSilently:
    def test_a_conversion_without_verification_has_no_digests_and_says_so(self, made, capsys):
        assert run(["verify", str(made["unverified"]), "--backend", "reference"]) == 5
        out, error = capsys.readouterr()
        assert "no recorded digest" in out and "pass " not in out.partition("exactness")[2][:40]
        assert "is not verified: exactness" in error and "verify against the source" in error and error.count("\n") == 1
        assert run(["verify", str(made["unverified"]), "--source", str(SOURCE), "--backend", "reference"]) == 0

    def test_modules_without_a_real_kernel_are_counted(self, made, capsys):
        assert run(["verify", str(made["linear"]), "--backend", "reference", "--json"]) == 0
        kernels = json.loads(capsys.readouterr().out)["kernels"]
        assert len(kernels["modules_no_real_kernel_computed"]) == 7
        assert run(["verify", str(made["linear"]), "--backend", "reference"]) == 0
        assert "7 of 7 modules were computed by no real kernel here" in capsys.readouterr().out

    def test_a_backend_that_cannot_run_is_listed_with_its_reason(self, made, capsys):
        """And refused where it was asked for by its name: nothing would have been checked."""
        missing = [name for name, backend in backends().items() if backend.unavailable() is not None]
        assert run(["verify", str(made["linear"]), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kernels"]["not_available"].keys() == {*missing}
        for name in missing:
            assert run(["verify", str(made["linear"]), "--backend", name]) == 4
            (line,) = capsys.readouterr().err.splitlines()
            assert line == f"error: --backend {name}: {backends()[name].unavailable()}"
            assert run(["verify", str(made["linear"]), "--require-backend", name]) == 5
            assert "0 of 7 modules" in capsys.readouterr().err

    def test_every_module_and_every_m_is_computed(self, made, capsys):
        if backends()["onednn"].unavailable() is not None:
            pytest.skip("oneDNN is not installed")
        assert run(["verify", str(made["experts"]), "--backend", "onednn", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        asked = [one for one in report["kernels"]["runs"] if one["backend"] == "onednn"]
        runs = [one for one in asked if "not_run" not in one]
        assert {one["module"] for one in runs} == set(report["sanity"])
        by_shape = {(one["scheme"], one["N"], one["K"]) for one in runs}
        thorough = [one for one in runs if one["M"] == [1, 2, 8, 33, 64] and one["activations"] == "F32"]
        # As served, in 16 bits: every shape in one of the two, or the report says why this processor has neither.
        served = [one for one in runs if one["activations"] in ("BF16", "F16")]
        refusals = [one["not_run"] for one in asked if "not_run" in one]
        assert len(served) == len(thorough) or len(refusals) == 2 * len(thorough)
        assert all("BF16 activations" in why or "F16 activations" in why for why in refusals)
        assert {(one["scheme"], one["N"], one["K"]) for one in thorough} == by_shape
        assert all(one["wrong_layout_error"] > 0.1 > 1e3 * one["tolerance"] for one in thorough)
        assert report["kernels"]["modules_no_real_kernel_computed"] == []

    def test_all_computes_every_expert(self, made, capsys):
        assert run(["verify", str(made["experts"]), "--backend", "reference", "--all", "--json"]) == 0
        runs = json.loads(capsys.readouterr().out)["kernels"]["runs"]
        stack = [one for one in runs if one["expert"] is not None]
        matrices = json.loads((made["experts"] / "verify.json").read_text())["exact"]["matrices"]
        assert len(runs) == matrices and {one["matrix"] for one in stack} == {"gate", "up", "down"}


def decoded(codes, scale) -> Decoded:
    n, K = codes.shape
    return Decoded("int", codes, scale, np.arange(n), np.arange(K) // (K // scale.shape[1]))


class TestSanity:
    def count(self, codes, scale) -> Sanity:
        counter = SanityCount()
        counter.update(decoded(codes, scale))
        return counter.sanity

    def test_by_eye(self):
        codes = np.array([[-8] * 8 + [7] * 4 + [0] * 4, [0] * 8 + [1] * 8], np.int8)
        sanity = self.count(codes, np.array([[1, 0], [np.nan, np.inf]], np.float16))
        assert (sanity.groups, sanity.codes) == (4, 16)  # saturation: the first row of four
        assert (sanity.bad_scales, sanity.zero_scales, sanity.dead_groups, sanity.saturated) == (2, 1, 1, 12)

    def test_scales_of_a_block_are_counted_once(self):
        counter = SanityCount()
        for start in (0, 8):
            row = np.arange(start, start + 8) // 16
            counter.update(Decoded("e4m3", np.zeros((8, 32), np.uint8), np.ones((1, 1)), row, np.zeros(32, int)))
        assert counter.sanity.groups == 1

    def test_nan_fails_only_where_it_is_not_the_source_s(self):
        sanity = {"m": Sanity(groups=4, bad_scales=1, codes=32)}
        for claim in Claim:
            fails = [finding.fails for finding in findings(sanity, {"m": Checked("m", 1, None, claim=claim)})]
            assert fails == [claim is Claim.NOT_CHECKED]
        assert [finding.fails for finding in findings(sanity, {"m": Checked("m", 1, "differs")})] == [True]
        assert [finding.fails for finding in findings(sanity, {})] == [True]

    def test_warnings_name_what_is_odd(self):
        sanity = {
            "m": Sanity(
                groups=100, zero_scales=1, dead_groups=2, codes=100, saturated=30, scale_max=101.0, scale_typical=1.0
            )
        }
        said = [finding.what for finding in findings(sanity, {})]
        assert len(said) == 4 and all(not finding.fails for finding in findings(sanity, {}))
        assert list(findings({"m": Sanity(groups=100, codes=100, saturated=13)}, {})) == []


class TestDigests:
    def line(self, *blocks: Decoded | Packed) -> str:
        digest = MatrixDigest(Matrix("linear", 4, 16))
        for block in blocks:
            digest.update(block)
        return digest.line()

    def test_the_cut_into_blocks_does_not_matter_and_every_value_does(self):
        rng = np.random.default_rng(0)
        codes = rng.integers(-8, 8, (4, 16)).astype(np.int8)
        scale = rng.random((4, 2)).astype(np.float16)
        whole_matrix = self.line(decoded(codes, scale))
        assert self.line(decoded(codes[:1], scale[:1]), decoded(codes[1:], scale[1:])) == whole_matrix
        other = codes.copy()
        other[3, 15] ^= 1
        assert self.line(decoded(other, scale)) != whole_matrix
        assert self.line(decoded(codes, scale.astype(np.float32))) != whole_matrix
        assert self.line(replace(decoded(codes, scale), col=np.arange(16) % 2)) != whole_matrix

    def test_golden(self):
        codes = np.arange(-8, 8, dtype=np.int8).reshape(1, 16)
        scale, col = np.array([[0.5, 2.0]], "<f2"), np.repeat(np.array([0, 1], "<i4"), 8)
        of_codes, of_scale, of_col = (xxhash.xxh3_128(part.tobytes()).hexdigest() for part in (codes, scale, col))
        head = ["linear", "-", "4", "16"]
        assert self.line(decoded(codes, scale)) == " ".join([*head, "int", "float16", of_codes, "-", of_scale, of_col])
        nibbles, zeros = np.arange(0x10, 0x90, 0x10, dtype=np.uint8).reshape(1, 8), np.array([[8, 7]], np.uint8)
        packed = Packed("int", nibbles, zeros, scale, np.arange(1), col)
        of_nibbles, of_zeros = (xxhash.xxh3_128(part.tobytes()).hexdigest() for part in (nibbles, zeros))
        assert self.line(packed) == " ".join([*head, "u4", "float16", of_nibbles, of_zeros, of_scale, of_col])

    def test_e2m1_codes_are_hashed_two_to_a_byte(self):
        codes = np.arange(16, dtype=np.uint8).reshape(1, 16)
        line = self.line(replace(decoded(codes, np.ones((1, 1), np.uint8)), number="e2m1"))
        packed = bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
        assert line.split()[6] == xxhash.xxh3_128(packed).hexdigest()


class TestColumnCache:
    def test_columns_come_from_one_read(self):
        data = np.arange(4 * 100, dtype=np.float32).reshape(4, 100)
        reads = []

        def load(part: Slice):
            reads.append(part)
            return data[:, part.start : part.stop] if part.axis else data[part.start : part.stop]

        tensor = Tensor("t", "F32", (4, 100), "f", 0, 1600)
        cache = ColumnCache(load)
        for start in (40, 0, 8, 92):
            assert np.array_equal(cache(columns(tensor, start, start + 8)), data[:, start : start + 8])
        assert len(reads) == 1 and (reads[0].start, reads[0].stop) == (0, 100)
        assert np.array_equal(cache(whole(tensor)), data) and np.array_equal(cache(whole(tensor)), data)
        assert np.array_equal(cache(Slice(tensor, 1, 3)), data[1:3])
        assert len(reads) == 3


def test_the_verdict_counts_every_kind_of_failure():
    sound = Verdict("r", "p", exact=[Checked("m", 1, None)], schemes={"m": "s"})
    assert sound.passed and sound.unchecked == ["m"]
    failing = Agreement("onednn", "m", "linear", None, "s", 8, 32, 8, (1,), "F32", 0.5, 0.5, tolerance=0.1)
    for broken in (
        replace(sound, exact=[Checked("m", 1, "differs")]),
        replace(sound, kernels=[failing]),
        replace(sound, findings=[Finding("integrity", "f", "changed")]),
    ):
        assert not broken.passed and len(broken.failures) == 1
    warned = replace(sound, findings=[Finding("sanity", "m", "odd", fails=False)])
    assert warned.passed and len(warned.warnings) == 1


def test_a_copy_under_another_name_is_the_same_repo(made, tmp_path):
    shutil.copytree(made["linear"], tmp_path / "renamed")
    assert run(["verify", str(tmp_path / "renamed"), "--backend", "reference"]) == 0
