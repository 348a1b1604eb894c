"""Kernels: they compute the stored layer, and agree with a float64 product of the *source*.

Exactness has shown what the bytes decode to; what is left is that a kernel reads this layout, in this shape, as we do.

* Each distinct (scheme, N, K) is computed at every M of `ROWS`, because kernels take different paths there (one was
  right for one request and wrong for two), and once more with the weight in a wrong layout, which must *not* agree: a
  check that cannot fail would show nothing.
* Each module is computed at one M on some of its rows, which also gives the heat map its colours.

What is right, `expected.py` says, and what rounding is in proportion to. Every output is judged by itself, so
that neither a large one hides a wrong one, nor one whose terms cancel fails a right kernel.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np

from xpuquant.conversion.verify.expected import Expected, ExpectedProducts, Subject, expected_of_misread
from xpuquant.conversion.verify.threads import Call
from xpuquant.conversion.verify.verdict import CONTRADICTIONS, REFERENCE, Agreement, contradiction
from xpuquant.errors import UnsupportedError, one_line
from xpuquant.kernels.base import Backend, Layer, tolerance
from xpuquant.kernels.reference import dequantize
from xpuquant.values import frozen

ROWS = (1, 2, 8, 33, 64)


@frozen
class Sample:
    """Rows of N that stand for a matrix where all of them would cost more than the conversion.

    rows  of the one matrix of each shape that is computed at every M
    cell  of the matrices that stand for a module
    """

    rows: int
    cell: int


THOROUGH = Sample(256, 64)
BRIEF = Sample(64, 16)
"""While converting: every value has just been compared, and `verify` looks at more."""

CELL_M = 8
SHARPEST = ("F32", "F16", "BF16")
"""Activation dtypes by how small an error they show."""

SERVED = ("BF16", "F16")
"""Activation dtypes of served models, the usual one first: kernels choose other code for them."""

FULL_CODES = 1 << 26
"""Largest matrix computed in full (64 Mi codes: any Linear but a vocabulary-sized one). The float64 reference never is:
it would take half a gigabyte."""

BINS = tuple(10.0**-e for e in range(9, -1, -1))
"""Upper edges of the histogram of |error| / rms(product); one more bin above the last."""

_WORST = 2
"""`kernels.tolerance` is for the norm of all errors; the worst of millions of outputs gets so many times that, of its
`Expected.size`, itself two to three times a usual output."""

_REFERENCE_TOLERANCE = 2.0**-20
"""The reference computes in float64 and returns float32, rounding each output once (2^-24)."""


Run = Callable[[Sequence[Call[list[Agreement]]]], list[list[Agreement]]]
"""Makes calls that do not depend on each other; their results, in order."""


def _in_turn(calls: Sequence[Call[list[Agreement]]]) -> list[list[Agreement]]:
    return [call.make() for call in calls]


def check_kernels(
    subjects: Iterable[Subject], backends: Sequence[Backend], *, full: bool, every: bool, run: Run = _in_turn
) -> list[Agreement]:
    """Run every backend that can run on every module.

    Args:
        subjects: matrices, those of a module together.
        full: all rows of the representatives where a backend is fast enough, and larger samples of the rest.
        every: every matrix of every module like a representative, all rows whatever they cost.
        run: in threads; not used where a backend wants to be called by one.
    """
    usable = [backend for backend in backends if backend.unavailable() is None]
    # The reference shows that we read the layout as we wrote it, once for each shape; a module is for real kernels.
    real = [backend for backend in usable if backend.name != REFERENCE]
    sample = THOROUGH if full or every else BRIEF
    seen: set[object] = set()
    calls: list[Call[list[Agreement]]] = []
    for _, members in groupby(subjects, key=lambda subject: subject.stored.name):
        for subject, chosen in _chosen(list(members)):
            matrix = subject.matrix
            read = tuple(subject.stored.tensors.values())
            key = (subject.stored.scheme, matrix.role == "gate_up", matrix.N, matrix.K)
            if every or key not in seen:
                seen.add(key)
                calls.append(Call(partial(_thorough, subject, usable, sample, full, every), read))
            elif chosen:
                calls.append(Call(partial(_brief, subject, real, sample.cell), read))
    found = (run if all(backend.concurrent for backend in usable) else _in_turn)(calls)
    return [agreement for of_call in found for agreement in of_call]


def _brief(subject: Subject, backends: Sequence[Backend], rows: int) -> list[Agreement]:
    """One M, some rows."""
    products, window = ExpectedProducts(subject), subject.window(rows)
    return [_agreement(products, backend, window, (CELL_M,)) for backend in backends]


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


def _thorough(subject: Subject, backends: Sequence[Backend], few: Sample, full: bool, every: bool) -> list[Agreement]:
    """All M, all rows where they are affordable, and the wrong layout."""
    found: list[Agreement] = []
    N, K = subject.matrix.N, subject.matrix.K
    products, sample = ExpectedProducts(subject), subject.window(few.rows)
    for backend in backends:
        is_fast = full and N * K <= FULL_CODES and backend.is_fast(subject.stored.scheme, N, K)
        window = (0, N) if (every and backend.name != REFERENCE) or is_fast else sample
        # What the reference computes does not depend on M.
        run = _agreement(products, backend, window, ROWS[-1:] if backend.name == REFERENCE else ROWS)
        if run.ran and run.reason is None:
            run = replace(run, wrong_layout=_wrong_layout(subject, backend, run.activation, run.tolerance))
        found.append(run)
        if backend.name != REFERENCE and run.activation:
            for dtype in SERVED:
                if dtype == run.activation:
                    break
                as_served = _agreement(products, backend, sample, ROWS, (dtype,))
                found.append(as_served)  # refused too: what this processor cannot check belongs in the report
                if as_served.ran:
                    break
    return found


def _limit(backend: Backend, dtype: str, K: int) -> float:
    """The largest error of an output, over its `Expected.size`, that arithmetic alone explains."""
    return _REFERENCE_TOLERANCE if backend.name == REFERENCE else _WORST * tolerance(dtype, K)


def _agreement(
    products: ExpectedProducts,
    backend: Backend,
    window: tuple[int, int],
    Ms: Sequence[int],
    dtypes: Sequence[str] = SHARPEST,
) -> Agreement:
    """In the first of the activation dtypes that the backend takes and that can hold the sums."""
    stored, matrix = products.subject.stored, products.subject.matrix
    start, stop = window
    blank = Agreement(backend.name, stored.name, matrix.role, matrix.expert, stored.scheme.label(), matrix.N, matrix.K)
    refused, overflow, expected = None, None, None
    try:
        for dtype in dtypes:
            refused = backend.refuses(stored.scheme, stop - start, matrix.K, dtype)
            if refused is not None:
                continue
            expected = products.of(start, stop, max(Ms), dtype)
            if not expected.overflow:
                runs = [_compare(backend, expected, M) for M in Ms]
                break
            overflow = f"sums of these values can exceed {'float16' if dtype == 'F16' else 'float32'}"
        else:
            return replace(blank, reason=one_line(overflow or refused or ""))
    except UnsupportedError as error:
        return replace(blank, reason=one_line(error))
    except (*CONTRADICTIONS, RuntimeError) as error:  # torch and what is built on it raise that for nearly everything
        if backend.name != REFERENCE and expected is not None and _is_readable(expected.layer):
            return replace(blank, reason=one_line(f"its library raised {type(error).__name__}: {error}"))
        return replace(blank, error=float("inf"), deviation=float("inf"), reason=contradiction(error))
    return replace(
        blank,
        rows=stop - start,
        M=tuple(Ms),
        activation=dtype,
        error=max(run.error for run in runs),
        deviation=max(run.deviation for run in runs),
        max_abs=max(run.max_abs for run in runs),
        cosine=min(run.cosine for run in runs),
        tolerance=_limit(backend, dtype, matrix.K),
        histogram=tuple(int(n) for n in np.sum([run.histogram for run in runs], axis=0)),
    )


def _is_readable(layer: Layer) -> bool:
    """Whether the definition of its layout reads a layer: what a library raises over it is then no fault of the file,
    but of the library or of what surrounds it (an odd variable, no memory)."""
    try:
        dequantize(layer)
    except CONTRADICTIONS:
        return False
    return True


@frozen
class _Comparison:
    """See `Agreement`, which has the worst over several M."""

    error: float = float("inf")
    deviation: float = float("inf")
    max_abs: float = float("inf")
    cosine: float = 0.0
    histogram: Sequence[int] = (0,) * (len(BINS) + 1)


def _compare(backend: Backend, expected: Expected, M: int) -> _Comparison:
    """What a kernel makes of the first M activations."""
    product, size = expected.product[:M], expected.size[:M]
    with np.errstate(invalid="ignore", over="ignore"):
        got = backend.linear(expected.layer, expected.x[:M])
    finite = np.isfinite(product)
    if got.shape != product.shape or not np.array_equal(finite, np.isfinite(got)):
        return _Comparison()
    right, result = product[finite], got.astype(np.float64)[finite]
    errors = np.abs(result - right)
    norm = float(np.linalg.norm(right))
    scale = norm / np.sqrt(max(right.size, 1)) or 1.0
    norms = float(np.linalg.norm(result)) * norm
    return _Comparison(
        error=float(np.linalg.norm(errors)) / (norm or 1.0),
        deviation=float((errors / size[finite]).max(initial=0.0)),
        max_abs=float(errors.max(initial=0.0)),
        cosine=float(right @ result) / norms if norms else 1.0,
        histogram=np.bincount(np.searchsorted(BINS, errors / scale), minlength=len(BINS) + 1).tolist(),
    )


def _wrong_layout(subject: Subject, backend: Backend, dtype: str, limit: float) -> float | None:
    """The deviation where a kernel is given the bytes in a wrong order. None where that changes nothing (all codes of a
    byte alike), or so little beside larger weights that a right kernel may round it away."""
    misread = expected_of_misread(subject, CELL_M, dtype)
    if misread is None or misread[1] <= 2 * limit:
        return None
    try:
        return _compare(backend, misread[0], CELL_M).deviation
    except (UnsupportedError, *CONTRADICTIONS):
        return None
