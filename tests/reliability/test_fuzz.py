"""Spoiled checkpoints: a verified exact output or a clean refusal, no third outcome. A few hundred of the cases that
scripts/lanes/trust plays by the ten thousand, and what it has found so far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command, play
from support.fuzz.deal import cases
from support.fuzz.folder import Folder, load
from support.fuzz.mutations import resize
from support.fuzz.tally import count

pytest_plugins = "support.fuzz.fixtures"

VERDICTS = {
    0: "verified exact output",
    2: "refused (exit 2)",
    3: "damaged (exit 3)",
    4: "environment (exit 4)",
}
CASES = cases("XPUQUANT_TRUST_CASES", 160, least_blocks=4)


@pytest.mark.parametrize("block", range(CASES.blocks))
def test_no_third_outcome(block: int, room: Path) -> None:
    codes: dict[int, int] = {}
    for seed in CASES.of(block):
        outcome = play(seed, room / str(seed))
        assert outcome.problem is None, f"case {seed}, {outcome.name}, {outcome.edits}: {outcome.problem}"
        codes[outcome.code] = codes.get(outcome.code, 0) + 1
        count(f"fuzz: {VERDICTS[outcome.code]}")
        count(
            "fuzz: stopped by the reader's guard",
            "or what is said of it cannot be" in outcome.message,
        )
    # The mutations are neither all harmless nor all fatal, or they would show nothing.
    assert codes.get(0, 0) and codes.get(3, 0), codes


Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
EXPERT = "model.layers.0.mlp.experts"


def all_one_group(group: int) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        dtype, shape, data = folder.tensors[f"{DOWN}.g_idx"]
        folder.tensors[f"{DOWN}.g_idx"] = (dtype, shape, group.to_bytes(4, "little") * (len(data) // 4))

    return change


def four_bit_vector(folder: Folder) -> None:
    folder.tensors["x.bias"] = ("F4", (128,), bytes(range(64)))
    folder.tensors["y.bias"] = ("F4", (3, 6), bytes(range(9)))
    folder.tensors["z.bias"] = ("F6_E2M3", (5, 8), bytes(range(30)))


def scales_of_two_dtypes(folder: Folder) -> None:
    name = f"{EXPERT}.2.up_proj.scales"
    _, shape, data = folder.tensors[name]
    folder.tensors[name] = ("BF16", shape, data)


def biases(dtype: str, extra: tuple[int, ...] = (), data: bytes = b"") -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        for name, (_, shape, _) in list(folder.tensors.items()):
            if ".experts." in name and name.endswith(".weight_packed"):
                bits = {"I32": 32, "BF16": 16, "F8_E8M0": 8}[dtype]
                full = (*extra, shape[0])
                size = shape[0] * bits // 8 * (extra[0] if extra else 1)
                folder.tensors[name.replace("weight_packed", "bias")] = (dtype, full, resize(data, size))

    return change


def fill(name: str, byte: int) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        dtype, shape, data = folder.tensors[name]
        folder.tensors[name] = (dtype, shape, bytes([byte]) * len(data))

    return change


def retype(name: str, dtype: str, shape: tuple[int, ...], size: int) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.tensors[name] = (dtype, shape, resize(folder.tensors[name][2], size))

    return change


def block_size(value: object) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        folder.config["quantization_config"]["weight_block_size"] = value

    return change


FOUND: dict[str, tuple[str, Callable[[Folder], None], int]] = {
    "a g_idx that names one of several groups": ("gptqmodel-qwen3-w4g32-actorder", all_one_group(1), 0),
    "a g_idx of zeros, which loaders take for none": ("gptqmodel-qwen3-w4g32-actorder", all_one_group(0), 3),
    "vectors of 4- and 6-bit elements": ("gptqmodel-qwen3-w4g32", four_bit_vector, 0),
    "experts with scales of two dtypes": ("gptqmodel-qwen3moe-w4g32", scales_of_two_dtypes, 0),
    "experts with exponents and numbers for scales": (
        "autoround-qwen3moe-fp8-block",
        retype(f"{EXPERT}.1.gate_proj.weight_scale_inv", "F8_E8M0", (1, 1), 1),
        0,
    ),
    "integers for biases": ("llmcompressor-qwen3moe-w4a16", biases("I32", data=b"\1\2\3\4"), 3),
    "exponents for biases": ("llmcompressor-qwen3moe-w4a16", biases("F8_E8M0", data=b"\x7f"), 3),
    "matrices for biases": ("llmcompressor-qwen3moe-w4a16", biases("BF16", (3,), b"\0\1"), 3),
    "biases of two dtypes": (
        "handpacked-gptoss-mxfp4",
        retype("model.layers.0.mlp.experts.gate_up_proj_bias", "F16", (2, 128), 512),
        3,
    ),
    "biases that are not numbers": ("llmcompressor-qwen3moe-w4a16", biases("BF16", data=b"\xff\xff"), 0),
    "biases that hide the weight": ("llmcompressor-qwen3moe-w4a16", biases("BF16", data=b"\0\x7e"), 0),
    "scales that are not numbers": ("gptqmodel-qwen3-w4g32", fill(f"{Q}.scales", 0xFF), 0),
    "scales beyond float32's sums": ("llmcompressor-llama-w4a16", fill(f"{Q}.weight_scale", 0x7F), 0),
    "exponents of 2^127": ("llmcompressor-llama-mxfp4", fill(f"{Q}.weight_scale", 0xFE), 0),
    "a packed weight without a shape": ("llmcompressor-llama-mxfp4", retype(f"{Q}.weight_packed", "U8", (), 1), 3),
    "a complex weight_shape": ("llmcompressor-llama-w4a16", retype(f"{Q}.weight_shape", "C64", (2,), 16), 3),
    "a million values in weight_shape": (
        "llmcompressor-llama-w4a16",
        retype(f"{Q}.weight_shape", "I64", (1000, 1000), 8_000_000),
        3,
    ),
    "a block of lists": ("autoround-qwen3moe-fp8-block", block_size([128, [[]]]), 2),
    "a block of text": ("autoround-qwen3moe-fp8-block", block_size([128, "tensor"]), 2),
}


@pytest.mark.parametrize("case", FOUND)
def test_found_before(case: str, tmp_path: Path) -> None:
    name, change, wanted = FOUND[case]
    folder = load(FIXTURES / name)
    change(folder)
    folder.write(tmp_path / "source")
    code, _, error = command("convert", str(tmp_path / "source"), str(tmp_path / "out"), "--json")
    assert code == wanted, error
    assert error.count("\n") == (code != 0) and "internal error" not in error
    if code == 0:
        assert command("verify", str(tmp_path / "out"), "--source", str(tmp_path / "source"))[0] == 0
