"""Numerics: kernels compute the stored layer, and agree with a float64 product of the *source*.

Exactness has shown what the bytes decode to; what is left is that a kernel reads this layout, in this shape, as we do.

* Each distinct (scheme, N, K) is computed at every M of `ROWS`, because kernels take different paths there (one was
  right for one request and wrong for two), and once more with the weight in a wrong layout, which must *not* agree: a
  check that cannot fail would show nothing.
* Each module is computed at one M on some of its rows, which also gives the heat map its colours.

Activations are as a transformer has them, rows of unit RMS with a few outlier channels, from a recorded seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from xpuquant.convert.verdict import CONTRADICTIONS, REFERENCE, Agreement, contradiction
from xpuquant.errors import UnsupportedError, one_line
from xpuquant.formats.decoded import Decoded
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layout import Layout, Matrix, Stored
from xpuquant.formats.weight import row_blocks
from xpuquant.kernels import Array, Backend, Layer, tolerance
from xpuquant.kernels.reference import dequantize

ROWS = (1, 2, 8, 33, 64)
SEED = 20240229
SAMPLE_ROWS = 256
"""Rows of N that stand for a matrix where all of them would cost more than the conversion."""

CELL_ROWS = 64
CELL_M = 8
FAST = ("onednn", "vllm_xpu", "ipex")
"""Backends that compute all rows of a large Linear at every M within seconds; torch's int4 kernel takes a minute."""

FULL_CODES = 1 << 26
"""Largest matrix computed in full (64 Mi codes: any Linear but a vocabulary-sized one). The float64 reference never is:
it would take half a gigabyte."""

BINS = tuple(10.0**-e for e in range(9, -1, -1))
"""Upper edges of the histogram of |error| / rms(product); one more bin above the last."""

_LARGEST = float(np.finfo(np.float32).max)
_BLOCK_CODES = 1 << 20
_PLAIN = 1e30
"""A weight this large overflows a kernel whatever its layout."""

_OUTLIER_EVERY = 256
_OUTLIER_GAIN = 20.0
_REFERENCE_TOLERANCE = 2.0**-20
"""The reference computes in float64 and returns float32, rounding each output once (2^-24)."""

Rows = Callable[[int, int], Decoded]
"""Rows `start:stop` of a matrix, decoded: from the source, or from the output where the source is gone."""


