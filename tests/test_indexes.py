"""The pages that list things list all of them."""

from __future__ import annotations

import fnmatch
import inspect
import re
from pathlib import Path

import pytest
import typer

import xpuquant
from xpuquant.conversion.cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
ANSWERING = {"as_json", "quiet", "verbose", "out_option", "sources_file"}
"""Options for a terminal alone."""
SCRIPTS = sorted(
    path.relative_to(ROOT / "scripts")
    for path in (ROOT / "scripts").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and path.name != "README.md"
)


def sections() -> dict[str, set[str]]:
    """Folder of scripts/README.md's section → names in backticks there; folders end in a slash."""
    parts = re.split(r"^## (\w+)/.*$", (ROOT / "scripts" / "README.md").read_text(), flags=re.MULTILINE)
    texts = {".": parts[0], **{parts[i]: parts[i + 1] for i in range(1, len(parts), 2)}}
    return {folder: set(re.findall(r"`([^`\s]+)`", text)) for folder, text in texts.items()}


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_the_index_names_every_script(script: Path) -> None:
    folder, _, name = script.as_posix().rpartition("/")
    top, _, below = folder.partition("/")
    named = sections()[top or "."]
    wanted = f"{below}/" if below else name
    assert any(fnmatch.fnmatch(wanted, pattern) for pattern in named), f"scripts/README.md does not name {script}"


def test_the_index_names_no_script_that_is_gone() -> None:
    there = {script.name for script in SCRIPTS}
    for folder, names in sections().items():
        for name in names:
            if re.fullmatch(r"\w[\w-]*(\.(py|sh|txt))?", name):
                assert name in there, f"scripts/README.md names {name} below {folder}"


def test_the_python_page_names_every_argument_beside_its_option() -> None:
    """docs/api.md has a row for each argument that is not simply called like its option."""
    page = (ROOT / "docs" / "api.md").read_text()
    group = typer.main.get_command(COMMANDS)
    options = {
        (name, parameter.name): parameter.opts[0]
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.hidden and parameter.name not in ANSWERING
    }
    for (command, argument), option in options.items():
        if option != f"--{argument.replace('_', '-')}":
            assert re.search(
                rf"^\| `{command}` \| `{re.escape(option)}[^`]*` \| `[^|]*\b{argument}\b", page, re.MULTILINE
            ), f"docs/api.md: no row for {command} {option} ({argument})"
    for row in re.findall(r"^\| `(\w+)` \| `(--[\w-]+)", page, re.MULTILINE):
        assert row in {(command, option) for (command, _), option in options.items()}, row


def test_the_python_page_has_every_function_and_result() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for name in xpuquant.__all__:
        found = getattr(xpuquant, name)
        if inspect.isfunction(found) or (inspect.isclass(found) and not issubclass(found, Exception)):
            assert re.search(rf"\b{name}\b", page), f"docs/api.md does not name {name}"
