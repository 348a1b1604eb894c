"""One step of `make-fixtures`, run inside the environment of the producer it names.

    python _make_fixtures.py sources SOURCES              tiny random bf16 models, one per architecture
    python _make_fixtures.py PRODUCER SOURCES OUT [NAME]  the producer's fixtures that OUT does not have

Every model has one layer, hidden size 128 and a vocabulary of 64, so that a fixture is about 100 kB.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _fixture_autoround import AUTOROUND, AUTOROUND_015, autoround
from _fixture_gptqmodel import GPTQMODEL, gptqmodel
from _fixture_handpacked import HANDPACKED, handpacked
from _fixture_llmcompressor import LLMCOMPRESSOR, LLMCOMPRESSOR_012, LLMCOMPRESSOR_09, llmcompressor
from _fixture_sources import sources

_PRODUCERS: dict[str, tuple[dict[str, Any], Callable[[Path, Path, str], None]]] = {
    "gptqmodel": (GPTQMODEL, gptqmodel),
    "autoround": (AUTOROUND, autoround),
    "llmcompressor": (LLMCOMPRESSOR, llmcompressor),
    "handpacked": (HANDPACKED, handpacked),
    "autoround-0.15": (AUTOROUND_015, autoround),
    "llmcompressor-0.12": (LLMCOMPRESSOR_012, llmcompressor),
    "llmcompressor-0.9": (LLMCOMPRESSOR_09, llmcompressor),
}


def main(step: str, *arguments: str) -> None:
    if step == "sources":
        sources(Path(arguments[0]))
        return
    folder, out, wanted = Path(arguments[0]), Path(arguments[1]), arguments[2:]
    fixtures, make = _PRODUCERS[step]
    for name, entry in fixtures.items():
        if (out / name).exists() or (wanted and name not in wanted):
            continue
        partial = out / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(folder / (entry if isinstance(entry, str) else entry[0]), partial, name)
        for item in partial.rglob("*"):  # umask, not the mode of a temporary file
            item.chmod(0o755 if item.is_dir() else 0o644)
        partial.rename(out / name)
        print(f"made {name}")


if __name__ == "__main__":  # AutoRound starts processes that import this file again
    main(*sys.argv[1:])
