"""The steps of the first stage of the Containerfile as a shell script, below a folder: for `scripts/lanes/container`,
where no container runtime runs.

    python scripts/lanes/container_steps.py FOLDER
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "Containerfile"


def instructions() -> list[list[tuple[str, str]]]:
    """Instruction and what follows it, of each stage, in order."""
    stages: list[list[tuple[str, str]]] = []
    text = FILE.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest.strip()))
    return stages


def steps(folder: Path) -> list[str]:
    """The first stage as commands, every path of the image below `folder`."""
    commands, here = [], folder
    for name, rest in instructions()[0]:
        if name == "ARG":
            variable, _, default = rest.partition("=")
            commands.append(f'{variable}="${{{variable}:-{default.strip(chr(34))}}}"')
        elif name == "WORKDIR":
            here = folder / rest.lstrip("/")
            commands.append(f"mkdir -p {shlex.quote(str(here))} && cd {shlex.quote(str(here))}")
        elif name == "COPY":
            *sources, target = rest.split()
            paths = " ".join(shlex.quote(str(ROOT / source)) for source in sources)
            commands.append(f"cp -r {paths} {shlex.quote(target)}")
        elif name == "RUN":
            commands.append(rest.replace("/opt/", f"{shlex.quote(str(folder))}/opt/"))
        elif name != "FROM":
            raise SystemExit(f"the first stage has {name}, which this does not know")
    return commands


if __name__ == "__main__":
    print("\n".join(steps(Path(sys.argv[1]))))
