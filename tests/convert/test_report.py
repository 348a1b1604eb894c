"""The reports: complete, safe to open, readable in a real browser in both colour schemes."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command

from xpuquant.conversion.cli.plan_answers import left_alone
from xpuquant.conversion.options import Options
from xpuquant.conversion.repo.checksums import is_sealed
from xpuquant.conversion.report.glossary import CHECKS, COLUMNS
from xpuquant.conversion.report.heatmap import FAILED_COLOUR, State, colour, heat_map, table_of
from xpuquant.conversion.report.markdown import checks, render_markdown
from xpuquant.conversion.report.page import render_page
from xpuquant.conversion.report.reports import as_data, write_reports
from xpuquant.conversion.report.sentences import exactness, headline, in_one_line
from xpuquant.conversion.report.svg import picture, said_of
from xpuquant.conversion.results import Planned, SourceInfo, TensorInfo
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify.proof import Checked, Claim, Proof, Rounding
from xpuquant.conversion.verify.run import select
from xpuquant.conversion.verify.sanity import findings
from xpuquant.conversion.verify.setting import KERNEL_PACKAGES, Setting, model_of, setting_of
from xpuquant.conversion.verify.verdict import REFERENCE, Agreement, Finding, Sanity, Verdict
from xpuquant.kernels import BACKENDS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SVG = "{http://www.w3.org/2000/svg}"
NASTY = 'model.layers.3.<script>alert("x")</script>|`&.q_proj'


def verdict(layers: int = 32, *, broken: bool = True) -> Verdict:
    """A verdict like that of a model of `layers` layers."""
    rng = np.random.default_rng(0)
    runs, schemes, sanity = [], {}, {}
    for layer in range(layers):
        for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{kind}"
            schemes[name] = "int4_linear g128"
            error = float(3e-7 * rng.uniform(0.8, 1.2))
            if broken and (layer, kind) == (5, "mlp.down_proj"):
                error = 0.2
            run = Agreement(
                "onednn",
                name,
                "linear",
                None,
                schemes[name],
                4096,
                4096,
                64,
                (8,),
                "F32",
                error,
                error,
                1e-5,
                0.9999999,
                7.6e-6,
                None,
                None,
                (0, 0, 5, 50, 400, 57, 0, 0, 0, 0, 0),
            )
            if not (broken and (layer, kind) == (9, "mlp.down_proj")):
                runs.append(replace(run, M=(1, 2, 8, 33, 64), wrong_layout=1.4) if layer == 0 else run)
            sanity[name] = Sanity(groups=131072, codes=1 << 24, saturated=1 << 18, scale_max=0.03, scale_typical=0.01)
    return Verdict(
        repo="Model-xpu",
        producer="xpuquant 0",
        basis="every value of the source, Model",
        files=12,
        exact=[Checked(name, 1, None, "00") for name in schemes] + [Checked("norm", 0, None, "00")],
        kernels=runs,
        unavailable={"vllm_xpu": "needs an Intel GPU: pip install vllm-xpu-kernels"},
        sanity=sanity,
        findings=[Finding("sanity", "model.layers.3.mlp.up_proj", "2 of 9 scales are 0", fails=False)] * broken,
        schemes=schemes,
        before={"I32": 4_000_000, "F16": 1_000},
        after={"I32": 3_900_000, "F16": 1_000},
    )


def nasty() -> Verdict:
    run = Agreement("onednn", NASTY, "linear", None, "s|<b>", 8, 32, 8, (8,), "F32", 0.5, 0.5, 1.0, 0.5, 1e-6)
    return Verdict(
        '<img src=x onerror="alert(1)">',
        "p",
        exact=[Checked(NASTY, 1, "differs <i>")],
        kernels=[run],
        unavailable={"b": "<u>why</u>"},
        sanity={NASTY: Sanity()},
        schemes={NASTY: "s"},
        after={"<dtype>": 1},
        findings=[Finding("integrity", "<a>\x1b[31m", "bad\nline")],
    )


class Page(HTMLParser):
    """What a page would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_four_files_that_agree(tmp_path):
    names = write_reports(Tree(tmp_path), verdict())
    assert sorted(names) == ["verify.html", "verify.json", "verify.md", "verify.svg"]
    content = (tmp_path / "verify.json").read_bytes()
    assert is_sealed(content)
    data = json.loads(content)
    assert data["passed"] is False and set(data["reports"]) == set(names) - {"verify.json"}
    assert len(data["kernels"]["runs"]) == 127 and data["kernels"]["modules_no_real_kernel_computed"]


