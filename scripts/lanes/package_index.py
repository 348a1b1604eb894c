"""Files of released packages, for the lanes that read releases: by the JSON form of the index that pip reads (PEP 691).

`PIP_INDEX_URL` names another index than PyPI. What was downloaded lies in a folder, under its own name, and is not
fetched twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
_VERSION = re.compile(r"-(\d+(?:\.\d+)*)(?:-|\.tar\.gz$)")


@dataclass(frozen=True)
class Released:
    """One file of a release."""

    name: str
    version: str
    sha256: str
    url: str

    @property
    def number(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split("."))

    def fetch(self, folder: Path) -> Path:
        """The file in `folder`. Raises ValueError where its bytes are not those that the index announces."""
        path = folder / self.name
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(self.url) as answer:
                path.write_bytes(answer.read())
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            path.unlink()
            raise ValueError(f"{self.name} is not what the index announces: its sha256 differs")
        return path


def released(project: str, suffix: str) -> Iterator[Released]:
    """Files of a project whose names end so, oldest version first; pre-releases and yanked files left out."""
    request = urllib.request.Request(
        f"{_INDEX.rstrip('/')}/{project}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request) as answer:
        listing = json.load(answer)
    found = []
    for file in listing["files"]:
        version = _VERSION.search(file["filename"])
        if file["filename"].endswith(suffix) and version is not None and not file.get("yanked"):
            found.append(Released(file["filename"], version[1], file["hashes"]["sha256"], file["url"]))
    yield from sorted(found, key=lambda one: one.number)
