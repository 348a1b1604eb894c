"""The pages that people read: every command in them is run, against a small real checkpoint and a Hub on this machine.

What of `xpuquant` cannot run here says so in the page's source (`<!-- not run: needs SLURM -->` before the block) and
is still held to the command line, the scripts and the extras that there are. `ELSEWHERE` lists the commands of others:
who runs each, or why nobody does.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
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

_TYPED = re.compile(
    r"(?:[A-Z_]+=\S+ )?(xpuquant|pip|vllm|hf|make|python|git|docker|podman|[\w.-]+/bin/\S+|scripts/\S+)(\s|$)"
)
_GROUP = typer.main.get_group(COMMANDS)


@dataclass(frozen=True)
class Elsewhere:
    """Commands that the test of a page does not run.

    typed  what is typed, as a pattern of all of it
    by     the script or test that runs it; empty where nobody does
    holds  what stands in that file, or why nobody does
    """

    typed: str
    by: str
    holds: str


ELSEWHERE = (
    Elsewhere(r"vllm serve [\w./-]+", "tests/serving/vllm_plugin/test_serve.py", '"serve", str(model)'),
    Elsewhere(
        r"pip install '?\.(\[onednn\])?'?|pip wheel --no-deps --wheel-dir dist \.|pip install dist/xpuquant-\*\.whl",
        "scripts/lanes/lean",
        "README.md",
    ),
    Elsewhere(r"pip install '\.\[ray\]'", "scripts/test", "scripts/setup dev,onednn,ark,transformers,ray"),
    Elsewhere(r"scripts/test( .*)?", ".ci/run", "scripts/test"),
    Elsewhere(r"scripts/lanes/\w+( .*)?", "", "takes many minutes or gigabytes: its page has the date it last ran"),
    Elsewhere(r"XPUQUANT_KILLS=50 scripts/test .*", "", "kills for minutes: its page has the date it last ran"),
    Elsewhere(r"\.venv-shipped/bin/xpuquant .*", "scripts/lanes/shipped", "venv-shipped"),
    Elsewhere(r"scripts/demo", "", "downloads 2.3 GB: docs/dependencies.md says where it last ran"),
    Elsewhere(r"python scripts/bench/scale\.py .*", "tests/convert/test_pages.py", "def test_a_terabyte_on_paper"),
    Elsewhere(r"python scripts/bench/\w+\.py( .*)?", "", "measures for minutes on a quiet machine; figures are dated"),
    Elsewhere(r"python scripts/families/cells\.py .*", "scripts/lanes/walkthrough", "walkthrough-qwen3.6-35b.md"),
    Elsewhere(r"docker (build|run) .*", "scripts/lanes/container", "build"),
    Elsewhere(r"make( setup| wheel)?|make lint types imports|make \w+", "", "`make -n` knows it: see the test"),
    Elsewhere(r"\.venv/bin/pip install pre-commit && .*", "", "asks a package index for what no test needs"),
    Elsewhere(r"git clone --branch vX\.Y\.Z .*", "", "needs a release"),
)
"""The first that fits is meant."""


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


def test_commands_of_others_are_run_somewhere_or_say_why_not() -> None:
    found: dict[Elsewhere, list[str]] = {entry: [] for entry in ELSEWHERE}
    for page in PAGES:
        for line in lines(page):
            typed = re.sub(r"\s+# .*", "", line.typed).strip()
            if typed.startswith("xpuquant "):
                continue
            fits = [entry for entry in ELSEWHERE if re.fullmatch(entry.typed, typed)]
            assert fits, f"{page}:{line.number}: {typed}: who runs it?"
            found[fits[0]].append(typed)
    for entry, typed_lines in found.items():
        assert typed_lines, f"no page has {entry.typed} any more"
        assert not entry.by or entry.holds in (ROOT / entry.by).read_text(), f"{entry.by} has no {entry.holds}"
        for typed in typed_lines:
            if typed.startswith("make"):
                subprocess.run(["make", "-n", *typed.split()[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_a_terabyte_on_paper(tmp_path: Path) -> None:
    """The command of docs/scale.md makes the table that stands there."""
    (line,) = [line for line in lines("docs/scale.md") if "bench/scale.py" in line.typed]
    shutil.copy(ROOT / "docs" / "scale.md", tmp_path / "scale.md")
    words = [str(tmp_path / "scale.md") if word == "docs/scale.md" else word for word in shlex.split(line.typed)[1:]]
    subprocess.run([sys.executable, "-P", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "scale.md").read_text() == (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.parametrize("client", ["lfs"], indirect=True)
def test_logging_in_with_the_client(hub: Hub, client: str, tmp_path: Path) -> None:
    """`hf auth login`, which pages and errors name, is what a push needs."""
    spans = {span for page in PAGES for span in re.findall(r"`(hf [^`]*)`", (ROOT / page).read_text())}
    assert spans == {"hf auth login"}
    environment = hub.environment(tmp_path / "home")
    token = environment.pop("HF_TOKEN")
    out = tmp_path / "out"
    assert run(["convert", str(SOURCE), str(out), "-q"]) == 0

    def done(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    push = [sys.executable, "-P", "-m", "xpuquant", "push", str(out), "me/model-xpu"]
    refused = done(*push)
    assert refused.returncode == 4 and "run `hf auth login`" in refused.stderr
    entry = "from importlib.metadata import entry_points as e; e(group='console_scripts', name='hf')['hf'].load()()"
    login = done(sys.executable, "-P", "-c", entry, "auth", "login", "--token", token)
    assert login.returncode == 0, login.stderr
    assert done(*push).returncode == 0


def test_what_is_not_run_says_why_and_is_little() -> None:
    reasons = {line.unrun for page in PAGES for line in lines(page) if line.typed.startswith("xpuquant ")}
    assert reasons - {None} <= {
        "needs SLURM",
        "needs a cluster of Ray",
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
