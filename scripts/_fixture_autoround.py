"""Fixtures of AutoRound, and of an old generation of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

AUTOROUND: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # name: (source, scheme, format, options)
    "autoround-qwen3-w4g32": ("qwen3", "W4A16", "auto_round", {"group_size": 32}),
    "autoround-qwen3-w4g32-asym": (
        "qwen3-positive",
        "W4A16",
        "auto_round:gptqmodel",
        {"group_size": 32, "sym": False},
    ),
    "autoround-llama-w4g32-as-awq": ("llama", "W4A16", "auto_awq", {"group_size": 32}),
    "autoround-qwen3-w4g32-asym-as-awq": (
        "qwen3-positive",
        "W4A16",
        "auto_awq",
        {"group_size": 32, "sym": False},
    ),
    "autoround-qwen3moe-w4g32-as-awq": ("qwen3moe", "W4A16", "auto_awq", {"group_size": 32}),
    # Its model-free writer pads K = 96 to 128 inside qweight.
    "autoround-qwen3-w4g64-ragged": (
        "qwen3-ragged",
        "W4A16",
        "auto_round",
        {"group_size": 64, "model_free": True},
    ),
    "autoround-qwen3moe-fp8-block": ("qwen3moe128", "FP8_BLOCK", "auto_round", {}),
}


AUTOROUND_015: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # Labelled as true zeros, stored minus one.
    "autoround-0.15-qwen3-w4g32-asym-model-free": (
        "qwen3-positive-64",
        "W4A16",
        "auto_round",
        {"group_size": 32, "sym": False, "model_free": True},
    ),
    # A true zero point of 0 destroys its neighbours.
    "autoround-0.15-qwen3-w3g32-asym-v1": (
        "qwen3-positive-64",
        "W3A16",
        "auto_round:auto_gptq",
        {"group_size": 32, "sym": False},
    ),
}


def autoround(source: Path, out: Path, name: str) -> None:
    """One AutoRound fixture: plain rounding, no data."""
    from auto_round import AutoRound

    _, scheme, layout, options = (AUTOROUND | AUTOROUND_015)[name]
    rounder = AutoRound(
        str(source),
        scheme=scheme,
        iters=0,
        disable_opt_rtn=True,
        disable_model_free=not options.get("model_free", False),
        device_map="cpu",
        **options,
    )
    _, folder = rounder.quantize_and_save(str(out / "tmp"), format=layout)
    # It writes into a folder of its own choosing below the one given.
    folder = Path(folder[0] if isinstance(folder, list | tuple) else folder)
    for item in folder.iterdir():
        item.rename(out / item.name)
    shutil.rmtree(out / "tmp")
