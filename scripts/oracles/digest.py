"""What every oracle shares: reading a checkpoint as it lies on disk, and the digests.

An oracle is one library's own decoding of quantized weights. The `by_*` scripts each run in that
library's environment, as `by_x.py OUT ROOT ...`, and write {checkpoint: {module: entry}} as JSON;
merge.py joins them.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]
Entry = dict[str, Any]


def checkpoints(roots: list[str]) -> Iterator[tuple[str, Path]]:
    """(name, folder) of every checkpoint below the roots; the name is the path below its root."""
    for root in map(Path, roots):
        for config in sorted(root.rglob("config.json")):
            yield config.parent.relative_to(root).as_posix(), config.parent


def quantization_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config") or {}


def modules(folder: Path, *markers: str) -> Iterator[tuple[str, Tensors]]:
    """(module, its tensors by local name) for each module that has one of the marker tensors."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensors[key] = file.get_tensor(key)
    grouped: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        module, _, local = key.rpartition(".")
        grouped.setdefault(module, {})[local] = tensor
    for module, local in sorted(grouped.items()):
        if any(marker in local for marker in markers):
            yield module, local


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()  # little-endian hosts


def entry(oracle: str, values: torch.Tensor, ints: torch.Tensor | None, scale: torch.Tensor) -> Entry:
    """The digests of one module.

    values: the dequantized weight [N, K] (experts in one tensor: [E, N, K]), float32.
    ints: the same shape, codes minus zero points, as any dtype that holds them exactly; None for
    float formats. scale: the stored scales, for their dtype.
    """
    # -0.0 and 0.0 are one value: which of them a library gives depends on how it multiplies.
    values = values.float() + 0.0
    result: Entry = {
        "oracle": oracle,
        "shape": list(values.shape),
        "scale_dtype": str(scale.dtype).removeprefix("torch."),
        "values_sha256": sha256(values),
    }
    if ints is not None:
        whole = ints.to(torch.int16)
        if ints.shape != values.shape or not torch.equal(whole.to(torch.float64), ints.to(torch.float64)):
            raise SystemExit("codes minus zero points are not whole numbers of the weight's shape")
        result["ints_sha256"] = sha256(whole)
    return result


def library(*names: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in names)


def gptq_geometry(local: Tensors) -> tuple[int, int, int]:
    """(bits, K, N) of a GPTQ-packed module, from its shapes alone (N is a multiple of 32 here)."""
    N = local["scales"].shape[1]
    bits = local["qzeros"].shape[1] * 32 // N
    return bits, local["qweight"].shape[0] * 32 // bits, N


def group_size(config: dict[str, Any], K: int, groups: int) -> int:
    """The config's where it gives this many groups (the last may be short), else a per-module one."""
    g = int(config.get("group_size", -1))
    return g if g > 0 and -(-K // g) == groups else K // groups


def columns(folder: Path, module: str, K: int) -> int:
    """K without the padding that AutoRound's model-free writer puts into a down_proj's qweight."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if quantization_config(folder).get("model_free") and module.endswith("mlp.down_proj"):
        return min(K, config["intermediate_size"])
    return K


def mislabelled(config: dict[str, Any]) -> bool:
    """AutoRound before 0.16, model-free and asymmetric: labelled as true zeros, stored minus one."""
    old = str(config.get("autoround_version", "")).startswith(("0.13.", "0.14.", "0.15."))
    return old and bool(config.get("model_free")) and config.get("sym") is False


def packing(config: dict[str, Any]) -> str:
    """How `qweight` is packed: gptq_v1, gptq_v2, gptq_p or awq, as the config labels it."""
    method = str(config.get("quant_method"))
    if method == "awq":
        return "awq"
    if method == "gptq":
        label = config.get("checkpoint_format") or config.get("format") or "gptq"
        return {"gptq": "gptq_v1"}.get(label, label)
    label = str(config.get("packing_format", "auto_round:auto_gptq"))
    if "gptqmodel" in label:
        return "gptq_v2"
    if re.search(r"gptq", label):
        return "gptq_v1"
    return "awq" if "awq" in label else "gptq_v2"


def old_packing(config: dict[str, Any]) -> bool:
    """Whether a compressed-tensors file has what only old releases read: act-order, or codes padded
    to whole words where the bits do not divide 32."""
    if config.get("quant_method") != "compressed-tensors" or config["format"] != "pack-quantized":
        return False
    minor = int(config["version"].split(".")[1])
    weights = [group["weights"] for group in config["config_groups"].values()]
    return any(w.get("actorder") == "group" or (minor < 18 and 32 % w["num_bits"]) for w in weights)


def run(decode: Callable[[Path], Iterator[tuple[str, Entry]]]) -> None:
    """Decode every checkpoint under the roots on the command line."""
    out, *roots = sys.argv[1:]
    found = {}
    for name, folder in checkpoints(roots):
        entries = dict(decode(folder))
        if entries:
            found[name] = entries
            print(f"{name}: {len(entries)} modules")
    Path(out).write_text(json.dumps(found), encoding="utf-8")
