"""The reports: complete, safe to open, readable in a real browser in both colour schemes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from xpuquant.conversion.repo.checksums import is_sealed
from xpuquant.conversion.report.heatmap import heat_map, table_of
from xpuquant.conversion.report.markdown import render_markdown
from xpuquant.conversion.report.reports import as_data, write_reports
from xpuquant.conversion.report.sentences import exactness, in_one_line
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify.proof import Checked, Claim, Proof, Rounding
from xpuquant.conversion.verify.verdict import Agreement, Finding, Sanity, Verdict

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
    assert "## Modules that no real kernel computed here: 1 of 128" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    worst = text.split("largest deviations")[1].splitlines()[4]
    assert "model.layers.5.mlp.down_proj" in worst


def test_the_end_of_a_conversion_in_one_line():
    said = in_one_line(verdict(broken=False))
    assert said.startswith("128 matrices decode exactly to the source; onednn F32 within")


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
        ([replace(rounded, error="differs")], "1 modules or tensors differ"),
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


def test_heat_map_has_a_cell_for_every_module():
    made = verdict()
    tree = ET.fromstring(heat_map(made))
    titles = [node.text or "" for node in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len(made.schemes)
    assert sum("no kernel ran" in title for title in titles) == 1
    bad = [node for node in tree.iter() if node.get("class") == "cell bad"]
    assert len(bad) == 1


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
const table = document.querySelector("table.sort"), head = table.querySelectorAll("th")[10];
const before = [...table.tBodies[0].rows].length;
head.querySelector("button").click();
const down = [...table.tBodies[0].rows].map(row => Number(row.cells[10].dataset.v));
head.querySelector("button").click();
const up = [...table.tBodies[0].rows].map(row => Number(row.cells[10].dataset.v));
const svg = document.querySelector("svg.hm"), cells = [...svg.querySelectorAll(".cell")].map(box);
const texts = [...svg.querySelectorAll("text")];
const labels = texts.filter(text => text.getAttribute("text-anchor") === "end" && box(text).top > cells[0].top - 2);
document.getElementById("probe").textContent = JSON.stringify({
  rows: before, down, up,
  background: style(document.body).backgroundColor, ink: style(document.body).color,
  label: style(labels[0]).fill, size: Math.min(...texts.map(text => box(text).height)),
  overlap: labels.filter(text => cells.some(cell => box(text).right > cell.left && box(text).left < cell.right
    && box(text).top + 2 < cell.bottom - 2 && box(text).bottom - 2 > cell.top + 2)).length,
  cut: texts.filter(text => box(text).left < box(svg).left - 1 || box(text).right > box(svg).right + 1).length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  linked: [...svg.querySelectorAll("a")].every(a => document.getElementById(a.getAttribute("href").slice(1))),
});
</script>
"""


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2.1 contrast ratio."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(("scheme", "layers", "width"), [(1, 32, 1200), (0, 32, 1200), (1, 80, 800)])
def test_in_a_real_browser(scheme, layers, width, tmp_path: Path):
    """Sorting works, labels are readable and do not overlap, in light (1) and dark (0)."""
    assert CHROMIUM is not None
    write_reports(Tree(tmp_path), verdict(layers))
    page = tmp_path / "probe.html"
    page.write_text((tmp_path / "verify.html").read_text().replace("</body>", PROBE + "</body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1400",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--virtual-time-budget=3000",
        "--dump-dom",
        page.as_uri(),
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
    assert found["size"] >= 9 and found["overlap"] == 0 and found["cut"] == 0 and found["wide"] <= 0
    assert found["linked"]