def test_the_same_verdict_makes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_reports(Tree(tmp_path / name), verdict())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_json_has_no_infinities():
    inf = float("inf")
    run = Agreement("onednn", "m", "linear", None, "s", 8, 32, 8, (8,), "F32", inf, inf, inf, 0.0, 1e-6)
    text = json.dumps(as_data(Verdict("r", "p", kernels=[run, replace(run, error=0.0)])), allow_nan=False)
    assert '"inf"' in text


@pytest.mark.parametrize("made", [verdict(), verdict(broken=False), nasty(), Verdict("r", "")])
def test_page_loads_and_runs_nothing_foreign(made, tmp_path):
    write_reports(Tree(tmp_path), made)
    page = Page((tmp_path / "verify.html").read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe", "object", "embed", "use", "i", "b") or (
            tag == "b" and not attributes
        )
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in (tmp_path / "verify.html").read_text().replace("url(#hatch)", "")
    ET.fromstring((tmp_path / "verify.svg").read_text())


def test_names_from_strangers_stay_text(tmp_path):
    write_reports(Tree(tmp_path), nasty())
    for name in ("verify.html", "verify.svg", "verify.md"):
        text = (tmp_path / name).read_text()
        assert "<img" not in text and 'alert("x")</script>' not in text and "\x1b" not in text
    rows = [line for line in (tmp_path / "verify.md").read_text().splitlines() if line.startswith("| onednn")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 13 for row in rows)


def test_markdown_pastes_as_tables():
    text = render_markdown(verdict())
    assert text.startswith("# Model-xpu: **FAILED**") and "## Not run" in text and "vllm_xpu" in text
    assert "## Modules that no real kernel computed where this was checked: 1 of 128" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    worst = text.split("largest deviations")[1].splitlines()[4]
    assert "model.layers.5.mlp.down_proj" in worst


def test_the_end_of_a_conversion_in_one_line():
    said = in_one_line(verdict(broken=False))
    assert said.startswith("128 matrices decode exactly to the source; onednn F32 within")


def test_a_kernel_that_computed_some_says_how_many():
    made = verdict(broken=False)
    assert " of 128 modules" not in in_one_line(made)
    some = replace(made, kernels=[run for run in made.kernels if "q_proj" not in run.module])
    assert re.search(r"onednn F32 within \S+ of float64 in 96 of 128 modules", in_one_line(some))


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"a.weight": (2, 2), "n.weight": (2,)}, "source: a, 1 vector, such as a norm's"),
        ({"a.weight": (2, 2)}, "source: a"),
        ({"n.weight": (2,), "m.weight": ()}, "source: 2 vectors, such as those of norms"),
        (
            {f"{letter}.weight": (2, 2) for letter in "abcdefghijk"},
            "source: a, b, c, d, e, f, g, h, and 3 more",
        ),
    ],
)
def test_what_is_left_alone_is_counted(shapes, said):
    passed = tuple(TensorInfo(name, "F16", shape, 8) for name, shape in shapes.items())
    assert left_alone(Planned(SourceInfo("s", None, 8), Options(), (), passed, (), (), 0, 0)).endswith(said)


def test_sentences_of_a_dequantized_repo(tmp_path):
    """Card, summary and `inspect` of one that keeps some matrices and dequantizes one."""
    source, out = FIXTURES / "llmcompressor-llama-fp8-block-ragged", tmp_path / "out"
    assert command("convert", str(source), str(out), "--on-unsupported", "dequantize")[0] == 0
    card = (out / "README.md").read_text()
    assert "Not converted" not in card and "no real kernel here" not in card
    why = card.partition("What stays as it was, was dequantized or left out, and why:")[2]
    assert "model.layers.0.mlp.down_proj: dequantized to bf16: " in why and "- 3 vectors, such as" in why
    said = command("inspect", str(out))[1]
    assert "6 quantized modules, 1 dequantized, 4 other tensors" in said


