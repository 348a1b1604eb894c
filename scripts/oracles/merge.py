"""Joins what the oracles wrote into tests/fixtures/oracles.json.

    python merge.py ORACLES_JSON GPTQMODEL AUTOROUND COMPRESSED_TENSORS TRANSFORMERS

Each module's entry comes from its producer's library; the others that decode the file the same are
named in `also`. Checkpoints that are not on this machine keep the entries they have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ORACLES = ("gptqmodel", "auto-round", "compressed-tensors", "transformers")
# Which library's word counts, by what the checkpoint's name says about its producer.
TRUST = {
    "autoround": ("auto-round", "compressed-tensors", "transformers"),
    "llmcompressor": ("compressed-tensors",),
    "compressed-tensors": ("compressed-tensors",),
    "": ("gptqmodel", "transformers"),
}
NOTE = (
    "auto-round adds 1 to each unpacked zero-point field, which loses true zero points of 0; "
    "gptqmodel reverses the subtraction as it was done, and its values are given"
)


def choose(checkpoint: str, answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One module's entry."""
    producer = next(name for name in TRUST if name in checkpoint)
    best = next(name for name in TRUST[producer] if name in answers)
    digests = {name: (e["values_sha256"], e.get("ints_sha256")) for name, e in answers.items()}
    note = None
    if {"gptqmodel", "auto-round"} <= answers.keys() and digests["gptqmodel"] != digests["auto-round"]:
        best, note = "gptqmodel", NOTE
    others = [name for name in answers if name != best]
    strangers = [name for name in others if digests[name] != digests[best]]
    if strangers and note is None:
        raise SystemExit(f"{checkpoint}: {best} and {', '.join(strangers)} disagree and no reason is known")
    chosen = answers[best]
    order = ("values_sha256", "ints_sha256", "scale_dtype", "shape", "oracle")
    result: dict[str, Any] = {key: chosen[key] for key in order if key in chosen}
    agreeing = [answers[name]["oracle"] for name in others if name not in strangers]
    if agreeing:
        result["also"] = agreeing
    if note:
        result["note"] = note
    return result


def main(target: Path, *sources: Path) -> None:
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for oracle, source in zip(ORACLES, sources, strict=True):
        for checkpoint, modules in json.loads(source.read_text(encoding="utf-8")).items():
            for module, entry in modules.items():
                answers.setdefault(checkpoint, {}).setdefault(module, {})[oracle] = entry
    known = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    for checkpoint, modules in answers.items():
        known[checkpoint] = {m: choose(checkpoint, entries) for m, entries in sorted(modules.items())}
    blocks = []
    for checkpoint, modules in sorted(known.items()):
        lines = ",\n".join(f"  {json.dumps(m)}: {json.dumps(entry)}" for m, entry in modules.items())
        blocks.append(f" {json.dumps(checkpoint)}: {{\n{lines}\n }}")
    target.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
    print(f"{target}: {len(known)} checkpoints, {sum(map(len, known.values()))} modules")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
