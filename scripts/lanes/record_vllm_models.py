"""Names and loaders of vLLM's models in every supported release; and the index by which they are known.

record_vllm_models.py                     print what is on record
record_vllm_models.py --check FOLDER      download the sources that are missing into FOLDER, compare the index with them
record_vllm_models.py --record FOLDER     write the index anew
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from package_index import released
from record_vllm import sources_of, supported
from support import vllm_models


def read(folder: Path) -> dict[str, Any]:
    wanted = vllm_models.architectures()
    return {
        file.version: vllm_models.read(sources_of(file, folder), wanted)
        for file in released("vllm", ".tar.gz")
        if supported(file.number)
    }


def show(indices: dict[str, Any]) -> None:
    for architecture in sorted({name for index in indices.values() for name in index}):
        found = [index[architecture] for index in indices.values()]
        print(architecture, " | ".join(one["model"] or "none" for one in found))
        for part in ("linears", "stacks", "rearranges"):
            for name in sorted({name for one in found for name in one[part]}):
                said = [one[part].get(name) for one in found]
                print(f"    {part:10}  {name}: " + " | ".join("-" if one is None else repr(one) for one in said))


def main() -> int:
    mode, folder = [*sys.argv[1:], "", ""][:2]
    if mode == "--record":
        vllm_models.STORED.write_text(json.dumps(read(Path(folder)), indent=1) + "\n")
    indices = vllm_models.recorded()
    show(indices)
    if mode == "--check" and read(Path(folder)) != indices:
        print(f"{vllm_models.STORED.name} is not what the released sources say: run it with --record")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
