"""Load a converted repo with Transformers, run it, and compare with the source's exact weights.

python scripts/lanes/compare_logits.py SOURCE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.sources.base import read_slice
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.verify.exactness import decoded_blocks
from xpuquant.formats.checkpoint import whole


def dequantized_source(folder: str, family: type) -> torch.nn.Module:
    """The source as an unquantized float32 model: every matrix decoded by the reader, the rest as stored."""
    source = open_source(folder)
    plan = make_plan(source.checkpoint, Options())
    plain = {tensor.name: read_slice(source, whole(tensor)) for tensor in plan.passed}
    state = {name: torch.tensor(array.astype(np.float32)) for name, array in plain.items()}
    for module in plan.modules:
        for _, _, weight in module.weights:
            blocks = [decoded.values() for _, _, decoded in decoded_blocks(weight, source)]
            state[f"{weight.name}.weight"] = torch.tensor(np.concatenate(blocks), dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = None
    del config.quantization_config
    return family.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def main() -> int:
    source, out = sys.argv[1:3]
    converted = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    print(f"loaded {Path(out).name}: {type(converted).__name__}, parameters stay in the stored layout:")
    for name, parameter in list(converted.named_parameters()) + list(converted.named_buffers()):
        if "layers.0." in name and parameter.dtype in (torch.int32, torch.uint8, torch.int8):
            print(f"  {name:55} {str(parameter.dtype).removeprefix('torch.'):6} {list(parameter.shape)}")
    prompt = torch.tensor([[1, 5, 9, 2, 14]])
    with torch.inference_mode():
        ours = converted(prompt).logits
        truth = dequantized_source(source, type(converted))(prompt).logits
        tokens = converted.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    error = ((ours - truth).norm() / truth.norm()).item()
    print(f"greedy continuation of {prompt[0].tolist()}: {tokens[prompt.shape[1] :]}")
    print(f"logits against the source's exact weights in float32: relative difference {error:.1e}")
    return 0 if error < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
