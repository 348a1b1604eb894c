"""What is installed besides us: few, known, pinned by hash, and of licences that allow it. Offline."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
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
from release.sbom import bill_of_materials, closure, licence, locked  # noqa: E402

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
    "GNU Lesser General Public License",
)


def test_both_commands_install_the_lock_and_nothing_else() -> None:
    """README's two commands ask for extras that are locked, and take the lock; files without a hash are refused."""
    (locked_extras,) = re.findall(r"extras ([a-z,]+)\.", LOCK.read_text())
    assert re.findall(r"scripts/setup ([a-z,]+)", (ROOT / "scripts" / "test").read_text()) == [locked_extras]
    for extras in re.findall(r"extras=([a-z,]+)", (ROOT / "scripts" / "demo").read_text()):
        assert {*extras.split(",")} < {*locked_extras.split(",")}
    assert "XPUQUANT_NEWEST" not in (ROOT / "scripts" / "test").read_text() + (ROOT / "scripts" / "demo").read_text()
    setup = (ROOT / "scripts" / "setup").read_text()
    assert '--require-hashes --no-deps -r "$part/hashed"' in setup and "--no-deps --no-build-isolation -e" in setup


@pytest.mark.parametrize("extras", ["onednn", "onednn,transformers", "dev", "ark,ray"])
def test_a_part_of_the_lock_is_complete(extras: str, tmp_path: Path) -> None:
    """What the extras bring, by the metadata of what is installed here, with the versions and hashes of the lock."""
    command = [sys.executable, "-P", str(ROOT / "scripts" / "release" / "locked_part.py"), extras, str(tmp_path)]
    subprocess.run(command, check=True)
    lines = (tmp_path / "hashed").read_text()
    names = re.findall(r"^([a-z0-9-]+)==", lines, re.MULTILINE)
    assert all(line in LOCK.read_text() for line in lines.splitlines())
    unhashed = [line.split("==")[0] for line in (tmp_path / "unhashed").read_text().split()]
    groups = PROJECT["optional-dependencies"]
    asked = [*CORE, *(Requirement(text) for extra in extras.split(",") for text in groups[extra])]
    brought = {name for name in closure(asked) if not re.match("triton|nvidia-|cuda-", name)}
    assert brought <= {*names, *unhashed}
    assert "setuptools" in names  # builds the package, without isolation
    assert unhashed == (["torch"] if "torch" in brought else [])
    assert len(names) < len(locked())


def test_the_lock_holds_what_ci_installs() -> None:
    extras = PROJECT["optional-dependencies"]
    pinned = locked()
    listed = re.findall(r"extras ([a-z,]+)\.", LOCK.read_text())[0].split(",")
    for requirement in [*CORE, *(Requirement(text) for extra in listed for text in extras[extra])]:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in the lock: run scripts/release/lock"
        assert pinned[name][0] in requirement.specifier, f"{name}: run scripts/release/lock"
    for name, (version, hashes) in pinned.items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), name
        assert hashes or name == "torch", f"{name} has no hash"


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
    """All that the lean install brings."""
    brought = closure(CORE)
    assert "torch" not in brought
    for name in brought:
        stated = licence(name)
        assert any(word in stated for word in FREE), f"{name}: {stated!r}"


def test_what_extras_ask_for_is_free_software_or_said_to_be_intels() -> None:
    """What those bring in turn (PyTorch its GPU libraries) is theirs to answer for."""
    rows = (ROOT / "docs" / "dependencies.md").read_text().splitlines()
    extras = {Requirement(text).name for group in PROJECT["optional-dependencies"].values() for text in group}
    judged = {name: stated for name in extras if (stated := licence(name))}
    assert {"torch", "onednn", "transformers", "pytest"} <= judged.keys()
    for name, stated in judged.items():
        said = any(row.startswith(f"| `{name}` |") and "Intel's redistributable runtime" in row for row in rows)
        assert said or any(word in stated for word in FREE), f"{name}: {stated!r}"


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
    assert {"numpy", "typer"} <= loaded


def test_bill_of_materials(wheel: Path) -> None:
    bill = bill_of_materials(wheel)
    about = bill["metadata"]["component"]
    assert about["hashes"][0]["content"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    with zipfile.ZipFile(wheel) as archive:
        held = {n: hashlib.sha256(archive.read(n)).hexdigest() for n in archive.namelist() if not n.endswith("/")}
    assert {file["name"]: file["hashes"][0]["content"] for file in about["components"]} == held
    named = {part["bom-ref"]: part["name"] for part in bill["components"]}
    assert set(named.values()) == set(closure(CORE))
    edges = {edge["ref"]: edge["dependsOn"] for edge in bill["dependencies"]}
    assert {named[each] for each in edges.pop(about["bom-ref"])} == {canonicalize_name(r.name) for r in CORE}
    assert edges.keys() == named.keys() and {each for direct in edges.values() for each in direct} <= named.keys()
    assert all(part["version"] for part in bill["components"])
    json.dumps(bill)
