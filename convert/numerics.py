"""Numerics: kernels compute the stored layer, and agree with a float64 product of the *source*.

Exactness has shown what the bytes decode to; what is left is that a kernel reads this layout, in this shape, as we do.

* Each distinct (scheme, N, K) is computed at every M of `ROWS`, because kernels take different paths there (one was
  right for one request and wrong for two), and once more with the weight in a wrong layout, which must *not* agree: a
  check that cannot fail would show nothing.
* Each module is computed at one M on some of its rows, which also gives the heat map its colours.

What is right, `convert/truth.py` says.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from xpuquant.convert.truth import LARGEST, SEED, Subject, Truths, activations, misread_truth
from xpuquant.convert.verdict import CONTRADICTIONS, REFERENCE, Agreement, contradiction
from xpuquant.errors import UnsupportedError, one_line
from xpuquant.kernels import Array, Backend, Layer, tolerance

ROWS = (1, 2, 8, 33, 64)
SAMPLE_ROWS = 256
"""Rows of N that stand for a matrix where all of them would cost more than the conversion."""

CELL_ROWS = 64
CELL_M = 8
SHARPEST = ("F32", "F16", "BF16")
"""Activation dtypes by how small an error they show."""

SERVED = "BF16"
"""The activation dtype of most served models: kernels choose other code for it."""

FAST = ("onednn", "vllm_xpu", "ipex")
"""Backends that compute all rows of a large Linear at every M within seconds; torch's int4 kernel takes a minute."""

FULL_CODES = 1 << 26
"""Largest matrix computed in full (64 Mi codes: any Linear but a vocabulary-sized one). The float64 reference never is:
it would take half a gigabyte."""

BINS = tuple(10.0**-e for e in range(9, -1, -1))
"""Upper edges of the histogram of |error| / rms(product); one more bin above the last."""

_REFERENCE_TOLERANCE = 2.0**-20
"""The reference computes in float64 and returns float32, rounding each output once (2^-24)."""


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


def _thorough(subject: Subject, backends: Sequence[Backend], full: bool, every: bool) -> Iterator[Agreement]:
    """All M, all rows where they are affordable, and the wrong layout."""
    N, K = subject.matrix.N, subject.matrix.K
    truths, sample, misread = Truths(subject), subject.window(SAMPLE_ROWS), misread_truth(subject)
    for backend in backends:
        is_fast = full and backend.name in FAST and N * K <= FULL_CODES
        window = (0, N) if (every and backend.name != REFERENCE) or is_fast else sample
        # What the reference computes does not depend on M.
        run = _agreement(truths, backend, window, ROWS[-1:] if backend.name == REFERENCE else ROWS)
        if run.ran and run.reason is None and misread is not None:
            run = replace(run, wrong_layout=_wrong_layout(misread, backend, run.activation))
        yield run
        if backend.name != REFERENCE and run.activation not in ("", SERVED):
            as_served = _agreement(truths, backend, sample, ROWS, (SERVED,))
            if as_served.ran:
                yield as_served


def _taken(backend: Backend, subject: Subject, N: int, dtypes: Sequence[str]) -> tuple[str, str | None]:
    """The first of the activation dtypes that a backend takes for a matrix, or why it takes none."""
    reason: str | None = None
    for dtype in dtypes:
        reason = backend.refuses(subject.stored.scheme, N, subject.matrix.K, dtype)
        if reason is None:
            return dtype, None
    return "", reason


def _agreement(
    truths: Truths,
    backend: Backend,
    window: tuple[int, int],
    Ms: Sequence[int],
    dtypes: Sequence[str] = SHARPEST,
) -> Agreement:
    stored, matrix = truths.subject.stored, truths.subject.matrix
    start, stop = window
    blank = Agreement(
        backend.name, stored.name, matrix.role, matrix.expert, stored.scheme.label(), matrix.N, matrix.K
    )
    dtype, reason = _taken(backend, truths.subject, stop - start, dtypes)
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
    finite = np.abs(wanted) <= LARGEST  # and neither infinite nor NaN
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


def _wrong_layout(misread: tuple[Layer, Array], backend: Backend, dtype: str) -> float | None:
    """The error where a kernel is given the bytes in a wrong order."""
    broken, values = misread
    x = activations(CELL_M, broken.K, SEED, dtype)
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            return _compare(backend.linear(broken, x), x.astype(np.float64) @ values.T)[0]
    except (UnsupportedError, *CONTRADICTIONS):
        return None
