"""The dequantized twin of a real checkpoint: the unquantized model under the values that the source means.

The values are decoded by the source's reader, by the plain definition of its format; nothing is read from an output.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.sources.base import read_slice
from xpuquant.conversion.sources.open import open_source
from xpuquant.formats.weights.floats import is_upended


def write_twin(source: Path, folder: Path) -> Path:
    """The unquantized model in `folder`, float32, without a tokenizer."""
    opened = open_source(str(source))
    plan = make_plan(opened.checkpoint, Options())
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for shard in source.glob("*.safetensors"):
        passed = {tensor.name for tensor in plan.passed}
        tensors |= {name: tensor.float() for name, tensor in load_file(shard).items() if name in passed}
    stacks: dict[str, list[torch.Tensor]] = {}
    for planned in plan.modules:
        for _, _, weight in planned.weights:
            recipe = weight.decoded(0, weight.N)
            arrays = [read_slice(opened, part) for part in recipe.inputs]
            values = torch.from_numpy(recipe.build(arrays).values()).float()
            if weight.stack:
                stacks.setdefault(weight.stack, []).append(values.t() if is_upended(weight) else values)
            else:
                tensors[f"{weight.name}.weight"] = values.contiguous()
    tensors |= {name: torch.stack(experts) for name, experts in stacks.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
