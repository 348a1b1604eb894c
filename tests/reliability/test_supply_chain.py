"""What is installed besides us: few, known, pinned by hash, and of licences that allow it. Offline."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / ".ci" / "requirements.lock"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(text) for text in PROJECT["dependencies"]]

sys.path.insert(0, str(ROOT / "scripts"))
from _sbom import licence, locked, main  # noqa: E402

FREE = (
    "Apache",
    "BSD",
    "MIT",
    "ISC",
    "PSF",
    "Python Software Foundation",
    "MPL",
    "Mozilla Public License",
    "Unlicense",
)


def closure(requirements: list[Requirement]) -> Iterator[str]:
    """Everything that comes along, as installed here."""
    seen: set[str] = set()
    pending = [requirement.name for requirement in requirements]
    while pending:
        name = canonicalize_name(pending.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue  # for another system
        yield name
        for line in lines:
            further = Requirement(line)
            if further.marker is None or further.marker.evaluate({"extra": ""}):
                pending.append(further.name)


def test_ci_installs_the_lock_and_nothing_else() -> None:
    """The default suite's extras are those of the lock; CI asks for it; then files without a hash are refused."""
    extras = re.findall(r"scripts/setup ([a-z,]+)", (ROOT / "scripts" / "test").read_text())
    assert extras == re.findall(r"extras ([a-z,]+)\.", LOCK.read_text())
    assert "XPUQUANT_LOCKED=1 scripts/test" in (ROOT / ".ci" / "run").read_text()
    setup = (ROOT / "scripts" / "setup").read_text()
    assert '--require-hashes --no-deps -r "$lock"' in setup and "--no-deps --no-build-isolation -e" in setup


def test_the_lock_holds_what_ci_installs() -> None:
    extras = PROJECT["optional-dependencies"]
    pinned = locked()
    listed = re.findall(r"extras ([a-z,]+)\.", LOCK.read_text())[0].split(",")
    for requirement in [*CORE, *(Requirement(text) for extra in listed for text in extras[extra])]:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in the lock: run scripts/lock"
        assert pinned[name][0] in requirement.specifier, f"{name}: run scripts/lock"
    for name, (version, hashes) in pinned.items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), name
        assert hashes or name == "torch", f"{name} has no hash"
    assert (ROOT / "scripts" / "setup").read_text().count(f"torch=={pinned['torch'][0]}"), "scripts/lock follows setup"


def test_the_lock_names_no_place() -> None:
    text = LOCK.read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    assert not re.search(r"^(-e|\.|/|[a-z0-9-]+ *@)", text, re.MULTILINE), "only versions of the index"


def test_each_direct_dependency_is_accounted_for() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    extras = [Requirement(text) for group in PROJECT["optional-dependencies"].values() for text in group]
    for requirement in [*CORE, *extras]:
        assert f"| `{requirement.name}`" in text, f"docs/dependencies.md does not say why {requirement.name}"


def test_core_dependencies_are_free_software() -> None:
    for name in closure(CORE):
        stated = licence(name)
        assert any(word in stated for word in FREE), f"{name}: {stated!r}"


def test_a_conversion_imports_nothing_heavy(tmp_path: Path) -> None:
    """numpy and ml_dtypes, the command line's own two, and YAML for the card. The others are for serving, the Hub, and
    checking."""
    program = (
        "import sys; from xpuquant.conversion.cli.app import run; code = run(sys.argv[1:]); "
        "import json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules}))); sys.exit(code)"
    )
    source = ROOT / "tests" / "fixtures" / "gptqmodel-qwen3-w4g32"
    process = subprocess.run(
        [sys.executable, "-P", "-c", program, "convert", str(source), str(tmp_path / "out"), "--no-verify", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(json.loads(process.stdout.splitlines()[-1]))
    heavy = {"torch", "safetensors", "transformers", "vllm", "ray", "onednn", "requests", "httpx"}
    assert not loaded & heavy
    assert {"numpy", "typer", "rich"} <= loaded


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built without network."""
    out = tmp_path_factory.mktemp("wheel")
    copy = tmp_path_factory.mktemp("tree") / "xpuquant"
    subprocess.run(["cp", "-r", "--", str(ROOT / "pyproject.toml"), str(ROOT / "README.md"), str(out)], check=True)
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "xpuquant", "convert", "formats", "kernels"):
        subprocess.run(["cp", "-rL", str(ROOT / name), str(copy)], check=True)
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-q",
            "-w",
            str(out),
            str(copy),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    if process.returncode:
        pytest.skip(f"no wheel can be built here: {process.stderr.strip().splitlines()[-1]}")
    return next(out.glob("*.whl"))


def test_bill_of_materials(wheel: Path) -> None:
    bill = main(wheel)
    about = bill["metadata"]["component"]
    assert about["hashes"][0]["content"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    with zipfile.ZipFile(wheel) as archive:
        held = {n: hashlib.sha256(archive.read(n)).hexdigest() for n in archive.namelist() if not n.endswith("/")}
    assert {file["name"]: file["hashes"][0]["content"] for file in about["components"]} == held
    assert {part["name"] for part in bill["components"]} == {canonicalize_name(r.name) for r in CORE}
    assert all(part["version"] for part in bill["components"])
    json.dumps(bill)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert all(name.startswith("xpuquant/") and name.endswith((".py", "py.typed")) for name in names)
    assert {
        "xpuquant/conversion/cli/app.py",
        "xpuquant/formats/readers/gptq.py",
        "xpuquant/kernels/__init__.py",
    } <= set(names)
