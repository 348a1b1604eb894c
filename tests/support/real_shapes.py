"""Synthetic checkpoints for the benchmarks: real tensor shapes, random codes, any number of layers.

Layers have the shapes of Llama-3.1-8B (dense) and Qwen3-30B-A3B (128 experts). The bytes are random but sound: scales
are finite, zero points and g_idx are what the producers write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from xpuquant.formats.dtypes import nbytes
from xpuquant.formats.safetensors import build_header

Array = np.ndarray[Any, Any]
Entry = tuple[str, str, tuple[int, ...], Callable[[], Array]]

GROUP = 128
SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Model:
    """How much of what: `dense` Llama-3.1-8B layers, then `moe` Qwen3-30B-A3B layers (`experts` each)."""

    dense: int = 20
    moe: int = 6
    experts: int = 128
    hidden: int = 4096
    intermediate: int = 14336
    moe_hidden: int = 2048
    moe_intermediate: int = 768
    vocab: int = 16384


def linears(model: Model) -> Iterator[tuple[str, int, int]]:
    """(name, N, K) of every quantized matrix."""
    H, I = model.hidden, model.intermediate
    for layer in range(model.dense):
        base = f"model.layers.{layer}"
        for part, N, K in (("q", H, H), ("k", H // 4, H), ("v", H // 4, H), ("o", H, H)):
            yield f"{base}.self_attn.{part}_proj", N, K
        for part, N, K in (("gate", I, H), ("up", I, H), ("down", H, I)):
            yield f"{base}.mlp.{part}_proj", N, K
    H, I = model.moe_hidden, model.moe_intermediate
    for layer in range(model.dense, model.dense + model.moe):
        for expert in range(model.experts):
            base = f"model.layers.{layer}.mlp.experts.{expert}"
            for part, N, K in (("gate", I, H), ("up", I, H), ("down", H, I)):
                yield f"{base}.{part}_proj", N, K


def random_bytes(size: int) -> Array:
    """`size` random bytes, from a pool (the files need to be incompressible, not unpredictable)."""
    pool = _pool()
    # np.resize copies the whole pool, however few bytes are wanted.
    return pool[:size].copy() if size <= pool.size else np.resize(pool, size)


@cache
def _pool() -> Array:
    return np.random.default_rng(0).integers(0, 256, 1 << 26, np.uint8)


def random_scales(dtype: str, shape: tuple[int, ...]) -> Array:
    """Finite positive scales: random mantissas, exponents near 2^-7."""
    bits = random_bytes(2 * int(np.prod(shape))).view(np.uint16)
    return (bits & np.uint16(0x00FF)) | np.uint16(0x2000 if dtype == "F16" else 0x3C00)


def entries(fmt: str, model: Model) -> Iterator[Entry]:
    """Every tensor of a checkpoint of format `fmt`: name, dtype, shape, bytes."""
    make = _FORMATS[fmt][1]
    for name, N, K in linears(model):
        for suffix, dtype, shape, data in make(N, K):
            yield f"{name}.{suffix}", dtype, shape, data
    H = model.hidden
    plain: list[tuple[str, tuple[int, ...]]] = [("model.norm.weight", (H,))]
    plain += [("model.embed_tokens.weight", (model.vocab, H)), ("lm_head.weight", (model.vocab, H))]
    for layer in range(model.dense + model.moe):
        plain += [(f"model.layers.{layer}.{part}_layernorm.weight", (H,)) for part in ("input", "post_attention")]
    for layer in range(model.dense, model.dense + model.moe):
        plain += [(f"model.layers.{layer}.mlp.gate.weight", (model.experts, model.moe_hidden))]
    for name, shape in plain:
        yield name, "BF16", shape, partial(random_bytes, 2 * int(np.prod(shape)))


def _gptq(bits: int) -> Callable[[int, int], Iterator[Entry]]:
    def make(N: int, K: int) -> Iterator[Entry]:
        zeros = {2: 0x55555555, 4: 0x77777777}
        words = (K // GROUP, N * bits // 32)
        three = np.array([0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], np.uint32)
        fill = (lambda: np.resize(three, words)) if bits == 3 else (lambda: np.full(words, zeros[bits], np.uint32))
        yield "qweight", "I32", (K * bits // 32, N), lambda: random_bytes(K * N * bits // 8)
        yield "qzeros", "I32", words, fill
        yield "scales", "F16", (K // GROUP, N), lambda: random_scales("F16", (K // GROUP, N))
        yield "g_idx", "I32", (K,), lambda: (np.arange(K) // GROUP).astype(np.int32)

    return make


def _awq(N: int, K: int) -> Iterator[Entry]:
    yield "qweight", "I32", (K, N // 8), lambda: random_bytes(K * N // 2)
    yield "qzeros", "I32", (K // GROUP, N // 8), lambda: np.full((K // GROUP, N // 8), 0x88888888, np.uint32)
    yield "scales", "F16", (K // GROUP, N), lambda: random_scales("F16", (K // GROUP, N))


def _pack_quantized(N: int, K: int) -> Iterator[Entry]:
    yield "weight_packed", "I32", (N, K // 8), lambda: random_bytes(K * N // 2)
    yield "weight_scale", "BF16", (N, K // GROUP), lambda: random_scales("BF16", (N, K // GROUP))
    yield "weight_shape", "I64", (2,), lambda: np.array([N, K], np.int64)


def _fp8_block(N: int, K: int) -> Iterator[Entry]:
    # 0x7f is NaN in e4m3; the mask keeps every code finite.
    yield "weight", "F8_E4M3", (N, K), lambda: random_bytes(N * K) & np.uint8(0xF7)
    yield (
        "weight_scale_inv",
        "BF16",
        (N // 128, K // 128),
        lambda: random_scales("BF16", (N // 128, K // 128)),
    )


def _mxfp4(N: int, K: int) -> Iterator[Entry]:
    yield "weight_packed", "U8", (N, K // 2), lambda: random_bytes(N * K // 2)
    yield (
        "weight_scale",
        "U8",
        (N, K // 32),
        lambda: random_bytes(N * K // 32) & np.uint8(0x1F) | np.uint8(0x60),
    )


def _mxfp8(N: int, K: int) -> Iterator[Entry]:
    # As in `_fp8_block`, every code is finite.
    yield "weight", "F8_E4M3", (N, K), lambda: random_bytes(N * K) & np.uint8(0xF7)
    yield (
        "weight_scale",
        "U8",
        (N, K // 32),
        lambda: random_bytes(N * K // 32) & np.uint8(0x1F) | np.uint8(0x60),
    )


def _ct_config(fmt: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "format": fmt, "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "version": "0.20.0",
    }


def _gptq_config(bits: int) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }


_AWQ_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
_FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
_FLOAT8 = {**_FLOAT4, "num_bits": 8}
_FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

_FORMATS: dict[str, tuple[dict[str, Any], Callable[[int, int], Iterator[Entry]]]] = {
    "gptq": (_gptq_config(4), _gptq(4)),
    "gptq3": (_gptq_config(3), _gptq(3)),
    "gptq2": (_gptq_config(2), _gptq(2)),
    "awq": (_AWQ_CONFIG, _awq),
    "ct": (_ct_config("pack-quantized", _INT4), _pack_quantized),
    "fp8": (_FP8_CONFIG, _fp8_block),
    "mxfp4": (_ct_config("mxfp4-pack-quantized", _FLOAT4), _mxfp4),
    "mxfp8": (_ct_config("mxfp8-quantized", _FLOAT8), _mxfp8),
}
FORMATS = tuple(_FORMATS)


def config_of(fmt: str) -> dict[str, Any]:
    """quantization_config of a checkpoint of format `fmt`."""
    return _FORMATS[fmt][0]


def write_checkpoint(folder: Path, fmt: str, model: Model, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a checkpoint; returns the bytes of its shards."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries(fmt, model):
        length = nbytes(entry[1], entry[2])
        if shards[-1] and size + length > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += length
    weight_map = {}
    total = 0
    for i, members in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        sizes = [(n, d, s, nbytes(d, s)) for n, d, s, _ in members]
        with (folder / name).open("wb") as file:
            file.write(build_header(sizes, {"format": "pt"}))
            for tensor, _, _, data in members:
                array = np.ascontiguousarray(data())
                file.write(array.data.cast("B"))
                total += array.nbytes
                weight_map[tensor] = name
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": model.hidden,
        "quantization_config": config_of(fmt),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total
