"""The Containerfile and the workflow for CI: what they say is there, and their steps do what they are for."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import FIXTURES
from support.injected_faults import copy

import xpuquant
from xpuquant.kernels import backends

ROOT = Path(__file__).parents[2]
SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32"
WORKFLOW = ROOT / "docs" / "ci-example.yml"


@pytest.fixture(scope="module")
def stages() -> list[list[tuple[str, str]]]:
    loaded = runpy.run_path(str(ROOT / "scripts" / "lanes" / "container_steps.py"))
    found: list[list[tuple[str, str]]] = loaded["instructions"]()
    return found


def test_the_image_has_what_it_copies_and_nothing_else(stages: list[list[tuple[str, str]]]) -> None:
    sources = {word for name, rest in stages[0] if name == "COPY" for word in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in sources)
    packages = re.findall(r'^"xpuquant(?:\.\w+)?" = "(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {*packages, "pyproject.toml", "README.md", "LICENSE"} == sources
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(allowed) == sources


def test_the_image_runs_as_nobody_special(stages: list[list[tuple[str, str]]]) -> None:
    build, last = stages
    said = dict(last)
    assert [rest.split()[0] for stage in stages for name, rest in stage if name == "FROM"] == [
        "docker.io/library/python:3.12-slim"
    ] * 2
    uid = said["USER"]
    assert uid.isdecimal() and int(uid) > 0 and f"--uid {uid} " in said["RUN"]
    assert said["ENTRYPOINT"] == '["xpuquant"]' and said["WORKDIR"] == "/work"
    assert "HF_HOME=/cache/" in said["ENV"] and said["VOLUME"] == '["/work", "/cache"]'
    assert "install --directory --owner xpuquant /work /cache" in said["RUN"]
    names = [name for name, _ in last]
    assert names.index("USER") > names.index("RUN") and dict(build)["ARG"] == 'EXTRAS=""'


def test_every_step_is_shell(stages: list[list[tuple[str, str]]]) -> None:
    """`scripts/lanes/container` runs them; here they are only read."""
    for name, rest in (pair for stage in stages for pair in stage):
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
    script = runpy.run_path(str(ROOT / "scripts" / "lanes" / "container_steps.py"))["steps"](Path("/room"))
    assert script[-1] == '/room/opt/xpuquant/bin/python -m pip install --no-cache-dir --no-compile ".${EXTRAS}"'
    subprocess.run(["bash", "-n", "-c", "\n".join(script)], check=True)


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deployed") / "model-xpu"
    xpuquant.convert(SOURCE, out)
    return out


def test_the_workflow_is_one(workflow: dict[str, Any]) -> None:
    (job,) = workflow["jobs"].values()
    assert set(job) == {"runs-on", "timeout-minutes", "permissions", "steps"} and job["permissions"] == {}
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
    (install,) = [step["run"] for step in job["steps"] if step.get("name") == "Install"]
    assert install == 'python -m pip install "xpuquant[onednn] @ $XPUQUANT"', "which runs without an index of ours"
    # A secret reaches no command line, and what is named is quoted.
    runs = "\n".join(step.get("run", "") for step in job["steps"])
    assert "${{" not in runs and not re.search(r'(?<!")\$(REPO|SOURCE)', runs)


def carry_out(workflow: dict[str, Any], repo: Path, room: Path) -> tuple[int, str]:
    """The steps after the installation, as a runner does: the exit code of the first that failed, and the summary."""
    programs = room / "bin"
    programs.mkdir()
    (programs / "xpuquant").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m xpuquant "$@"\n')
    (programs / "xpuquant").chmod(0o755)
    summary = room / "summary.md"
    summary.touch()
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "REPO": str(repo),
        "SOURCE": str(SOURCE),
        "GITHUB_STEP_SUMMARY": str(summary),
        "HF_HUB_OFFLINE": "1",
    }
    (job,) = workflow["jobs"].values()
    failed = 0
    for step in job["steps"]:
        if "run" not in step or step.get("name") == "Install" or (failed and "if" not in step):
            continue
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        code = subprocess.run(shell, cwd=room, env=environment, capture_output=True, check=False).returncode
        failed = failed or code
    return failed, summary.read_text()


@pytest.fixture(scope="module")
def onednn() -> None:
    reason = backends()["onednn"].unavailable()
    if reason is not None:
        pytest.skip(f"the workflow requires onednn: {reason}")


@pytest.mark.usefixtures("onednn")
def test_a_repo_that_is_right_passes(workflow: dict[str, Any], converted: Path, tmp_path: Path) -> None:
    code, summary = carry_out(workflow, converted, tmp_path)
    assert code == 0 and "verified" in summary
    assert (tmp_path / "report" / "verify.html").exists()


@pytest.mark.usefixtures("onednn")
def test_a_damaged_repo_does_not(workflow: dict[str, Any], converted: Path, tmp_path: Path) -> None:
    repo = copy(converted, tmp_path / "model-xpu")
    name = repo.find("qweight")
    assert name is not None
    codes = repo.read(name)
    codes[100] ^= 1
    repo.write(name, codes)
    code, summary = carry_out(workflow, repo.folder, tmp_path)
    assert code == 1 and "failed" in summary


@pytest.mark.usefixtures("onednn")
def test_a_repo_that_was_rounded_does_not(workflow: dict[str, Any], tmp_path: Path) -> None:
    xpuquant.convert(SOURCE, tmp_path / "rounded", scale_dtype="bfloat16")
    assert carry_out(workflow, tmp_path / "rounded", tmp_path)[0] == 1
