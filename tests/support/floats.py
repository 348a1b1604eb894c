"""Float-quantized matrices packed by hand, and what they mean.

Codes are decoded by a table made from the definition of each type, one number at a time; nothing here uses the
package or the casts of ml_dtypes, whose types only carry bytes into files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from support.ints import Array, Tensors
from support.packers import pack_bytes

FP8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
E8M0 = ml_dtypes.float8_e8m0fnu
EXPERTS = "model.layers.0.mlp.experts"


def e4m3(byte: int) -> float:
    """OCP 8-bit Floating Point 1.0: bias 7, no infinities, all ones is NaN."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e5m2(byte: int) -> float:
    """OCP 8-bit Floating Point 1.0: bias 15, infinities and NaNs as in IEEE 754."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 2 & 31, byte & 3
    if exponent == 31:
        return sign * math.inf if mantissa == 0 else math.nan
    return sign * (mantissa / 4 * 2.0**-14 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 15))


def e2m1(nibble: int) -> float:
    """OCP Microscaling Formats 1.0."""
    magnitude = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[nibble & 7]
    return -magnitude if nibble & 8 else magnitude


def e8m0(byte: int) -> float:
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


TABLES = {
    "e4m3": np.array([e4m3(byte) for byte in range(256)]),
    "e5m2": np.array([e5m2(byte) for byte in range(256)]),
    "e2m1": np.array([e2m1(nibble) for nibble in range(16)]),
    "e8m0": np.array([e8m0(byte) for byte in range(256)]),
}


@dataclass(frozen=True)
class Floats:
    """`W[n, k] = table[codes[n, k]] * scales[n // rows, k // columns]`.

    codes   uint8 `[N, K]`
    scales  `[ceil(N / rows), ceil(K / columns)]` as stored: floats, or uint8 exponents
    """

    element: str
    codes: Array
    scales: Array
    rows: int
    columns: int

    @property
    def N(self) -> int:
        return self.codes.shape[0]

    @property
    def K(self) -> int:
        return self.codes.shape[1]

    @property
    def values(self) -> Array:
        """float64 `[N, K]`."""
        exponents = self.scales.dtype == np.uint8
        scales = TABLES["e8m0"][self.scales] if exponents else self.scales.astype(np.float64)
        spread = scales[np.arange(self.N) // self.rows][:, np.arange(self.K) // self.columns]
        return TABLES[self.element][self.codes] * spread

    @property
    def fp8(self) -> Array:
        """The codes as they are stored."""
        return self.codes.view(FP8[self.element])

    @property
    def packed(self) -> Array:
        """uint8 `[N, K/2]`: the even column in the low nibble."""
        return pack_bytes(self.codes)

    def rows_of(self, start: int, stop: int, step: int = 1) -> Floats:
        """Some rows of a matrix whose scales do not cross rows."""
        assert self.rows == 1
        taken = slice(start, stop, step)
        return replace(self, codes=self.codes[taken], scales=self.scales[taken])


def random(
    element: str,
    N: int,
    K: int,
    rows: int,
    columns: int,
    *,
    scale: Any = ml_dtypes.bfloat16,
    seed: int = 0,
    finite: bool = True,
) -> Floats:
    """Every code, each scale another. `scale` uint8 draws exponents; `finite` keeps NaN and infinity out."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, len(TABLES[element]), (N, K)).astype(np.uint8)
    if finite:
        codes[~np.isfinite(TABLES[element][codes])] = 0
    grid = (-(-N // rows), -(-K // columns))
    if scale is np.uint8:
        scales = rng.integers(100, 140, grid).astype(np.uint8)
    else:
        scales = rng.uniform(1e-3, 1e-2, grid).astype(scale)
    return Floats(element, codes, scales, rows, columns)


def mxfp4(N: int, K: int, seed: int = 0) -> Floats:
    return random("e2m1", N, K, 1, 32, scale=np.uint8, seed=seed)


def mxfp8(N: int, K: int, seed: int = 0, element: str = "e4m3") -> Floats:
    return random(element, N, K, 1, 32, scale=np.uint8, seed=seed)


def block(N: int, K: int, seed: int = 0, **more: Any) -> Floats:
    return random("e4m3", N, K, 128, 128, seed=seed, **more)


def tensor(N: int, K: int, seed: int = 0, **more: Any) -> Floats:
    return random("e4m3", N, K, N, K, seed=seed, **more)


def channel(N: int, K: int, seed: int = 0, **more: Any) -> Floats:
    return random("e4m3", N, K, 1, K, seed=seed, **more)


def fp8_tensors(weight: Floats, scale: str = "weight_scale", shape: tuple[int, ...] | None = None) -> Tensors:
    """`weight` and its scale, reshaped to `shape` where producers differ."""
    scales = weight.scales
    return {"weight": weight.fp8, scale: scales if shape is None else scales.reshape(shape)}


def mx_tensors(weight: Floats) -> Tensors:
    """compressed-tensors' names."""
    if weight.element == "e2m1":
        return {"weight_packed": weight.packed, "weight_scale": weight.scales}
    return {"weight": weight.fp8, "weight_scale": weight.scales}


def deepseek_config(**keys: Any) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        **keys,
    }


def float_ct_config(fmt: str, strategy: str, bits: int = 8, **keys: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    weights: dict[str, Any] = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy}
    weights |= {"group_size": 32} if strategy == "group" else {}
    weights |= {"block_structure": [128, 128]} if strategy == "block" else {}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "version": "0.20.0",
        **keys,
    }


