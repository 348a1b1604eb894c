"""Joins what the oracles wrote into tests/fixtures/oracles.json.

    python merge.py ORACLES_JSON GPTQMODEL AUTOROUND COMPRESSED_TENSORS COMPRESSED_TENSORS_013 TRANSFORMERS

Each module's entry comes from its producer's library; the others that decode the file the same are
named in `also`. Checkpoints that are not on this machine keep the entries they have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ORACLES = ("gptqmodel", "auto-round", "compressed-tensors", "compressed-tensors-0.13", "transformers")
# Which library's word counts, by what the checkpoint's name says about its producer.
TRUST = {
    "autoround": ("auto-round", "compressed-tensors", "transformers"),
    "llmcompressor": ("compressed-tensors", "compressed-tensors-0.13"),
    "compressed-tensors": ("compressed-tensors", "compressed-tensors-0.13"),
    "": ("gptqmodel", "transformers"),
}
ZERO = (
    "auto-round adds 1 to each unpacked zero-point field, which loses true zero points of 0; "
    "gptqmodel reverses the subtraction as it was done, and its values are given"
)
LABEL = (
    "labelled as true zero points but stored minus one; auto-round believes the label, "
    "gptqmodel's reading as v1 zeros is given: it is the one near the source weights"
)
# No reading is right: zero points of 0 overwrote their neighbours.
CORRUPT = {"autoround-0.15-qwen3-w3g32-asym-v1"}


def choose(checkpoint: str, answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One module's entry."""
    producer = next(name for name in TRUST if name in checkpoint)
    best = next(name for name in TRUST[producer] if name in answers)
    digests = {name: (e["values_sha256"], e.get("ints_sha256")) for name, e in answers.items()}
    note = answers[best].get("note")
    if {"gptqmodel", "auto-round"} <= answers.keys() and digests["gptqmodel"] != digests["auto-round"]:
        best, note = "gptqmodel", LABEL if "model-free" in checkpoint else ZERO
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
    for checkpoint in answers.keys() - CORRUPT:
        modules = answers[checkpoint]
        known[checkpoint] = {m: choose(checkpoint, entries) for m, entries in sorted(modules.items())}
    blocks = []
    for checkpoint, modules in sorted(known.items()):
        lines = ",\n".join(f"  {json.dumps(m)}: {json.dumps(entry)}" for m, entry in modules.items())
        blocks.append(f" {json.dumps(checkpoint)}: {{\n{lines}\n }}")
    target.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
    print(f"{target}: {len(known)} checkpoints, {sum(map(len, known.values()))} modules")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
