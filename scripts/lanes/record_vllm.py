"""What the vLLM plugin uses of vLLM, name by name, in every supported release; and the index by which that is known.

record_vllm.py                     print the table, by the index on record; exit status 1 where something is wrong
record_vllm.py --check FOLDER      download the sources that are missing into FOLDER, compare the index with them
record_vllm.py --record FOLDER     write the index anew
record_vllm.py --releases FOLDER   like --check, but of releases beyond the supported ones too: what would break there
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

from package_index import Released, released
from support import vllm_names

from xpuquant.vllm.versions import BEYOND, OLDEST


def supported(number: tuple[int, ...]) -> bool:
    return OLDEST <= number[:2] < BEYOND


def sources_of(file: Released, folder: Path) -> Path:
    """The folder that holds the package `vllm` of a release; of its sdist only Python files are unpacked."""
    root = folder / file.name.removesuffix(".tar.gz")
    if not root.exists():
        with tarfile.open(file.fetch(folder)) as archive:
            wanted = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(".py") and "/vllm/" in m.name]
            archive.extractall(folder, wanted, filter="data")
    return root


def read(folder: Path, beyond: bool = False) -> dict[str, Any]:
    files = [file for file in released("vllm", ".tar.gz") if file.number >= OLDEST]
    return {
        file.version: vllm_names.index_of(sources_of(file, folder), file.name, file.sha256)
        for file in files
        if beyond or supported(file.number)
    }


def show(indices: dict[str, Any]) -> int:
    """The table; 1 where something is wrong."""
    wrong = 0
    used: dict[str, list[vllm_names.Use]] = {}
    for use in vllm_names.uses():
        used.setdefault(use.name, []).append(use)
    width = max(map(len, used))
    print(f"{'':{width}}  " + "  ".join(f"{version:9}" for version in indices))
    for name, uses in sorted(used.items()):
        if uses[0].overrides and all(name not in index["names"] for index in indices.values()):
            continue  # a method of ours alone
        cells, reasons = [], []
        for version, index in indices.items():
            problems = [f"{use.where}: {text}" for use in uses if (text := vllm_names.problem(use, index)) is not None]
            kind = index["names"].get(name, {}).get("kind", "-")
            cells.append(f"{'WRONG' if problems else kind:9}")
            reasons += [f"    {version}: {text}" for text in problems]
        print(f"{name:{width}}  " + "  ".join(cells).rstrip())
        print("\n".join(reasons), end="\n" if reasons else "")
        wrong += len(reasons)
    for version, index in indices.items():
        for text in vllm_names.missing_overrides(index):
            print(f"{version}: {text} is abstract, and the plugin does not define it")
            wrong += 1
        for text in vllm_names.missing_words(index):
            print(f"{version}: {text} is no word of its sources")
            wrong += 1
    for name in sorted(vllm_names.undeclared()):
        print(f"the plugin reads .{name}, which tests/support/vllm_names.py does not declare")
        wrong += 1
    return int(wrong > 0)


def main() -> int:
    mode, folder = [*sys.argv[1:], "", ""][:2]
    if mode == "--record":
        vllm_names.STORED.write_text(json.dumps(read(Path(folder)), indent=1) + "\n")
    if mode == "--releases":
        return show(read(Path(folder), beyond=True))
    indices = vllm_names.recorded()
    status = show(indices)
    if mode == "--check":
        found = read(Path(folder))
        for version in found.keys() | indices.keys():
            if found.get(version) != indices.get(version):
                print(f"{vllm_names.STORED.name} is not what the sources of {version} say: run it with --record")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