def test_only_what_is_exact_is_called_so():
    rounded = Checked("b", 12, None, "00", Claim.ROUNDED, Rounding("F16", 256, 238, 0.0039))
    members = [Checked("a", 7, None, "00"), rounded, Checked("c", 2, None, None, Claim.DEQUANTIZED)]
    made = Verdict("r", "p", exact=members)
    assert exactness(made.proof) == (
        "7 matrices decode exactly to the source, "
        "12 with scales rounded to float16 (238 of 256 scales changed, largest relative change 3.9e-03); "
        "2 matrices dequantized to bf16: each value is the exact one rounded once"
    )
    assert exactness(made.proof) in render_markdown(made)
    assert as_data(made)["exact"]["matrices_by_claim"] == {
        "dequantized": 2,
        "exact": 7,
        "scales rounded": 12,
        "scales_rounded_to": {
            "float16": {"matrices": 12, "scales": 256, "scales_changed": 238, "largest_relative_change": 0.0039}
        },
    }
    for members, said in (
        ([rounded], "12 matrices decode to the source with scales rounded to float16 (238 of"),
        ([replace(rounded, rounding=Rounding("F16", 256))], "rounded to float16 (none of 256 scales changed)"),
        (
            [replace(rounded, claim=Claim.RECORDED, recorded=Claim.ROUNDED)],
            "12 matrices decode to what was recorded at conversion, 12 of them",
        ),
        ([replace(rounded, rounding=None)], "12 matrices decode to the source with scales rounded to another dtype"),
        ([replace(rounded, error="differs")], "1 module or tensor differs"),
        ([], "no matrices"),
    ):
        found = exactness(Proof.of(members))
        assert said in found and "exactly" not in found


def test_a_verdict_survives_json():
    inf = float("inf")
    made = verdict()
    made = replace(
        made,
        exact=[*made.exact, Checked("b", 1, None, "00", Claim.ROUNDED, Rounding("F16", 4, 1, 0.5))],
        kernels=[*made.kernels, replace(made.kernels[0], error=inf, deviation=inf)],
    )
    assert Verdict.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("made", [verdict(), verdict(broken=False), verdict(80)])
def test_a_square_for_every_module(made):
    """In the picture and on the page, each with what it says."""
    shown, tree = heat_map(made), ET.fromstring(picture(made))
    titles = [node.text for node in tree.iter(f"{SVG}title")]
    assert {square.module for square in shown.squares} == made.schemes.keys()
    assert {square.said for square in shown.squares} <= set(titles)
    page = Page(render_page(made))
    assert sorted(
        attributes["title"]
        for tag, attributes in page.tags
        if "square" in (attributes.get("class") or "").split() and "title" in attributes
    ) == sorted(square.said for square in shown.squares)
    unseen = {name for name in made.schemes if made.cell(name) is None}
    failed = {run.module for run in made.kernels if not run.passed}
    assert {square.module for square in shown.squares if square.state is State.UNSEEN} == unseen
    assert {square.module for square in shown.squares if square.state is State.FAILED} == failed


def test_a_square_stands_for_the_run_that_is_nearest_to_its_tolerance():
    """Whatever its dtype: what the page says of the largest is what its table says."""
    first, *others = verdict(2, broken=False).kernels
    bf16 = replace(first, activation="BF16", backend="ark", error=1e-4, deviation=5e-4, tolerance=1e-3)
    made = replace(verdict(2, broken=False), kernels=[first, *others, bf16])
    assert made.cell(first.module) == bf16
    largest = heat_map(made).largest
    assert largest is not None and largest.run == bf16 and bf16.used == max(run.used for run in made.kernels)
    assert "The largest here: 50 % of the tolerance" in render_page(made)


def test_the_scale_is_anchored_at_the_tolerance():
    """The same share has the same colour in every report; what passes is told from what fails by more than colour."""
    run = Agreement("onednn", "m", "linear", None, "s", 8, 32, 8, (8,), "F32", 1e-6, 1e-6, tolerance=8e-6)
    for used, share, said in (
        (0.0, 0.0, "0 % of the tolerance"),
        (1e-8, 0.00125, "<1 % of the tolerance"),
        (2e-6, 0.25, "25 % of the tolerance"),
        (8e-6, 1.0, "100 % of the tolerance"),
        (16e-6, 2.0, "200 % of the tolerance"),
        (1.0, 125000, "125,000 times the tolerance"),
        (math.inf, math.inf, "beyond any tolerance"),
        (math.nan, math.inf, "beyond any tolerance"),
    ):
        one = replace(run, deviation=used)
        shown = heat_map(Verdict("r", "p", kernels=[one, replace(run, module="n")], schemes={"m": "s", "n": "s"}))
        square = next(square for square in shown.squares if square.module == "m")
        assert one.used == pytest.approx(share) and said in square.said
        assert square.colour == (colour(share) if share <= 1 else FAILED_COLOUR)
        assert ("fails" in square.said) == (share > 1) == (square.state is State.FAILED)
    assert colour(0) != colour(1) != FAILED_COLOUR
    blind = replace(run, wrong_layout=1e-7)
    assert "wrong layout" in heat_map(Verdict("r", "p", kernels=[blind], schemes={"m": "s"})).squares[0].said


