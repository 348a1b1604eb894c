"""Checkpoints of a few matrices, packed by hand, and their way through plan and execution.

The packers here work on Python integers, one code at a time, from the formats' definitions: they share nothing with
the package, so that a test compares with what was meant and not with what was read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from support.packers import pack_words
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.repo.converted import Repo
from xpuquant.conversion.repo.staging import Staging
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.verify.context import Check, Origin
from xpuquant.conversion.verify.exactness import check_exact
from xpuquant.conversion.write.execute import execute_plan
from xpuquant.errors import UnsupportedError
from xpuquant.formats.checkpoint import whole

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

DOWN = "model.layers.0.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Ints:
    """What a packed matrix means: `W[n, k] = scales[g, n] * (codes[n, k] - zeros[g, n])`, g = groups[k].

    codes, zeros  unsigned, below 2^bits; zeros `[G, N]`
    """

    bits: int
    codes: Array
    zeros: Array
    scales: Array
    groups: Array

    @property
    def values(self) -> Array:
        """float64 `[N, K]`."""
        shifted = self.codes.astype(np.int64) - self.zeros.astype(np.int64)[self.groups].T
        return shifted * self.scales.astype(np.float64)[self.groups].T

    @property
    def N(self) -> int:
        return self.codes.shape[0]

    @property
    def K(self) -> int:
        return self.codes.shape[1]


def ints(
    bits: int = 4,
    N: int = 16,
    K: int = 64,
    group: int = 32,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: Any = np.float16,
    seed: int = 0,
) -> Ints:
    """A random matrix: every code and (asymmetric) every zero point occurs, scales of both signs."""
    rng = np.random.default_rng(seed)
    G, top = -(-K // group), 1 << bits
    zeros = np.full((G, N), top // 2, np.uint8) if symmetric else rng.integers(0, top, (G, N), np.uint8)
    if not symmetric:
        zeros.reshape(-1)[0] = 0
    groups = np.arange(K) // group
    scales = (rng.uniform(0.01, 1, (G, N)) * rng.choice([-1, 1], (G, N))).astype(dtype)
    codes = rng.integers(0, top, (N, K), np.uint8)
    return Ints(bits, codes, zeros, scales, rng.permutation(groups) if act_order else groups)


def stream(values: list[int], bits: int, word_bits: int | None = None) -> list[int]:
    """32-bit words of a little-endian bit stream; with `word_bits`, words hold that many whole codes' bits only."""
    if word_bits is None:
        number = sum(int(value) << (bits * i) for i, value in enumerate(values))
        return [number >> (32 * w) & 0xFFFFFFFF for w in range(-(-len(values) * bits // 32))]
    per_word = word_bits // bits
    return [
        sum(int(value) << (bits * i) for i, value in enumerate(values[at : at + per_word]))
        for at in range(0, len(values), per_word)
    ]


def planar_stream(values: list[int], bits: int) -> list[int]:
    """32-bit words of GPTQModel's planar packing: each 32 values as bit planes, low plane first."""
    packed: list[int] = []
    for at in range(0, len(values), 32):
        low = 0
        for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]:
            packed += stream([int(value) >> low & ((1 << width) - 1) for value in values[at : at + 32]], width)
            low += width
    return packed


def words(rows: list[list[int]]) -> Array:
    """int32 from rows of unsigned words."""
    return np.array(rows, np.uint32).view(np.int32)


def gptq(weight: Ints, *, v1: bool = True, g_idx: bool = True, planar: bool = False) -> Tensors:
    """GPTQ tensors as GPTQModel writes them: v1 subtracts one from whole words (3-bit: from each field)."""
    b, top = weight.bits, 1 << weight.bits
    if planar:
        packed, columns = ([planar_stream(list(run), b) for run in runs] for runs in (weight.zeros, weight.codes))
        tensors = {"qweight": words(columns).T.copy(), "qzeros": words(packed), "scales": weight.scales}
        return tensors | {"g_idx": weight.groups.astype(np.int32)}
    columns = [stream(list(column), b) for column in weight.codes]
    zeros = weight.zeros.astype(int)
    if v1 and 32 % b:
        zeros = (zeros - 1) % top
    packed = [stream(list(row), b) for row in zeros]
    if v1 and 32 % b == 0:
        ones = sum(1 << at for at in range(0, 32, b))
        packed = [[(word - ones) % (1 << 32) for word in row] for row in packed]
    tensors = {"qweight": words(columns).T.copy(), "qzeros": words(packed), "scales": weight.scales}
    return tensors | ({"g_idx": weight.groups.astype(np.int32)} if g_idx else {})


def awq(weight: Ints) -> Tensors:
    """AWQ `gemm` tensors."""

    def packed(rows: Array) -> Array:
        return pack_words(rows.reshape(len(rows), -1, 8)[..., AWQ_ORDER].reshape(rows.shape))

    return {"qweight": packed(weight.codes.T), "qzeros": packed(weight.zeros), "scales": weight.scales}


def pack_quantized(weight: Ints, *, padded: bool = False, zeros: str = "packed", shape: bool = True) -> Tensors:
    """compressed-tensors `pack-quantized`. `zeros`: `packed`, `int8` (before 0.9.4) or `none`."""
    b = weight.bits
    width = 32 // b * b if padded else None
    tensors: Tensors = {
        "weight_packed": words([stream(list(row), b, width) for row in weight.codes]),
        "weight_scale": weight.scales.T.copy(),
    }
    if shape:
        tensors["weight_shape"] = np.array([weight.N, weight.K], np.int64)
    if zeros == "packed":
        tensors["weight_zero_point"] = words([stream(list(row), b, width) for row in weight.zeros]).T.copy()
    elif zeros == "int8":
        tensors["weight_zero_point"] = (weight.zeros.T.astype(np.int16) - (1 << (b - 1))).astype(np.int8)
    if not np.array_equal(weight.groups, np.sort(weight.groups)):
        tensors["weight_g_idx"] = weight.groups.astype(np.int32)
    return tensors


def unpacked(weight: Ints, *, zeros: bool = False) -> Tensors:
    """compressed-tensors `int-quantized`: signed codes as bytes."""
    middle = 1 << (weight.bits - 1)
    tensors: Tensors = {
        "weight": (weight.codes.astype(np.int16) - middle).astype(np.int8),
        "weight_scale": weight.scales.T.copy(),
    }
    if zeros:
        tensors["weight_zero_point"] = (weight.zeros.T.astype(np.int16) - middle).astype(np.int8)
    return tensors


def gptq_config(**keys: Any) -> dict[str, Any]:
    """As GPTQModel writes it, v1."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["gptqmodel:7.3.4"]},
        **keys,
    }


def awq_config(**keys: Any) -> dict[str, Any]:
    """As AutoAWQ writes it."""
    return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True, **keys}


def ct_config(bits: int = 4, group: int | None = 32, *, symmetric: bool = True, **keys: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "group_size": group,
        "strategy": "group" if group else "channel",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        **keys,
    }


@dataclass(frozen=True)
class Pico:
    """A checkpoint in the making: module → tensors by suffix, and plain tensors."""

    quantization: Mapping[str, Any]
    modules: Mapping[str, Tensors] = field(default_factory=dict)
    plain: Tensors = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def having(self, **modules: Tensors) -> Pico:
        """With more modules; `__` in a name is a dot."""
        named = {name.replace("__", "."): tensors for name, tensors in modules.items()}
        return replace(self, modules={**self.modules, **named})

    def write(self, folder: Path) -> Source:
        """Save it, and open it as a source."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}.{suffix}": np.ascontiguousarray(array)
            for name, parts in self.modules.items()
            for suffix, array in parts.items()
        }
        save_file(tensors | self.plain, folder / "model.safetensors", {"format": "pt"})
        config = {"model_type": "llama", **self.config, "quantization_config": dict(self.quantization)}
        (folder / "config.json").write_text(json.dumps(config))
        return open_source(str(folder))


@dataclass(frozen=True)
class Converted:
    """A finished conversion, every module of which was found to decode to its source."""

    plan: Plan
    repo: Repo

    def values(self, module: str, role: str = "linear", expert: int | None = None) -> Array:
        """float64 `[N, K]`: what the output means, in the source's column order."""
        stored = self.repo.modules[module]
        layout = self.repo.layout(stored)
        matrix = next(m for m in layout.matrices(stored) if (m.role, m.expert) == (role, expert))
        return layout.decode(stored, matrix, 0, matrix.N).values()

    def array(self, name: str) -> Array:
        """A tensor of the output."""
        return self.repo.reader.read(whole(self.repo.tensors[name]))

    def facts(self, module: str) -> str:
        """Everything that was decided about a module."""
        return "; ".join(next(m.conversion.facts for m in self.plan.modules if m.conversion.name == module))


def convert(source: Source, out: Path, **options: Any) -> Converted:
    """Plan, execute and compare with the source, without the command line's paperwork."""
    plan = make_plan(source.checkpoint, Options(**options))
    with Staging(out) as staging:
        execute_plan(plan, source, staging, 2, {}, lambda nbytes: None)
    repo = Repo(staging.files, tuple(shard.name for shard in plan.shards), plan.quantization_config("tests"))
    verdicts, _ = check_exact(Origin(plan, source), Check(repo, jobs=2))
    for checked in verdicts:
        assert checked.error is None, f"{checked.name}: {checked.error}"
    return Converted(plan, repo)


def refusal(folder: Path, checkpoint: Pico, error: type[Exception] = UnsupportedError) -> str:
    """The one line with which planning a checkpoint fails."""
    source = checkpoint.write(folder)
    with pytest.raises(error) as raised:
        make_plan(source.checkpoint, Options())
    assert "\n" not in str(raised.value)
    return str(raised.value)


def gptq_checkpoint(
    weight: Ints,
    tensors: Tensors | None = None,
    name: str = DOWN,
    plain: Tensors | None = None,
    config: Mapping[str, Any] | None = None,
    **quantization: Any,
) -> Pico:
    """One GPTQ module; the config says what is true of it unless told otherwise."""
    symmetric = bool((weight.zeros == 1 << (weight.bits - 1)).all())
    said = gptq_config(**{"bits": weight.bits, "sym": symmetric, **quantization})
    return Pico(said, {name: tensors or gptq(weight)}, plain or {}, config or {})


def gptq_converted(
    folder: Path, weight: Ints, tensors: Tensors | None = None, name: str = DOWN, **more: Any
) -> Converted:
    """Convert `gptq_checkpoint` of the same arguments; the output must mean what `weight` does."""
    source = gptq_checkpoint(weight, tensors, name, **more).write(folder / "in")
    converted = convert(source, folder / "out")
    assert np.array_equal(converted.values(name), weight.values)
    return converted
