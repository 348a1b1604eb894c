"""Families' models made, converted and loaded in Transformers, one after the other. A program of its own.

    cells.py WORK FAMILY...     WORK/FAMILY has the folders `source`, `plain` and `converted`, and cells.json

An outcome is `same`, `refused` (in one line that says why), `differs`, `fails` (an exception, which nobody meant), or
`not run` where the unquantized twin does not run either.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]
warnings.filterwarnings("ignore")

TOLERANCE = 1e-4
"""Largest difference of a logit, float32, that is called the same: of values of about 5."""


def convert(name: str, folder: Path, experts: bool) -> dict[str, Any]:
    """The plan's cell: what the conversion says, and what was quantized."""
    from support.families.catalogue import FAMILIES
    from support.families.models import write

    import xpuquant
    from xpuquant.errors import XpuquantError

    family = next(one for one in FAMILIES if one.name == name)
    twins = write(folder, family, experts)
    config = json.loads((twins.source / "config.json").read_text())
    told: dict[str, Any] = {
        "architecture": config["architectures"][0],
        "model_type": (config.get("text_config") or config)["model_type"],
        "quantized": sorted({part_of(module) for module in twins.quantized}),
    }
    try:
        done = xpuquant.convert(twins.source, folder / "converted")
    except XpuquantError as error:
        return {**told, "outcome": "refused", "why": str(error)}
    verdict = done.verdict
    passed = verdict is not None and verdict.passed
    stored = sorted({(module.scheme or "bf16").split()[0] for module in done.plan.modules})
    return {**told, "outcome": "converts" if passed else "fails", "stored": stored}


def part_of(module: str) -> str:
    """What kind of module a quantized one is, for a record of what was tried."""
    return "experts" if re.search(r"\.experts\.|block_sparse_moe|\.moe\.", module) else "linears"


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Transformers' cell: logits beside the twin's, with an image too, and what `save_pretrained` writes."""
    import torch
    import transformers
    from safetensors.torch import load_file
    from support.families.catalogue import FAMILIES
    from support.families.models import published_name
    from support.families.prompts import asked

    from xpuquant.errors import XpuquantError

    family = next(one for one in FAMILIES if one.name == name)
    auto = getattr(transformers, family.head)
    kinds = ["", family.image] if family.image else [""]

    @torch.no_grad()
    def answers(path: Path) -> tuple[Any, list[Any]]:
        model = auto.from_pretrained(path, dtype=torch.float32).eval()
        return model, [model(**asked(model.config, kind)).logits for kind in kinds]

    try:
        twin, wanted = answers(folder / "plain")
        with torch.no_grad():
            other = twin(**asked(twin.config, kinds[-1], seed=4)).logits
    except Exception as error:
        return {"outcome": "not run", "why": f"the twin: {_said(error)}"}
    if family.image and torch.equal(other, wanted[-1]):
        return {"outcome": "fails", "why": "the twin says the same of another image"}
    del twin
    try:
        model, found = answers(folder / "converted")
    except XpuquantError as error:
        return {"outcome": "refused", "why": str(error)}
    except Exception as error:
        return {"outcome": "fails", "why": _said(error)}
    differences = [float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)]
    told: dict[str, Any] = {
        "outcome": "same" if max(differences) <= TOLERANCE else "differs",
        "difference": differences[0],
        "of": float(wanted[0].abs().max()),
    }
    if family.image:
        told["with an image"] = differences[1]
    try:
        model.save_pretrained(folder / "saved")
        saved, stored = (load_file(folder / path / "model.safetensors") for path in ("saved", "converted"))
        saved = {published_name(family, name): tensor for name, tensor in saved.items()}
        modules = model_modules(folder)
        lost = [
            n
            for n in stored
            if n.rpartition(".")[0] in modules and not n.endswith("bias") and not same(n, stored, saved)
        ]
        _, again = answers(folder / "saved")
        equal = all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
        told["saved"] = "same" if equal and not lost else f"differs: {', '.join(lost[:3]) or 'logits'}"
    except Exception as error:
        told["saved"] = _said(error)
    return told


def model_modules(folder: Path) -> set[str]:
    """The quantized modules of a converted repo that a model has: layers for multi-token prediction are left out."""
    from xpuquant.formats.scheme import from_config

    config = json.loads((folder / "converted" / "config.json").read_text())
    return {n for n in from_config(config["quantization_config"]) if not n.startswith("mtp.") and ".layers.2." not in n}


def same(name: str, stored: Any, saved: Any) -> bool:
    """Whether a tensor came back, byte for byte."""
    import torch

    other = saved.get(name)
    if other is None or other.shape != stored[name].shape or other.dtype != stored[name].dtype:
        return False
    return torch.equal(other.view(torch.uint8), stored[name].view(torch.uint8))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> None:
    """Families in turn: their cells are files, so that whoever called knows what was done when this process dies."""
    work, *names = sys.argv[1:]
    for name in names:
        folder = Path(work) / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        cells = {}
        try:
            cells["plan"] = convert(name, folder, experts=True)
            if cells["plan"]["outcome"] == "converts":
                cells["transformers"] = compare(name, folder)
        except Exception as error:
            cells.setdefault("plan", {"outcome": "fails", "why": _said(error)})
        (folder / "cells.json").write_text(json.dumps(cells))
        print(name, json.dumps(cells), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