def test_colours_are_read_in_light_and_dark():
    """Text by 4.5 to 1 from every ground it stands on, pictures by 3 to 1 (WCAG 2.1): page and picture."""
    style = re.findall(r":root \{(.*?)\}", render_page(verdict()), flags=re.S)
    light = dict(re.findall(r"--(\w+): (#\w+)", style[0]))
    dark = dict(re.findall(r"--(\w+): (#\w+)", style[1]))
    assert light.keys() == dark.keys() >= {"fg", "soft", "bg", "band", "ok", "bad", "warn", "bar", "bar1", "bar2"}
    for scheme in (light, dark):
        for ground in (scheme["bg"], scheme["band"]):
            for ink in ("fg", "soft", "ok", "bad", "warn"):
                assert contrast(scheme[ink], ground) >= 4.5, (ink, ground)
        for drawn in (
            *(colour(i / 20) for i in range(21)),
            FAILED_COLOUR,
            scheme["bar"],
            scheme["bar1"],
            scheme["bar2"],
        ):
            assert contrast(drawn, scheme["bg"]) >= 3, drawn
    drawn, _, in_dark = picture(verdict()).partition("@media")
    for rules in (drawn, in_dark):
        ground = re.search(r"\.ground\{fill:(#\w+)", rules)
        inks = re.findall(r"(?:text|\.soft|\.ok|\.bad|\.warn)\{[^}]*?fill:(#\w+)", rules.partition("</style>")[0])
        assert ground and len(inks) == 5 and all(contrast(ink, ground[1]) >= 4.5 for ink in inks)


def test_the_picture_says_what_it_shows():
    setting = Setting("2026-11-27 16:51 UTC", "a processor", {"xpuquant": "9.9", "onednn": "2026"})
    for made in (verdict(), verdict(broken=False), nasty(), Verdict("r", "p"), Verdict("r", "p", schemes={"m": "s"})):
        tree = ET.fromstring(picture(replace(made, setting=setting)))
        names = [tree.find(f"*[@id='{name}']") for name in (tree.get("aria-labelledby") or "").split()]
        assert tree.get("role") == "img" and [name is not None and bool(name.text) for name in names] == [True, True]
        text = " ".join("".join(node.itertext()) for node in tree.iter(f"{SVG}text"))
        assert str(made.outcome) in text and "2026-11-27 16:51 UTC" in text and "onednn 2026" in text
        assert ("pass line" in text) == bool(made.kernels)
        assert ("fails" in text) == any(not run.passed for run in made.kernels)
        assert said_of(made).startswith(str(made.outcome).capitalize())
    healthy = said_of(verdict(broken=False))
    assert "128 modules" in healthy and "5 % of the tolerance (onednn)" in healthy and "none failed" in healthy


def test_what_a_reader_asks_first():
    setting = Setting("2026-11-27 16:51 UTC", "AMD EPYC, 2 cores", {"xpuquant": "9.9", "onednn": "2026"})
    made = replace(verdict(), setting=setting, model="Qwen3ForCausalLM, 32 layers", source="Qwen/Qwen3-8B-AWQ at 4bf0")
    head = render_page(made).partition("<main>")[0]
    for said in (
        *("failed", "Model-xpu", "2026-11-27 16:51 UTC", "Qwen3ForCausalLM, 32 layers", "Qwen/Qwen3-8B-AWQ at 4bf0"),
        *(
            "3.9 MB, 4.0 MB in the source",
            "AMD EPYC, 2 cores",
            "xpuquant 9.9, onednn 2026",
            "int4_linear g128 (128 modules)",
        ),
    ):
        assert said in head
    data = as_data(made)
    assert data["setting"]["date"] == setting.date and data["model"] == made.model and data["source"] == made.source
    assert "Hardware" not in render_page(verdict()).partition("<main>")[0]


