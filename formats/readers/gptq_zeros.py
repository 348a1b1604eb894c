"""Zero points of GPTQ files: by which of two conventions they are stored, and whether all are the middle.

v1 (`checkpoint_format: gptq`) stores z - 1, v2 (`gptq_v2`, `gptq_p`) stores z. The label is often wrong (Qwen's own
GPTQ repos store v2 and claim v1: vLLM pull 26092), but a symmetric checkpoint shows it: every field is 2^(b-1) - 1
or 2^(b-1). For asymmetric ones the label is all there is.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.checkpoint import Array, Checkpoint
from xpuquant.formats.packing.plain import unpack_planar, unpack_rows
from xpuquant.formats.readers.gptq_config import GptqConfig
from xpuquant.formats.safetensors import Tensor
from xpuquant.values import frozen


@frozen
class ZeroPoints:
    """What the zero points of one module turned out to be.

    symmetric  all are 2^(bits-1)
    plus_one   stored minus one
    fact       how that was decided, for the report
    """

    symmetric: bool
    plus_one: bool
    fact: str


def measure_zeros(
    checkpoint: Checkpoint, config: GptqConfig, name: str, bits: int, N: int, G: int, qzeros: Tensor | None
) -> ZeroPoints:
    """Decide convention and symmetry of one module.

    Raises:
        DamagedError: qzeros are absent where the config says asymmetric, do not have G rows, or lack the last
            columns of an asymmetric module.
        UnsupportedError: the writer is known to have spoilt them.
    """
    if qzeros is None:
        if config.sym is not True:
            raise DamagedError(f"{name}.qzeros is missing, but the config does not say symmetric (sym: true)")
        return ZeroPoints(True, False, "symmetric: no qzeros, the config says sym")
    if qzeros.shape[0] != G:
        raise DamagedError(f"{qzeros.name} has {qzeros.shape[0]} rows, {name}.scales has {G}")
    words = checkpoint.peek(qzeros)
    if words is None:
        symmetric = config.sym is True
        return ZeroPoints(symmetric, _labelled(config), f"zero points {_said(config)}, as the config says")
    alike = _alike(config, bits, N, words)
    if alike is not None:
        return alike
    fields = stored_fields(words, bits, N, config.planar)
    measured = _measure(config, bits, fields)
    if fields.shape[1] < N:
        lost = f"the zero points of the last {N - fields.shape[1]} columns are not stored"
        if not measured.symmetric:
            raise DamagedError(f"{qzeros.name}: {lost} (an old packer dropped them)")
        return ZeroPoints(True, measured.plus_one, f"{measured.fact}; {lost}")
    if not measured.symmetric and measured.plus_one:
        _check_writer(config, bits, fields)
    return measured


def _alike(config: GptqConfig, bits: int, N: int, words: Array) -> ZeroPoints | None:
    """What zero points are that are symmetric, by one word where all are alike; None where they are not, or some are
    missing."""
    if 32 % bits or words.shape[1] * 32 // bits < N or not words.size:
        return None
    content = words.tobytes()
    if content != content[:4] * words.size:
        return None
    measured = _of_word(config, bits, min(N, 32 // bits), content[:4])
    return measured if measured.symmetric else None


@lru_cache(64)
def _of_word(config: GptqConfig, bits: int, count: int, word: bytes) -> ZeroPoints:
    """The same of `count` fields of one word: nearly all modules of a symmetric checkpoint have the same."""
    words = np.frombuffer(word, np.int32).reshape(1, 1)
    return _measure(config, bits, stored_fields(words, bits, count, config.planar))


def _measure(config: GptqConfig, bits: int, fields: Array) -> ZeroPoints:
    middle = 1 << (bits - 1)
    minus_one, true = (int(np.count_nonzero(fields == value)) for value in (middle - 1, middle))
    if (config.sym is not False or config.zeros_minus_one is None) and fields.size in (minus_one, true):
        plus_one = fields.size == minus_one
        lie = "" if config.zeros_minus_one in (plus_one, None) else f"; the config says {_said(config)}"
        return ZeroPoints(True, plus_one, f"symmetric, zero points {_words(plus_one)}, from the words{lie}")
    if fields.size == (minus_one if config.zeros_minus_one else true):
        lie = "symmetric, from the words, although the config says not"
        return ZeroPoints(True, _labelled(config), lie)
    if config.sym and 2 * max(minus_one, true) > fields.size:
        # Symmetric but for a few: what most fields are says how all are stored.
        plus_one = minus_one > true
        stray = fields.size - max(minus_one, true)
        return ZeroPoints(
            False,
            plus_one,
            f"asymmetric, zero points {_words(plus_one)}, from the words: "
            f"{stray} of {fields.size} are not the middle, although the config says symmetric",
        )
    lie = ", although it says symmetric" if config.sym else ""
    return ZeroPoints(False, _labelled(config), f"asymmetric, zero points {_said(config)}, as the config says{lie}")


def _words(plus_one: bool) -> str:
    return "minus one (v1)" if plus_one else "true (v2)"


def _said(config: GptqConfig) -> str:
    return _words(_labelled(config))


def _labelled(config: GptqConfig) -> bool:
    """Whether the label is v1. Raises UnsupportedError where there is none: nothing else tells of asymmetric files."""
    if config.zeros_minus_one is None:
        raise UnsupportedError(
            "asymmetric GPTQ tensors under the config of another format: whether zero points are stored minus one is "
            "for 'checkpoint_format' (gptq or gptq_v2) to say"
        )
    return config.zeros_minus_one


def _check_writer(config: GptqConfig, bits: int, fields: Array) -> None:
    """Refuse zero points minus one that a writer is known to have spoilt where one of them was 0."""
    top = (1 << bits) - 1
    if bits == 3:
        if config.writer == "auto-round" and (fields == top).any():
            raise UnsupportedError(
                "AutoRound's 3-bit packer spoils the neighbours of a zero point of 0, and there is one: quantize again "
                "with format auto_round"
            )
        return
    if config.writer or 32 % bits:
        return
    # AutoGPTQ ORs 0xFFFFFFFF, shifted, into the word (auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py, pack): all
    # fields above a zero point of 0 are lost. GPTQModel and AutoRound borrow instead, which leaves other fields above.
    per_word = 32 // bits
    full = fields[:, : fields.shape[1] // per_word * per_word].reshape(len(fields), -1, per_word) == top
    to_the_top = np.logical_and.accumulate(full[:, :, ::-1], axis=2)[:, :, ::-1]
    suspects = full[:, :, :-1]
    if suspects.any() and to_the_top[:, :, :-1][suspects].all():
        raise UnsupportedError(
            "AutoGPTQ's packer overwrites the neighbours of a zero point of 0, and there is one: they are lost"
        )


def true_zeros(words: Array, bits: int, N: int, plus_one: bool, planar: bool = False) -> Array:
    """uint8 `[G, N]`: the zero points the producer meant.

    Args:
        words: int32 `[G, ceil(N*b/32)]`.
        plus_one: stored minus one. The writers subtract from (GPTQModel) or sum into (AutoRound) the *whole word*, so
            a true zero of 0 borrows from the field above: adding the per-field ones to the word undoes it
            exactly, where adding one per field would not (gptqmodel/utils/model.py,
            convert_gptq_v1_to_v2_format_module). 3-bit fields straddle words and are written one by one.
    """
    if not plus_one:
        return stored_fields(words, bits, N, planar)
    if 32 % bits:
        return (stored_fields(words, bits, N, planar) + np.uint8(1)) & np.uint8((1 << bits) - 1)
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return stored_fields(words.view(np.uint32) + ones, bits, N, planar)


def stored_fields(words: Array, bits: int, N: int, planar: bool) -> Array:
    """uint8 `[G, N]` as stored; fewer columns where an old packer dropped a last, partial word."""
    unpack = unpack_planar if planar else unpack_rows
    return unpack(np.ascontiguousarray(words).view(np.uint32), bits, min(N, words.shape[1] * 32 // bits))
