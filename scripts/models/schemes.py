"""What producers write for one matrix `[N, K]`, or one stack `[E, N, K]`: names, dtypes, shapes, and the config.

The tensors are those of `docs/formats.md`. Content is given where a reader looks at it: zero points, group indices,
shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Content = Callable[[], Array] | None
Tensor = tuple[str, str, tuple[int, ...], Content]
"""Suffix after the module's name (with its dot or underscore), safetensors label, shape, content."""

_GROUP = 128


@dataclass(frozen=True)
class Scheme:
    """What a scheme is called on the page, the config it comes with, and its tensors.

    stacks  what becomes of experts that the model has in one tensor; None: they are taken apart first
    """

    label: str
    config: Mapping[str, Any]
    matrix: Callable[[int, int], Iterator[Tensor]]
    stacks: Callable[[tuple[int, ...], str], Iterator[Tensor]] | None = None


def _gptq(N: int, K: int) -> Iterator[Tensor]:
    """A group of its own where 128 does not divide K, as GPTQModel has it with a short last group."""
    groups = -(-K // _GROUP)
    yield ".qweight", "I32", (K // 8, N), None
    yield ".qzeros", "I32", (groups, N // 8), lambda: np.full((groups, N // 8), 0x77777777, np.int32)
    yield ".scales", "F16", (groups, N), None
    yield ".g_idx", "I32", (K,), lambda: (np.arange(K) // _GROUP).astype(np.int32)


def _awq(N: int, K: int) -> Iterator[Tensor]:
    """Asymmetric: any words but eights."""
    yield ".qweight", "I32", (K, N // 8), None
    yield ".qzeros", "I32", (K // _GROUP, N // 8), None
    yield ".scales", "F16", (K // _GROUP, N), None


def _packed(group: int) -> Callable[[int, int], Iterator[Tensor]]:
    def tensors(N: int, K: int) -> Iterator[Tensor]:
        yield ".weight_packed", "I32", (N, K // 8), None
        yield ".weight_scale", "BF16", (N, K // group), None
        yield ".weight_shape", "I64", (2,), lambda: np.array([N, K], np.int64)

    return tensors


def _fp8_block(*shape: int) -> Iterator[Tensor]:
    *experts, N, K = shape
    yield ".weight", "F8_E4M3", shape, None
    yield ".weight_scale_inv", "F32", (*experts, -(-N // 128), -(-K // 128)), None


def _fp8_channel(N: int, K: int) -> Iterator[Tensor]:
    yield ".weight", "F8_E4M3", (N, K), None
    yield ".weight_scale", "BF16", (N, 1), None


def _fp8_tensor(N: int, K: int) -> Iterator[Tensor]:
    one = lambda: np.ones((), np.float32)  # noqa: E731
    yield ".weight", "F8_E4M3", (N, K), None
    yield ".weight_scale", "F32", (), one
    yield ".input_scale", "F32", (), one


def _mxfp4(N: int, K: int) -> Iterator[Tensor]:
    yield ".weight_packed", "U8", (N, K // 2), None
    yield ".weight_scale", "U8", (N, K // 32), None


def _mxfp8(N: int, K: int) -> Iterator[Tensor]:
    yield ".weight", "F8_E4M3", (N, K), None
    yield ".weight_scale", "U8", (N, K // 32), None


def _nvfp4(N: int, K: int) -> Iterator[Tensor]:
    yield ".weight", "U8", (N, K // 2), None
    yield ".weight_scale", "F8_E4M3", (N, K // 16), None
    yield ".weight_scale_2", "F32", (), lambda: np.ones((), np.float32)
    yield ".input_scale", "F32", (), lambda: np.ones((), np.float32)


def _int8(N: int, K: int) -> Iterator[Tensor]:
    yield ".weight", "I8", (N, K), None
    yield ".weight_scale", "BF16", (N, 1), None


def _gpt_oss(shape: tuple[int, ...], part: str) -> Iterator[Tensor]:
    """`[E, K, N]` of the unquantized model as blocks of 32 columns of `[E, N, K]`."""
    E, K, N = shape
    yield "_blocks", "U8", (E, N, K // 32, 16), None
    yield "_scales", "U8", (E, N, K // 32), None


def _none(N: int, K: int) -> Iterator[Tensor]:
    yield ".weight", "BF16", (N, K), None


def _ct(fmt: str, activations: Mapping[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "format": fmt, "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "version": "0.14.0",
    }


def _int4(group: int) -> Scheme:
    config = _ct("pack-quantized", num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    return Scheme(f"compressed-tensors int4 g{group}", config, _packed(group))


_DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
_DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}

SCHEMES: Mapping[str, Scheme] = {
    "gptq int4": Scheme(
        "GPTQ int4 g128",
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
        | {"checkpoint_format": "gptq"},
        _gptq,
    ),
    "awq int4": Scheme(
        "AWQ int4 g128, asymmetric",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        _awq,
    ),
    "int4 group 32": _int4(32),
    "int4 group 128": _int4(128),
    "fp8 block": Scheme(
        "FP8, 128x128 blocks",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        _fp8_block,
        lambda shape, part: _fp8_block(*shape),
    ),
    "fp8 channel": Scheme(
        "compressed-tensors FP8, per channel",
        _ct("float-quantized", _DYNAMIC, num_bits=8, type="float", symmetric=True, strategy="channel"),
        _fp8_channel,
    ),
    "fp8 tensor": Scheme(
        "ModelOpt FP8, per tensor",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        _fp8_tensor,
    ),
    "mxfp4": Scheme(
        "compressed-tensors MXFP4",
        _ct("mxfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="group", group_size=32),
        _mxfp4,
    ),
    "mxfp8": Scheme(
        "compressed-tensors MXFP8",
        _ct("mxfp8-quantized", num_bits=8, type="float", symmetric=True, strategy="group", group_size=32),
        _mxfp8,
    ),
    "gpt-oss mxfp4": Scheme("MXFP4, as published", {"quant_method": "mxfp4"}, _none, _gpt_oss),
    "nvfp4": Scheme("ModelOpt NVFP4", {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, _nvfp4),
    "int8 w8a8": Scheme(
        "compressed-tensors INT8 W8A8",
        _ct("int-quantized", _DYNAMIC_INT8, num_bits=8, type="int", symmetric=True, strategy="channel"),
        _int8,
    ),
}
