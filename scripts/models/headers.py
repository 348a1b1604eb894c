"""A published checkpoint without its weights: config, index and shards whose headers are true and whose data are holes.

Names and shapes are those that Transformers would save: the model is made on the meta device and its names are turned
back to the published ones. Holes take no disk; what readers look at (zero points, group indices, shapes) is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from models.catalogue import Model, Published
from models.schemes import SCHEMES, Content, Scheme

SHARD_BYTES = 5_000_000_000
_NEVER = re.compile(
    r".*(embed|wte|router|conv|norm|visual|vision|projector|patch|pos_emb|sinks|bias)"
    r"|(.*\.)?(lm_head|gate|shared_expert_gate|A_log|D|weight)$"
)
"""Modules that no producer quantizes, by a part of their name or the whole of its last."""
_LABELS = {"torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float16": "F16", "torch.int64": "I64"}
Entry = tuple[str, str, tuple[int, ...], Content]


def shapes(model: Model) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """(config.json, tensor → dtype and shape) of the unquantized model as it is published."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    kind = getattr(transformers, model.config)
    config = kind(**model.values, **({"text_config": dict(model.text)} if model.text else {}))
    with torch.device("meta"):
        made = getattr(transformers, model.head).from_config(config, dtype=torch.bfloat16)
    tied = set(getattr(made, "all_tied_weights_keys", ()) or ())
    held = {name: tensor for name, tensor in made.state_dict().items() if name not in tied}
    published = revert_weight_conversion(made, held)
    said = json.loads(config.to_json_string(use_diff=False))
    return said, {name: (_LABELS[str(t.dtype)], tuple(t.shape)) for name, t in published.items()}


def entries(published: Published, names: dict[str, tuple[str, tuple[int, ...]]]) -> Iterator[Entry]:
    """Every tensor of the quantized checkpoint."""
    scheme = SCHEMES[published.scheme]
    for name, (dtype, shape) in apart(names, scheme).items():
        module = name.removesuffix(".weight")
        parts = list(_quantized(scheme, published, module, shape))
        if not parts:
            yield name, dtype, shape, None
        for suffix, label, size, content in parts:
            yield f"{module}{suffix}", label, size, content


def apart(names: dict[str, Any], scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors with fused experts `[E, K, N]` (Llama-4) one by one, as producers of other schemes have them."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in names.items():
        stack, _, part = name.rpartition(".")
        if scheme.stacks is not None or len(shape) != 3 or part not in ("gate_up_proj", "down_proj"):
            found[name] = dtype, shape
            continue
        E, K, N = shape
        roles = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        for expert in range(E):
            found |= {f"{stack}.{expert}.{role}.weight": (dtype, (N // len(roles), K)) for role in roles}
    return found


def _quantized(scheme: Scheme, published: Published, module: str, shape: tuple[int, ...]) -> Iterator[Any]:
    if len(shape) not in (2, 3) or _NEVER.match(module) or re.fullmatch(published.skipped, module):
        return
    if published.only and not re.fullmatch(published.only, module):
        return
    if len(shape) == 3:
        if scheme.stacks is not None:
            yield from scheme.stacks(shape, module.rpartition(".")[2])
    else:
        yield from scheme.matrix(*shape)


def write(folder: Path, published: Published, limit: int = 0) -> int:
    """Write a checkpoint; returns the bytes of its tensors. `limit`: only tensors of the first `limit` layers."""
    from xpuquant.formats.dtypes import nbytes
    from xpuquant.formats.safetensors import build_header

    config, names = shapes(published.model)
    if limit:
        names = {n: v for n, v in names.items() if int((re.search(r"layers\.(\d+)\.", n) or [0, 0])[1]) < limit}
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[Entry]] = [[]]
    filled = total = 0
    for entry in entries(published, names):
        size = nbytes(entry[1], entry[2])
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
        total += size
    weight_map = {}
    for i, members in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        header = build_header([(n, d, s, nbytes(d, s)) for n, d, s, _ in members], {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            at = len(header)
            for tensor, dtype, shape, content in members:
                if content is not None:
                    os.pwrite(file.fileno(), np.ascontiguousarray(content()).tobytes(), at)
                at += nbytes(dtype, shape)
                weight_map[tensor] = name
            os.ftruncate(file.fileno(), at)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    config["quantization_config"] = dict(SCHEMES[published.scheme].config)
    (folder / "config.json").write_text(json.dumps(config))
    return total
