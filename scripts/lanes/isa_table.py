"""What each kernel backend makes of each scheme under an instruction set, as rows of docs/kernels.md.

python scripts/lanes/isa_table.py avx512_bf16|avx512|avx2|sse41

The caps are set by scripts/lanes/isa. Fails where a library does not keep to its cap.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import support.layers as hand
import torch
from numba.core.registry import cpu_target

from xpuquant.kernels import backends
from xpuquant.kernels.onednn.backend import OneDNN

# Instruction set → PyTorch's word for it, a feature that numba must not use, and what oneDNN's choices may name.
CAPS = {
    "avx512_bf16": ("AVX512", "+avx512fp16", ("avx512_core_bf16", "avx512_core", "avx2", "avx", "sse41")),
    "avx512": ("AVX512", "+avx512bf16", ("avx512_core", "avx2", "avx", "sse41")),
    "avx2": ("AVX2", "+avx512f", ("avx2", "avx", "sse41")),
    "sse41": ("DEFAULT", "+avx", ("sse41",)),
}
GROUPS = {
    "int4 linear, symmetric": ("int4", "int4 bias", "int4 channel", "int4 act-order"),
    "int4 linear, asymmetric": ("int4 asym", "int4 asym act-order bias"),
    "int4 experts": ("int4 expert", "int4 expert bias"),
    "FP8 linear and experts": tuple(case for case in hand.CASES if case.startswith("fp8")),
    "MXFP8 linear and experts": ("mxfp8", "mxfp8 expert"),
    "MXFP4 linear and experts": ("mxfp4", "mxfp4 expert"),
}
SHOWN = ("onednn", "torch_native", "ark")


def largest(name: str, cases: tuple[str, ...], dtype: str) -> str:
    """The largest relative error over the layers of `cases` at M = 1, 2, 8, 64; "-" where all of them are refused."""
    kernel, found, refused, codes = backends()[name], [], 0, set()
    for layer, weight in itertools.chain.from_iterable(map(hand.layers, cases)):
        if kernel.refuses(layer.scheme, layer.N, layer.K, dtype) is not None:
            refused += 1
            continue
        for M in (1, 2, 8, 64):
            x = hand.activations(M, layer.K, dtype)
            found.append(hand.error(kernel.linear(layer, x), hand.expected(weight, x, layer)))
        if isinstance(kernel, OneDNN):
            codes.add(kernel.implementation(layer.scheme, layer.N, layer.K, dtype))
    if not found:
        return "-"
    return " ".join(
        [f"{max(found):.1e}", *(f"`{code}`" for code in sorted(codes)), *(["(some refused)"] * bool(refused))]
    )


def implementations() -> set[str]:
    """oneDNN's names of the code it chose, over every scheme and dtype that it takes."""
    kernel = OneDNN()
    asked = itertools.product(itertools.chain.from_iterable(map(hand.layers, hand.CASES)), hand.DTYPES)
    taken = ((layer.scheme, layer.N, layer.K, dtype) for (layer, _), dtype in asked)
    return {kernel.implementation(*one) for one in taken if kernel.refuses(*one) is None}


def main() -> None:
    capability, absent, allowed = CAPS[sys.argv[1]]
    found = torch.backends.cpu.get_cpu_capability()
    assert found == capability, f"PyTorch runs {found}, not {capability}"
    _, processor, features = cpu_target.target_context.codegen().magic_tuple()
    assert absent not in features.split(","), f"numba compiles for {processor} with {absent}"
    names = implementations()
    for name in names:
        isa = name.partition(":")[2]
        assert isa in (*allowed, "any"), f"oneDNN chose {name}"
    print(f"PyTorch {found}; numba {processor}; oneDNN {', '.join(sorted(names)) or 'nothing'}")
    for title, cases in GROUPS.items():
        for dtype in hand.DTYPES:
            print(f"| {title} | {dtype} | " + " | ".join(largest(name, cases, dtype) for name in SHOWN) + " |")


main()