def mxfp4_ct_config(**keys: Any) -> dict[str, Any]:
    return float_ct_config("mxfp4-pack-quantized", "group", 4, **keys)


@dataclass(frozen=True)
class Nvfp4(Floats):
    """NVFP4: `scales` are e4m3, and `number` is over all.

    divides  `number` is a divisor (compressed-tensors), not a factor (ModelOpt)
    """

    number: float = 1.0
    divides: bool = True

    @property
    def values(self) -> Array:
        """float64 `[N, K]`."""
        scales = TABLES["e4m3"][self.scales.view(np.uint8)]
        number = np.float64(np.float32(self.number))
        return TABLES["e2m1"][self.codes] * np.repeat(scales / number if self.divides else scales * number, 16, axis=1)

    @property
    def tensors(self) -> Tensors:
        """By the names of the producer."""
        number = np.array(self.number, np.float32)
        if self.divides:
            return {
                "weight_packed": self.packed,
                "weight_scale": self.scales,
                "weight_global_scale": number.reshape(1),
            }
        return {"weight": self.packed, "weight_scale": self.scales, "weight_scale_2": number}


def nvfp4(N: int, K: int, seed: int = 0, *, number: float = 2468.1357, divides: bool = True) -> Nvfp4:
    """Every code, minus zero too, and every scale that is a number, subnormal ones too."""
    rng = np.random.default_rng(seed)
    scales = rng.integers(0, 0x7F, (N, K // 16)).astype(np.uint8).view(FP8["e4m3"])
    return Nvfp4("e2m1", rng.integers(0, 16, (N, K)).astype(np.uint8), scales, 1, 16, number, divides)


NVFP4_CT_CONFIG = float_ct_config("nvfp4-pack-quantized", "tensor_group", 4)
NVFP4_MODELOPT_CONFIG = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def expert_modules(
    weights: Mapping[tuple[int, str], Floats],
    pack: Any,
    names: Mapping[str, str] | None = None,
    prefix: str = EXPERTS,
) -> dict[str, Tensors]:
    """Per-expert modules from (expert, role) → matrix."""
    spelled = names or {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return {f"{prefix}.{expert}.{spelled[role]}": pack(weight) for (expert, role), weight in weights.items()}


def expert_weights(make: Any, H: int, I: int, E: int = 2) -> dict[tuple[int, str], Floats]:
    """(expert, role) → matrix, each another. `make(N, K, seed)`."""
    shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
    return {
        (expert, role): make(*shape, seed=10 * expert + seed)
        for expert in range(E)
        for seed, (role, shape) in enumerate(shapes.items())
    }
