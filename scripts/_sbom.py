"""A software bill of materials of a wheel of this project, CycloneDX 1.6 in JSON, on standard output.

    scripts/sbom dist/xpuquant-0.1.0-py3-none-any.whl

The wheel itself with its sha256, every file in it with its own, and what it requires: the versions and hashes that CI
tests with (.ci/requirements.lock), the licences that their metadata state here. Nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parent.parent / ".ci" / "requirements.lock"


def main(wheel: Path) -> dict[str, Any]:
    """The bill of one wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(archive.namelist())
        described = next(name for name in names if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(described).decode())
        files = [_file(name, archive.read(name)) for name in names if not name.endswith("/")]
    purl = f"pkg:pypi/{about['Name']}@{about['Version']}"
    required = {_name(line) for line in about.get_all("Requires-Dist") or [] if "extra ==" not in line}
    components = [_requirement(name) for name in sorted(required)]
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
        "components": components,
        "dependencies": [
            {"ref": purl, "dependsOn": [component["bom-ref"] for component in components]},
            *({"ref": component["bom-ref"]} for component in components),
        ],
    }


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
        about = metadata(name)
    except PackageNotFoundError:
        return ""
    classified = [entry for entry in about.get_all("Classifier") or [] if entry.startswith("License")]
    stated = about.get("License-Expression") or "; ".join(entry.rpartition(" :: ")[2] for entry in classified)
    return stated or (about.get("License") or "").splitlines()[0]


def _requirement(name: str) -> dict[str, Any]:
    version, hashes = locked().get(name, ("", []))
    purl = f"pkg:pypi/{name}@{version}"
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


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _file(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_sha256(data)]}


def _sha256(data: bytes) -> dict[str, str]:
    return {"alg": "SHA-256", "content": hashlib.sha256(data).hexdigest()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: scripts/sbom WHEEL")
    print(json.dumps(main(Path(sys.argv[1])), indent=2))
