"""The part of .ci/requirements.lock that some extras need, as files for pip.

    python scripts/release/locked_part.py EXTRA,EXTRA... FOLDER

`FOLDER/hashed` is for `pip install --require-hashes --no-deps`; `FOLDER/unhashed` names what the lock gives no hash
for, `FOLDER/uncovered` the extras that it was not made for; both may be empty. For scripts/setup, which runs it before
anything is installed: the standard library only.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def asked(extras: list[str]) -> set[str]:
    """The names that pyproject.toml lists: core, these extras, and what builds the package."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = table["project"]
    lines = [*table["build-system"]["requires"], *project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in lines}


def entries(lock: str) -> dict[str, tuple[str, list[str]]]:
    """Package → (its lines, the packages that ask for it)."""
    found: dict[str, tuple[str, list[str]]] = {}
    for entry in re.split(r"\n(?=[a-z0-9])", lock):
        if match := re.match(r"([a-z0-9-]+)==", entry):
            parents = re.search(r"# via (.*)", entry)
            found[match[1]] = (entry, parents[1].split(", ") if parents else [])
    return found


def part(lock: str, extras: list[str]) -> str:
    """The entries that are asked for, and those that they ask for in turn."""
    wanted, all_entries = asked(extras), entries(lock)
    while more := {name for name, (_, parents) in all_entries.items() if wanted & {*parents}} - wanted:
        wanted |= more
    return "\n".join(entry for name, (entry, _) in all_entries.items() if name in wanted)


def unhashed(lock: str, extras: list[str]) -> list[str]:
    """What the lock's header says is not listed."""
    return [
        line
        for line in re.findall(r"^# Not listed.*: (\S+==\S+)", lock, re.MULTILINE)
        if line.split("==")[0] in asked(extras)
    ]


def main() -> None:
    extras, folder = sys.argv[1].split(","), Path(sys.argv[2])
    lock = (ROOT / ".ci" / "requirements.lock").read_text()
    covered = re.findall(r"extras ([a-z,]+)\.", lock)[0].split(",")
    (folder / "uncovered").write_text(",".join(extra for extra in extras if extra not in covered))
    extras = [extra for extra in extras if extra in covered]
    (folder / "hashed").write_text(part(lock, extras) + "\n")
    (folder / "unhashed").write_text("\n".join(unhashed(lock, extras)))


if __name__ == "__main__":
    main()
