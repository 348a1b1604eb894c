"""A software bill of materials of a wheel of this project, CycloneDX 1.6 in JSON, on standard output.

    .venv/bin/python -P scripts/release/sbom.py dist/xpuquant-0.1.0-py3-none-any.whl > xpuquant.cdx.json

The wheel itself with its sha256, every file in it with its own, and everything that its core requirements bring: the
versions and hashes that CI tests with (.ci/requirements.lock), the licences that the metadata installed here state, and
who requires whom. Nothing is fetched.

Why not `cyclonedx-py`: its `environment` lists what is installed, without the sha256 of the wheel's files and of what
the index holds; its `requirements` lists the whole lock, development tools included, without licences.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).resolve().parents[2] / ".ci" / "requirements.lock"


def bill_of_materials(wheel: Path) -> dict[str, Any]:
    """The bill of one wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(archive.namelist())
        described = next(name for name in names if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(described).decode())
        files = [_file(name, archive.read(name)) for name in names if not name.endswith("/")]
    core = [Requirement(line) for line in about.get_all("Requires-Dist") or []]
    brought = closure(core)
    reference = {name: f"pkg:pypi/{name}@{locked().get(name, ('', []))[0]}" for name in brought}
    purl = f"pkg:pypi/{about['Name']}@{about['Version']}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": purl,
                "name": about["Name"],
                "version": about["Version"],
                "purl": purl,
                "licenses": [{"license": {"id": about["License-Expression"]}}],
                "hashes": [_sha256(wheel.read_bytes())],
                "components": files,
            }
        },
        "components": [_component(name, reference[name]) for name in sorted(brought)],
        "dependencies": [
            {"ref": purl, "dependsOn": sorted(reference[name] for name in wanted(core))},
            *(
                {"ref": reference[name], "dependsOn": sorted(reference[each] for each in direct if each in reference)}
                for name, direct in sorted(brought.items())
            ),
        ],
    }


def closure(core: Iterable[Requirement]) -> dict[str, list[str]]:
    """Everything that requirements bring, as installed here: package → the packages that it requires itself.

    What is not installed is for another system, and left out.
    """
    brought: dict[str, list[str]] = {}
    pending = wanted(core)
    while pending:
        name = pending.pop()
        if name in brought:
            continue
        try:
            brought[name] = wanted(Requirement(line) for line in requires(name) or [])
        except PackageNotFoundError:
            continue
        pending += brought[name]
    return brought


def wanted(requirements: Iterable[Requirement]) -> list[str]:
    """The names that apply to this system, without extras."""
    return [
        canonicalize_name(each.name)
        for each in requirements
        if each.marker is None or each.marker.evaluate({"extra": ""})
    ]


def locked() -> dict[str, tuple[str, list[str]]]:
    """Package → (version, sha256 of its files), as the lock has them."""
    table: dict[str, tuple[str, list[str]]] = {}
    name = ""
    for line in LOCK.read_text().splitlines():
        if match := re.match(r"(?:# .*: )?([a-z0-9-]+)==([^ ;]+)", line):
            name = match[1]
            table[name] = (match[2], [])
        elif name and (hashed := re.search(r"--hash=sha256:([0-9a-f]{64})", line)):
            table[name][1].append(hashed[1])
    return table


def licence(name: str) -> str:
    """What a package's own metadata say; empty where it is not installed."""
    try:
        about: Message = metadata(name)  # type: ignore[assignment]
    except PackageNotFoundError:
        return ""
    classified = [entry for entry in about.get_all("Classifier") or [] if entry.startswith("License")]
    stated = about.get("License-Expression") or "; ".join(entry.rpartition(" :: ")[2] for entry in classified)
    return stated or (about.get("License") or "").splitlines()[0]


def _component(name: str, purl: str) -> dict[str, Any]:
    version, hashes = locked().get(name, ("", []))
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        **({"licenses": [{"license": {"name": licence(name)}}]} if licence(name) else {}),
        "externalReferences": [
            {"type": "distribution", "url": purl, "hashes": [{"alg": "SHA-256", "content": each}]} for each in hashes
        ],
    }


def _file(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_sha256(data)]}


def _sha256(data: bytes) -> dict[str, str]:
    return {"alg": "SHA-256", "content": hashlib.sha256(data).hexdigest()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/release/sbom.py WHEEL")
    print(json.dumps(bill_of_materials(Path(sys.argv[1])), indent=2))