@dataclass(frozen=True)
class Subject:
    """One matrix to compute."""

    stored: Stored
    layout: Layout
    matrix: Matrix
    rows: Rows

    def layer(self, start: int, stop: int) -> Layer:
        arrays = self.layout.layer(self.stored, self.matrix, start, stop)
        return Layer(self.stored.scheme, stop - start, self.matrix.K, arrays)

    def window(self, rows: int) -> tuple[int, int]:
        """About `rows` rows from the middle: stored by eights at the most, and a block of scales cannot be cut."""
        N = self.matrix.N
        step = max(8, self.stored.scheme.block_n)
        if rows >= N:
            return 0, N
        start = (N - rows) // 2 // step * step
        return start, min(N, start + max(rows // step, 1) * step)


def check_kernels(
    subjects: Iterable[Subject], backends: Sequence[Backend], *, full: bool, every: bool
) -> list[Agreement]:
    """Run every backend that can run on every module.

    Args:
        subjects: matrices, those of a module together.
        full: all rows of the representatives where a backend is fast enough, not a sample.
        every: every matrix of every module like a representative, all rows whatever they cost.
    """
    usable = [backend for backend in backends if backend.unavailable() is None]
    # The reference shows that we read the layout as we wrote it, once for each shape; a module is for real kernels.
    real = [backend for backend in usable if backend.name != REFERENCE]
    seen: set[object] = set()
    found: list[Agreement] = []
    for _, members in groupby(subjects, key=lambda subject: subject.stored.name):
        for subject, chosen in _chosen(list(members)):
            matrix = subject.matrix
            key = (subject.stored.scheme, matrix.role == "gate_up", matrix.N, matrix.K)
            if every or key not in seen:
                seen.add(key)
                found += _thorough(subject, usable, full, every)
            elif chosen:
                truths = Truths(subject)
                window = subject.window(CELL_ROWS)
                found += [_agreement(truths, backend, window, (CELL_M,)) for backend in real]
    return found


def _chosen(members: Sequence[Subject]) -> Iterator[tuple[Subject, bool]]:
    """A module's matrices, and whether each stands for its role: another expert in each layer."""
    by_role: dict[str, list[Subject]] = {}
    for subject in members:
        by_role.setdefault(subject.matrix.role, []).append(subject)
    for same in by_role.values():
        index = zlib.crc32(same[0].stored.name.encode()) % len(same)
        # First, so that it is the one to represent its shape too.
        yield same[index], True
        yield from ((subject, False) for i, subject in enumerate(same) if i != index)


def activations(M: int, K: int, seed: int, dtype: str) -> Array:
    """`[M, K]` as a transformer has them: rows of unit RMS, every 256th channel 20 times larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((M, K), np.float32)
    x[:, :: min(_OUTLIER_EVERY, K)] *= _OUTLIER_GAIN
    x /= np.sqrt(np.mean(np.square(x), axis=1, keepdims=True))
    return x.astype(numpy_dtype(dtype))


@dataclass(frozen=True)
class Truth:
    """What a kernel is given, and what it should make of it.

    x         activations `[M, K]`
    wanted    float64 `[M, n]`
    overflow  a sum on the way can exceed float32, in which kernels add up: infinity, or the NaN of two of them, is
              then no error of theirs
    """

    layer: Layer
    x: Array
    wanted: Array
    overflow: bool


class Truths:
    """The truths of one matrix, made once for all backends."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._made: dict[tuple[int, int, int, str], Truth] = {}

    def of(self, start: int, stop: int, M: int, dtype: str) -> Truth:
        key = (start, stop, M, dtype)
        if key not in self._made:
            self._made[key] = self._make(start, stop, M, dtype)
        return self._made[key]

    def _make(self, start: int, stop: int, M: int, dtype: str) -> Truth:
        """Rows `start:stop`, a block at a time."""
        K = self.subject.matrix.K
        layer = self.subject.layer(start, stop)
        x = activations(M, K, SEED ^ zlib.crc32(self.subject.stored.name.encode()), dtype)
        wide = x.astype(np.float64)
        wanted, largest = np.empty((M, stop - start)), 0.0
        # A NaN that the source has makes NaN outputs on both sides, which is agreement.
        with np.errstate(invalid="ignore", over="ignore"):
            for top, bottom in row_blocks(stop - start, K, 8, _BLOCK_CODES):
                values = self.subject.rows(start + top, start + bottom).values()
                wanted[:, top:bottom] = wide @ values.T
                largest = max(largest, float(np.fmax.reduce(np.abs(values), axis=None, initial=0.0)))
            if "bias" in layer.tensors:
                wanted += layer.tensors["bias"].astype(np.float64)
        reach = largest * float(np.abs(wide).sum(axis=1).max())
        return Truth(layer, x, wanted, reach > _LARGEST)


def _thorough(subject: Subject, backends: Sequence[Backend], full: bool, every: bool) -> Iterator[Agreement]:
    """All M, all rows where they are affordable, and the wrong layout."""
    N, K = subject.matrix.N, subject.matrix.K
    truths, sample, misread = Truths(subject), subject.window(SAMPLE_ROWS), _misread_truth(subject)
    for backend in backends:
        is_fast = full and backend.name in FAST and N * K <= FULL_CODES
        window = (0, N) if (every and backend.name != REFERENCE) or is_fast else sample
        # What the reference computes does not depend on M.
        run = _agreement(truths, backend, window, ROWS[-1:] if backend.name == REFERENCE else ROWS)
        if run.ran and run.reason is None and misread is not None:
            run = replace(run, wrong_layout=_wrong_layout(misread, backend, run.activation))
        yield run


def _sharpest(backend: Backend, subject: Subject, N: int) -> tuple[str, str | None]:
    """The most exact activation dtype a backend takes for a matrix, or why it takes none."""
    reason: str | None = None
    for dtype in ("F32", "F16", "BF16"):
        reason = backend.refuses(subject.stored.scheme, N, subject.matrix.K, dtype)
        if reason is None:
            return dtype, None
    return "", reason


def _agreement(truths: Truths, backend: Backend, window: tuple[int, int], Ms: Sequence[int]) -> Agreement:
    stored, matrix = truths.subject.stored, truths.subject.matrix
    start, stop = window
    blank = Agreement(
        backend.name, stored.name, matrix.role, matrix.expert, stored.scheme.label(), matrix.N, matrix.K
    )
    dtype, reason = _sharpest(backend, truths.subject, stop - start)
    if reason is not None:
        return replace(blank, reason=one_line(reason))
    try:
        truth = truths.of(start, stop, max(Ms), dtype)
        if truth.overflow:
            return replace(blank, reason="sums of these values can exceed float32")
        with np.errstate(invalid="ignore", over="ignore"):
            runs = [_compare(backend.linear(truth.layer, truth.x[:M]), truth.wanted[:M]) for M in Ms]
    except UnsupportedError as error:
        return replace(blank, reason=one_line(error))
    except CONTRADICTIONS as error:
        return replace(blank, error=float("inf"), reason=contradiction(error))
    worst = max(runs, key=lambda run: run[0])
    limit = _REFERENCE_TOLERANCE if backend.name == REFERENCE else tolerance(dtype, matrix.K)
    return replace(
        blank,
        rows=stop - start,
        M=tuple(Ms),
        activation=dtype,
        error=worst[0],
        max_abs=max(run[1] for run in runs),
        cosine=min(run[2] for run in runs),
        tolerance=limit,
        histogram=tuple(int(n) for n in np.sum([run[3] for run in runs], axis=0)),
    )


def _compare(got: Array, wanted: Array) -> tuple[float, float, float, Array]:
    """(relative Frobenius error, largest absolute error, cosine, histogram)."""
    finite = np.abs(wanted) <= _LARGEST  # and neither infinite nor NaN
    if got.shape != wanted.shape or not np.array_equal(finite, np.isfinite(got)):
        return float("inf"), float("inf"), 0.0, np.zeros(len(BINS) + 1, np.int64)
    truth, result = wanted[finite], got.astype(np.float64)[finite]
    errors = np.abs(result - truth)
    norm, size = float(np.linalg.norm(truth)), max(truth.size, 1)
    scale = norm / np.sqrt(size) or 1.0
    counts = np.bincount(np.searchsorted(BINS, errors / scale), minlength=len(BINS) + 1)
    product = float(np.linalg.norm(result)) * norm
    cosine = float(truth @ result) / product if product else 1.0
    error = float(np.linalg.norm(errors)) / (norm or 1.0)
    return error, float(errors.max(initial=0.0)), cosine, counts


def _misread_truth(subject: Subject) -> tuple[Layer, Array] | None:
    """(a few rows with the weight's bytes in a wrong order, the right weight `[n, K]`); None where that order
    changes nothing (all codes of a byte alike), or nothing finite.

    Without the bias, which may be so large that the weight does not show.
    """
    start, stop = subject.window(CELL_ROWS)
    try:
        layer = subject.layer(start, stop)
        layer = replace(layer, tensors={role: a for role, a in layer.tensors.items() if role != "bias"})
        broken = replace(layer, tensors=dict(_misread(layer)))
        values = subject.rows(start, stop).values()
        with np.errstate(invalid="ignore", over="ignore"):
            same = np.array_equal(values, dequantize(broken), equal_nan=True)
        largest = float(np.abs(values).max(initial=0.0))
        return None if same or not largest < _PLAIN else (broken, values)
    except CONTRADICTIONS:
        return None


def _wrong_layout(misread: tuple[Layer, Array], backend: Backend, dtype: str) -> float | None:
    """The error where a kernel is given the bytes in a wrong order."""
    broken, values = misread
    x = activations(CELL_M, broken.K, SEED, dtype)
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            return _compare(backend.linear(broken, x), x.astype(np.float64) @ values.T)[0]
    except (UnsupportedError, *CONTRADICTIONS):
        return None


def _misread(layer: Layer) -> Iterator[tuple[str, Array]]:
    """The layer with the two nibbles of every byte exchanged, or its fp8 rows rolled by one."""
    for role, array in layer.tensors.items():
        if role not in ("qweight", "weight"):
            yield role, array
        elif array.dtype.kind in "iu":
            octets = np.ascontiguousarray(array).view(np.uint8)
            yield role, (octets >> 4 | octets << 4).view(array.dtype)
        else:
            yield role, np.ascontiguousarray(np.roll(array, 1, axis=0))
