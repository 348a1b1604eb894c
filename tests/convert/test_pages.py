"""The pages that people read: every command in them is run, against a small real checkpoint and a Hub on this machine.

What cannot run here says so in the page's source (`<!-- not run: needs vLLM -->` before the block) and is still held to
the command line, the scripts and the extras that there are.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from support.checkpoints import FIXTURES
from support.hub.process import Hub

from xpuquant.conversion.cli.app import COMMANDS, run

pytest_plugins = "support.hub.fixtures"

ROOT = Path(__file__).parents[2]
SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32"
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*.md")]
    if page.name not in ("CHANGELOG.md", "commands.md")
)
"""The changelog speaks of what was, too; docs/commands.md is made from the command line."""

SEEDED = ("Qwen/Qwen3-8B-AWQ", "Qwen/Qwen3-30B-A3B-GPTQ-Int4")
"""What pages take from the Hub: here each is the small checkpoint."""

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n\n?)?"
    r"(?:^```(?P<language>\w*)\n(?P<fenced>.*?)^```$|(?<=\n\n)(?P<indented>(?:^ {4}[^\n]*\n|^\n(?= {4}))+))",
    re.MULTILINE | re.DOTALL,
)
"""A block of code, fenced or indented, with its mark."""

_TYPED = re.compile(r"(xpuquant|pip|vllm|hf|make|python|scripts/\S+)(\s|$)")
_GROUP = typer.main.get_group(COMMANDS)


@dataclass(frozen=True)
class Line:
    """A command of a page; `unrun`: why it is not run."""

    number: int
    typed: str
    unrun: str | None


def lines(page: str) -> Iterator[Line]:
    """Every line of the page's blocks of code that is typed into a shell."""
    text = (ROOT / page).read_text()
    for block in _BLOCK.finditer(text):
        code = block["indented"] if block["fenced"] is None else block["fenced"] if block["language"] == "sh" else ""
        first = text.count("\n", 0, text.index(code, block.start()))
        for number, line in enumerate(code.splitlines(), first + 1):
            if _TYPED.match(line.strip()):
                # [OUT] is how pages say that it may be left out.
                yield Line(number, re.sub(r"(?<=\s)\[(\w+)\]", r"\1", line.strip()), block["why"])


COMMAND_PAGES = [page for page in PAGES if any(line.typed.startswith("xpuquant ") for line in lines(page))]


@pytest.mark.parametrize("client", ["lfs"], indirect=True)
@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_every_command_runs(page: str, hub: Hub, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the page's order, in one folder. SRC, A and B are there; OUT is where the page does not make it."""
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.chdir(room)
    for name in SEEDED:
        hub.seed(name, SOURCE)
    for name in ("SRC", "A", "B"):
        shutil.copytree(SOURCE, name)
    shown = [line for line in lines(page) if line.typed.startswith("xpuquant ") and line.unrun is None]
    for line in shown:
        words = shlex.split(line.typed, comments=True)[1:]
        for needed in [word for word in words if word in ("OUT", "Qwen3-30B-A3B-GPTQ-Int4-xpu")]:
            if words[0] != "convert" and not Path(needed).exists():
                assert run(["convert", "SRC", needed, "-q"]) == 0
        assert run(words) == 0, f"{page}:{line.number}: {line.typed}"
    for code in re.findall(
        r"^```python\n(import xpuquant\n.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    ):
        exec(compile(code, page, "exec"), {})


def test_what_is_not_run_says_why_and_is_little() -> None:
    reasons = {line.unrun for page in PAGES for line in lines(page) if line.typed.startswith("xpuquant ")}
    assert reasons - {None} <= {
        "needs SLURM",
        "needs a cluster of Ray",
        "needs an Intel GPU",
        "needs vLLM",
        "run by scripts/lanes/walkthrough",
    }
    assert {
        line.typed.split()[1]
        for page in COMMAND_PAGES
        for line in lines(page)
        if line.unrun is None and line.typed.startswith("xpuquant ")
    } >= {
        *("inspect", "convert", "verify", "push", "diff", "explain", "formats", "doctor", "finish"),
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one(page: str) -> None:
    """In blocks and in running text: commands and options of ours, scripts, targets and extras that there are; nothing
    is installed from an index that has no release."""
    text = (ROOT / page).read_text()
    for line in lines(page):
        words = shlex.split(line.typed, comments=True)
        where = f"{page}:{line.number}: {line.typed}"
        if words[0] == "xpuquant":
            command = _GROUP.commands[words[1]]
            command.make_context(words[1], words[2:], resilient_parsing=False)
        for word in words:
            if re.match(r"scripts/[\w/.-]+$", word):
                assert (ROOT / word).is_file(), where
        if words[0] == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= set(targets), where
    spans = re.findall(r"`xpuquant ((?:\w|-)+)([^`]*)`", text)
    for name, rest in spans:
        if name in ("COMMAND", "help") or name.startswith("-"):
            continue
        assert name in _GROUP.commands, f"{page}: xpuquant {name}"
        options = {
            option
            for parameter in _GROUP.commands[name].params
            for option in [*parameter.opts, *parameter.secondary_opts]
        }
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest):
            assert option in {*options, "--help"}, f"{page}: xpuquant {name} {option}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:\.|xpuquant)\[([\w,]+)\]", text):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys(), f"{page}: {extras}"
    if "urls" not in project:
        assert not re.search(r"pip install (?:-U )?'?xpuquant\b(?!\[)", text), f"{page}: no index has a release"


def test_the_first_lines_say_what_it_is_for_whom_and_what_to_type() -> None:
    """README, before the first heading below its title."""
    head = (ROOT / "README.md").read_text().partition("\n## ")[0]
    assert "Intel GPU" in head and "For whom" in head and "pip install '.[onednn]'" in head
    assert {line.typed.split()[1] for line in lines("README.md")} >= {"inspect", "convert"}
    picture = re.search(r"!\[([^\]]+)\]\(([^)]+)\)", head)
    assert picture and len(picture[1]) > 40
    drawn = (ROOT / picture[2]).read_text()
    assert "aria-label=" in drawn and "://" not in drawn.replace("http://www.w3.org/2000/svg", "")
    said = re.sub(r"<[^>]+>|&#160;|\s", "", drawn.partition("</style>")[2])
    assert "$xpuquantinspect" in said and "$xpuquantconvert" in said and "decodeexactlytothesource" in said
