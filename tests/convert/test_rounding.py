"""`--scale-dtype`, `--on-unsupported dequantize`: what is said of the result is true, nothing is lost in silence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import support.injected_faults as inject
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FIXTURES

from xpuquant.conversion.cli.app import run
from xpuquant.conversion.options import Options
from xpuquant.conversion.report.sentences import exactness
from xpuquant.conversion.results import Converted
from xpuquant.conversion.runs.local import convert_checkpoint
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.verify.proof import Claim, Proof, Rounding
from xpuquant.conversion.verify.rounding import LARGEST_CHANGE, RoundedScales, odd
from xpuquant.conversion.verify.run import select, verify
from xpuquant.errors import UnsupportedError
from xpuquant.formats.weights.decoded import Decoded

BF16_SCALES = FIXTURES / "llmcompressor-qwen3-w4a16-asym"
F16_SCALES = FIXTURES / "gptqmodel-qwen3-w4g32"
FP8_BLOCKS = FIXTURES / "llmcompressor-llama-fp8-block"
DTYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
SCALE = "model.layers.0.mlp.down_proj.weight_scale"


def scales_of(folder: Path) -> dict[str, np.ndarray]:
    """Scale tensor → values, in float64."""
    repo = inject.Repo(folder)
    names = [name for name in repo.places if name.endswith(("weight_scale", "scales"))]
    return {name: repo.read(name).view(DTYPES[repo.places[name][3]]).astype(np.float64) for name in names}


def with_scales(source: Path, folder: Path, name: str, values: dict[int, float]) -> Path:
    """A copy of a checkpoint with some of its BF16 scales replaced."""
    shutil.copytree(source, folder)
    repo = inject.Repo(folder)
    scales = repo.read(name).view(ml_dtypes.bfloat16)
    for i, value in values.items():
        scales[i] = value
    repo.write(name, scales.view(np.uint8))
    return folder


def converted(source: Path, out: Path, verify: bool = True, **options: Any) -> Converted:
    return convert_checkpoint(open_source(str(source)), out, Options(**options), jobs=1, verify=verify)


def counted(before: np.ndarray, dtype: str) -> tuple[int, int, float]:
    """(scales, changed, largest relative change), by the definition; no scale is 0."""
    with np.errstate(over="ignore"):
        after = before.astype(DTYPES[dtype]).astype(np.float64)
    changed = before != after
    return before.size, int(changed.sum()), float((np.abs(after - before) / np.abs(before)).max())


def said_of(before: np.ndarray, dtype: str) -> str:
    """What is true of scales that were rounded."""
    scales, changed, largest = counted(before, dtype)
    if not changed:
        return f"none of {scales:,} scales changed"
    return f"{changed:,} of {scales:,} scales changed, largest relative change {largest:.1e}"


class TestScalesThatDoNotFit:
    @pytest.mark.parametrize("options", [[], ["--no-verify"], ["--layout", "compressed-tensors", "--no-verify"]])
    def test_infinities_and_zeros_made_by_rounding_are_refused_and_named(self, options, tmp_path, capsys):
        source = with_scales(BF16_SCALES, tmp_path / "source", SCALE, {0: 1e6, 1: 1e-12})
        command = ["convert", str(source), str(tmp_path / "out"), "--scale-dtype", "float16", *options]
        assert run(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and SCALE in said
        assert "2 of 768 scales do not fit float16" in said and "becomes inf" in said
        assert "keep the source's scale dtype" in said
        assert not (tmp_path / "out" / "config.json").exists(), "nothing can be loaded"
        assert run(["convert", str(source), str(tmp_path / "out"), "--json"]) == 0, "what was advised, and no --force"
        assert json.loads(capsys.readouterr().out)["verification"]["passed"]

    def test_a_part_that_was_refused_is_no_obstacle(self, tmp_path):
        source = with_scales(BF16_SCALES, tmp_path / "source", SCALE, {0: 1e6})
        out = tmp_path / "out"
        command = ["convert", str(source), str(out), "--part", "1/1"]
        assert run([*command, "--scale-dtype", "float16"]) == 2
        assert run(command) == 0
        assert run(["finish", str(source), str(out)]) == 0

    def test_what_people_wrote_into_an_earlier_card_outlives_a_refusal(self, tmp_path):
        source = with_scales(BF16_SCALES, tmp_path / "source", SCALE, {0: 1e6})
        command = ["convert", str(source), str(tmp_path / "out")]
        assert run(command) == 0
        card = tmp_path / "out" / "README.md"
        card.write_text(card.read_text() + "\nmeasured by hand\n")
        assert run([*command, "--scale-dtype", "float16", "--force"]) == 2
        assert run(command) == 0
        assert "measured by hand" in card.read_text()
        assert not (tmp_path / "out" / ".xpuquant").exists()

    def test_a_repo_that_holds_them_fails(self, tmp_path, monkeypatch):
        """As a conversion would have written it that did not look."""
        source = with_scales(BF16_SCALES, tmp_path / "source", SCALE, {7: 1e-12})
        out = tmp_path / "out"
        monkeypatch.setattr("xpuquant.formats.layouts.scales.refuse_lost", lambda *anything: None)
        assert run(["convert", str(source), str(out), "--scale-dtype", "float16", "--no-verify"]) == 0
        verdict = verify(out, open_source(str(source)), select(["reference"]))
        assert [finding.check for finding in verdict.failing] == ["exactness"]
        assert SCALE in verdict.failures[0] and "becomes 0" in verdict.failures[0]
        assert not any("so has the source" in finding.what for finding in verdict.warnings)

    def test_what_the_source_has_too_only_warns(self, tmp_path):
        source = with_scales(BF16_SCALES, tmp_path / "source", SCALE, {0: np.nan, 1: np.inf, 2: 0.0})
        verdict = converted(source, tmp_path / "out", scale_dtype="F16").verdict
        assert verdict is not None and verdict.passed
        said = [finding.what for finding in verdict.warnings]
        assert "2 scales and 0 codes are NaN or infinite; so has the source" in said
        assert "1 of 768 scales is 0; so has the source" in said

    def test_scales_that_lose_most_of_their_bits_are_a_warning(self, tmp_path):
        source = with_scales(BF16_SCALES, tmp_path / "source", SCALE, {5: 1e-7})
        verdict = converted(source, tmp_path / "out", scale_dtype="F16").verdict
        assert verdict is not None and verdict.passed
        assert any("too small for all bits of float16" in finding.what for finding in verdict.warnings)

    @pytest.mark.parametrize("verify", [True, False])
    def test_a_dequantized_value_that_becomes_infinite_is_refused(self, verify, tmp_path):
        source = tmp_path / "source"
        shutil.copytree(FIXTURES / "llmcompressor-llama-fp8-block-ragged", source)
        repo = inject.Repo(source)
        name = next(name for name in repo.places if name.endswith("down_proj.weight_scale"))
        scales = repo.read(name).view(DTYPES[repo.places[name][3]])
        scales[...] = 3e38
        repo.write(name, scales.view(np.uint8))
        with pytest.raises(
            UnsupportedError, match=r"down_proj\.weight, rows .* do not fit bfloat16 \(.* becomes -?inf"
        ):
            converted(source, tmp_path / "out", verify, on_unsupported="dequantize")


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        ("source", "layout", "to"), [(F16_SCALES, "xpu", "BF16"), (FP8_BLOCKS, "compressed-tensors", "F16")]
    )
    def test_the_counts_are_those_of_the_source(self, source, layout, to, tmp_path):
        verdict = converted(source, tmp_path / "out", layout=layout, scale_dtype=to).verdict
        assert verdict is not None and verdict.passed
        every = scales_of(source)
        assert every
        for checked in (one for one in verdict.exact if one.matrices):
            before = next(values for name, values in every.items() if name.rpartition(".")[0] == checked.name)
            assert checked.claim is Claim.ROUNDED and checked.rounding is not None
            found = checked.rounding
            assert (found.dtype, found.numbers, found.changed, found.largest) == (to, *counted(before, to))

    def test_every_report_and_the_card_say_rounded_and_none_says_exactly(self, tmp_path, capsys):
        out = tmp_path / "out"
        assert run(["convert", str(F16_SCALES), str(out), "--scale-dtype", "bfloat16"]) == 0
        every = np.concatenate(list(scales_of(F16_SCALES).values()))
        scales, changed, _ = counted(every, "BF16")
        assert changed > scales / 2
        sentence = f"7 matrices decode to the source with scales rounded to bfloat16 ({said_of(every, 'BF16')})"
        texts = [capsys.readouterr().out, *((out / name).read_text() for name in ("README.md", "verify.md"))]
        for text in (*texts, (out / "verify.html").read_text()):
            assert sentence in re.sub(r"\s+", " ", text) and "decode exactly" not in text
        assert ", scales rounded to bfloat16" in texts[1]
        claims = json.loads((out / "verify.json").read_text())["exact"]["matrices_by_claim"]
        assert claims["scales_rounded_to"]["bfloat16"]["scales_changed"] == changed and "exact" not in claims
        assert run(["verify", str(out), "--backend", "reference"]) == 0
        later = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert (
            "7 matrices decode to what was recorded at conversion, 7 of them with scales rounded to bfloat16" in later
        )
        assert said_of(every, "BF16") in later

    def test_a_wider_dtype_changes_nothing_and_is_exact(self, tmp_path):
        verdict = converted(F16_SCALES, tmp_path / "out", scale_dtype="F32").verdict
        assert verdict is not None and exactness(verdict.proof) == "7 matrices decode exactly to the source"

    def test_scales_that_fit_are_said_to_be_unchanged(self, tmp_path):
        verdict = converted(BF16_SCALES, tmp_path / "out", scale_dtype="F16").verdict
        assert verdict is not None
        every = np.concatenate(list(scales_of(BF16_SCALES).values()))
        assert "none of" in said_of(every, "F16") and said_of(every, "F16") in exactness(verdict.proof)

    def test_dequantized_matrices_are_counted_apart(self, tmp_path):
        verdict = converted(
            FIXTURES / "llmcompressor-llama-fp8-block-ragged", tmp_path / "out", on_unsupported="dequantize"
        ).verdict
        assert verdict is not None
        said = exactness(verdict.proof)
        assert re.search(
            r"; 1 matrix dequantized to bf16: each value is the exact one rounded once "
            r"\([\d,]+ of [\d,]+ values changed, largest relative change [\d.]+e-03\)$",
            said,
        )
        rounding = next(part.rounding for part in Proof.of(verdict.exact).parts if part.claim is Claim.DEQUANTIZED)
        assert rounding is not None and 0 < rounding.changed < rounding.numbers and rounding.largest <= 2.0**-8

    @pytest.mark.parametrize("seed", range(4))
    def test_it_is_true_of_random_scales(self, seed, tmp_path):
        rng = np.random.default_rng(seed)
        decades = (0.5, 3, 6, 12)[seed]
        # Multiples of 2^-7 times a power of two are what bfloat16 holds; float16 holds those of its range.
        values = 1e-3 * 10.0 ** rng.uniform(-decades, decades, 768) * rng.choice([-1, 1], 768)
        values = values.astype(ml_dtypes.bfloat16).astype(np.float64)
        source = with_scales(BF16_SCALES, tmp_path / "source", SCALE, dict(enumerate(values)))
        with np.errstate(over="ignore"):
            after = values.astype(np.float16).astype(np.float64)
        lost = int((~np.isfinite(after) | (after == 0)).sum())
        if lost:
            with pytest.raises(UnsupportedError, match=f"{lost} of 768 scales do not fit float16"):
                converted(source, tmp_path / "out", scale_dtype="F16")
            return
        verdict = converted(source, tmp_path / "out", scale_dtype="F16").verdict
        assert verdict is not None
        every = np.concatenate(list(scales_of(source).values()))
        assert f"rounded to float16 ({said_of(every, 'F16')})" in exactness(verdict.proof)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=40),
    dtype=st.sampled_from(["F16", "BF16"]),
    covered=st.integers(1, 5),
    cut=st.integers(1, 7),
)
def test_scales_are_counted_once_however_the_rows_are_cut(values, dtype, covered, cut):
    """Each scale covers `covered` rows of the weight, which arrive `cut` at a time."""
    scale = np.array(values, np.float32).reshape(-1, 1)
    rows, count = np.repeat(np.arange(len(scale)), covered), RoundedScales(dtype)
    for start in range(0, len(rows), cut):
        here = rows[start : start + cut]
        part = scale[here[0] : here[-1] + 1]
        decoded = Decoded("int", np.zeros((len(here), 1), np.int8), part, here - here[0], np.zeros(1, int))
        result = count.round(decoded, continued=start % covered != 0)
        with np.errstate(over="ignore", invalid="ignore"):
            assert np.array_equal(result.scale, part.astype(DTYPES[dtype]), equal_nan=True)
    with np.errstate(all="ignore"):
        before, after = (side.reshape(-1).astype(np.float64) for side in (scale, scale.astype(DTYPES[dtype])))
        lost = np.isfinite(before) & (~np.isfinite(after) | ((after == 0) & (before != 0)))
        kept = np.isfinite(before) & (before != 0) & ~lost
        change = np.abs(after - before)[kept] / np.abs(before)[kept]
    assert count.lost == lost.sum() and (count.error() is None) == (not lost.any())
    expected = Rounding(dtype, len(values), int((kept & (before != after)).sum() + lost.sum()), change.max(initial=0.0))
    assert count.rounding == expected
    assert (odd(count.rounding) is None) == (expected.largest <= LARGEST_CHANGE[dtype])
