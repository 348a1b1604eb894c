"""The lower bounds of pyproject.toml as exact requirements, one a line: `numpy>=2.0` as `numpy==2.0`.

python scripts/lanes/lower_bounds.py [EXTRA...]        core and these extras
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]),
    ]
    for line in dict.fromkeys(asked):
        name, bound = re.fullmatch(r"([A-Za-z0-9._-]+)[>=]=([0-9.]+)", line).groups()  # type: ignore[union-attr]
        print(f"{name}=={bound}")


main()
