"""Continue a sentence with a model, greedily, with Transformers.

python scripts/lanes/continue_prompt.py MODEL [--expect WORD] [--prompt TEXT]
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--expect", default="")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    text = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :])
    print(f"{arguments.prompt}|{text!r}")
    if arguments.expect not in text:
        print(f"error: '{arguments.expect}' is not in it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