@pytest.mark.parametrize("made", [verdict(), verdict(broken=False), nasty(), Verdict("r", "")])
def test_a_page_has_a_structure(made):
    """For readers by ear: one h1, no level skipped, tables with their rows and columns named, scrolling by keys."""
    page = Page(render_page(made))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    names = [tag for tag, _ in page.tags]
    assert names.count("main") == names.count("header") == 1 and ("html", {"lang": "en"}) in page.tags
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    regions = [attributes for _, attributes in page.tags if attributes.get("role") == "region"]
    assert len(regions) == names.count("table") and all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg" and a.get("role") == "img")
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    linked = {(attributes["href"] or "")[1:] for tag, attributes in page.tags if tag == "a"}
    assert linked <= anchors


def test_every_word_is_explained():
    text = render_page(
        replace(verdict(), kernels=[*verdict().kernels, replace(verdict().kernels[0], error=None, reason="no")])
    )
    heads = {re.sub("<.*?>", "", head) for head in re.findall(r'<th scope="col".*?>(.*?)</th>', text)}
    terms = set(re.findall(r"<dt>(.*?)</dt>", text.partition(">Glossary<")[2]))
    layers = {head for head in heads if head.isdecimal() or head in ("", "layer")}
    assert heads - layers == {*COLUMNS} - {"Check", "Result", "What was looked at"}
    assert {*CHECKS} == {check for check, _, _ in checks(verdict())}
    assert {*CHECKS, *COLUMNS} == terms


def test_a_setting():
    """When and with what: of this process; the date as reproducible builds ask for it."""
    made = setting_of(select([]))
    assert made.versions["numpy"] == np.__version__ and "Python" in made.versions and "core" in made.hardware
    assert {backend.name for backend in BACKENDS} - {REFERENCE} == KERNEL_PACKAGES.keys()


@pytest.mark.parametrize(("epoch", "said"), [("0", "1970-01-01 00:00 UTC"), ("1795780800", "2026-11-27 12:00 UTC")])
def test_the_date_of_reproducible_builds(epoch, said, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert setting_of([]).date == said
    for wrong in ("", "-1", "yesterday", "9" * 40):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", setting_of([]).date)


def test_what_config_calls_the_model():
    assert model_of({"architectures": ["A"], "num_hidden_layers": 1}) == "A, 1 layer"
    assert model_of({"model_type": "m", "text_config": {"num_hidden_layers": 1200}}) == "m, 1,200 layers"
    for strange in ({}, {"architectures": []}, {"architectures": 7, "num_hidden_layers": "x", "text_config": []}):
        assert model_of(strange) == ""


def test_numbers_agree_with_what_they_count():
    """Where a verdict speaks of one thing, it says so of one: in the sentence, the tables and the picture."""
    one = [Checked("a", 1, None, "00"), Checked("t", 0, None, "00")]
    run = replace(verdict(broken=False).kernels[0], module="m")
    made = Verdict("r", "p", "s", 1, 0, one, [run], {}, {"m": Sanity(groups=1, zero_scales=1)}, schemes={"m": "s"})
    rounded = Checked("b", 1, None, "00", Claim.ROUNDED, Rounding("F16", 1, 1, 0.1))
    for exact in (
        one,
        [rounded],
        [Checked("a", 1, None, None, Claim.RECORDED, recorded=Claim.DEQUANTIZED)],
        [Checked("a", 1, None, None, Claim.NOT_CHECKED)],
        [Checked("a", 1, None, None, Claim.DEQUANTIZED, Rounding("BF16", 1))],
        [Checked("a", 1, "differs")],
    ):
        for found in ((), tuple(findings(made.sanity, {}))):
            told = replace(made, exact=exact, findings=found)
            text = render_markdown(told) + headline(told) + in_one_line(told) + said_of(told) + render_page(told)
            text = text.partition(">Glossary<")[0]
            assert not re.findall(
                r"(?<![\d.,-])1 (?:\w+ )?(?:matrices|modules|tensors|files|scales|codes|values|warnings|layouts)", text
            )
            assert not re.findall(r"(?<![\d.,-])1 matrix decode ", text)


def test_rows_of_the_heat_map():
    rows, layers = table_of(["model.layers.0.mlp.experts", "model.layers.11.mlp.experts", "lm_head"])
    assert rows == {
        "mlp.experts": {0: "model.layers.0.mlp.experts", 11: "model.layers.11.mlp.experts"},
        "lm_head": {-1: "lm_head"},
    }
    assert layers == [-1, 0, 11]
    several, _ = table_of(["visual.blocks.0.attn.qkv", "model.layers.0.attn.qkv"])
    assert set(several) == {"visual.blocks.*.attn.qkv", "model.layers.*.attn.qkv"}


PROBE = """
<pre id=probe></pre><script>
const style = element => getComputedStyle(element), box = element => element.getBoundingClientRect();
const table = document.querySelector("table.sort"), head = table.querySelectorAll("thead th")[8];
const before = [...table.tBodies[0].rows].length;
head.querySelector("button").click();
const down = [...table.tBodies[0].rows].map(row => Number(row.cells[8].dataset.v));
head.querySelector("button").click();
const up = [...table.tBodies[0].rows].map(row => Number(row.cells[8].dataset.v));
const grid = document.querySelector("table.grid"), squares = [...grid.querySelectorAll(".square")].map(box);
const labels = [...grid.querySelectorAll("tbody th")], numbers = [...grid.querySelectorAll("thead span")].map(box);
const view = document.documentElement.clientWidth, regions = [...document.querySelectorAll(".scroll")];
document.getElementById("probe").textContent = JSON.stringify({
  rows: before, down, up,
  background: style(document.body).backgroundColor, ink: style(document.body).color,
  label: style(labels[0]).color, size: Math.min(...labels.map(label => parseFloat(style(label).fontSize))),
  overlap: labels.filter(label => squares.some(square => box(label).right > square.left + 1
    && box(label).top < square.top && box(label).bottom > square.bottom && square.left > box(label).left)).length,
  crowded: numbers.some((number, i) => i && number.left < numbers[i - 1].right + 2),
  small: Math.min(...squares.map(square => Math.min(square.width, square.height))),
  wide: document.documentElement.scrollWidth - view,
  outside: [...document.querySelectorAll("body *")].filter(element => box(element).right > view + 1
    && !element.closest(".scroll") && !element.closest("svg") && !element.closest("script")).length,
  cut: regions.filter(region => region.scrollWidth > region.clientWidth + 1
    && !["auto", "scroll"].includes(style(region).overflowX)).length,
  linked: [...grid.querySelectorAll("a")].every(a => document.getElementById(a.getAttribute("href").slice(1))),
});
</script>
"""


def luminance(colour: str) -> float:
    hexed = re.fullmatch("#(..)(..)(..)", colour)
    numbers = [int(value, 16) for value in hexed.groups()] if hexed else map(int, re.findall(r"\d+", colour)[:3])
    channels = [value / 255 for value in numbers]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2.1 contrast ratio."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(("scheme", "layers", "width"), [(1, 32, 1280), (0, 80, 768), (1, 80, 390)])
def test_in_a_real_browser(scheme, layers, width, tmp_path: Path):
    """Sorting works, everything is within the screen or scrolls, labels do not overlap; in light (1) and dark (0)."""
    assert CHROMIUM is not None
    write_reports(Tree(tmp_path), verdict(layers))
    # A window is 500 wide at the least: a phone is a frame in one.
    page, outer = tmp_path / "probe.html", tmp_path / "outer.html"
    page.write_text((tmp_path / "verify.html").read_text().replace("</body>", PROBE + "</body>"))
    outer.write_text(f"""<iframe src="probe.html" style="border:0;width:{width}px;height:1400px"></iframe><script>
      onload = () => document.body.append(document.querySelector("iframe").contentDocument.getElementById("probe"))
    </script>""")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={max(width, 500) + 40},1500",
        "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--virtual-time-budget=3000",
        "--dump-dom",
        outer.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    probe = re.search(r'<pre id="probe">(\{.*?\})</pre>', shown, flags=re.S)
    assert probe is not None, shown[-500:]
    found = json.loads(probe[1])
    assert found["rows"] == 4 * layers - 1
    assert found["down"] == sorted(found["down"], reverse=True) and found["up"] == sorted(found["up"])
    assert (luminance(found["background"]) > 0.5) == (scheme == 1)
    assert contrast(found["background"], found["ink"]) > 7
    assert contrast(found["background"], found["label"]) > 7
    assert found["size"] >= 12 and found["small"] >= 8 and found["overlap"] == 0 and not found["crowded"]
    assert found["wide"] <= 0 and found["outside"] == 0 and found["cut"] == 0 and found["linked"]
