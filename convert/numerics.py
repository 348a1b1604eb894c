"""Numerics: kernels compute the stored layer, and agree with a float64 product of the *source*.

One module stands for each distinct (scheme, N, K): exactness has shown that all decode alike, so what is left to
check is that a kernel reads this layout of this shape as we do. At M = 1, 2, 8 and 64 rows of activations, because
kernels take different paths there (one was right for one request and wrong for two).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from xpuquant.convert.exactness import read
from xpuquant.convert.plan import Plan
from xpuquant.convert.repo import Repo
from xpuquant.convert.source import Source
from xpuquant.formats.dtypes import FLOATS, numpy_dtype
from xpuquant.formats.layout import Matrix, Stored
from xpuquant.formats.weight import Weight
from xpuquant.kernels import Array, Backend, Layer

ROWS = (1, 2, 8, 64)
SAMPLE_ROWS = 256
"""Rows of N computed by a full product in float64 would cost more than the whole conversion; this many, from the middle
of the matrix, are taken where a backend accepts a part of it."""

_SEED = 20240229


@dataclass(frozen=True)
class Agreement:
    """One kernel on one (scheme, shape).

    error      relative Frobenius error against float64, the largest over M; None where it was not run
    tolerance  what passes
    reason     why it was not run
    """

    backend: str
    module: str
    scheme: str
    N: int
    K: int
    error: float | None
    tolerance: float
    reason: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None or self.error <= self.tolerance


def representatives(plan: Plan, repo: Repo) -> Iterator[tuple[Weight, Stored, Matrix]]:
    """The first matrix of each distinct (scheme, N, K)."""
    seen: set[object] = set()
    for planned in plan.modules:
        stored = repo.modules.get(planned.conversion.name)
        if stored is None:
            continue
        matrices = {(matrix.role, matrix.expert): matrix for matrix in repo.layout(stored).matrices(stored)}
        for role, expert, weight in planned.weights:
            key = (stored.scheme, weight.N, weight.K)
            if key not in seen and (role, expert) in matrices:
                seen.add(key)
                yield weight, stored, matrices[role, expert]


def check_kernels(plan: Plan, source: Source, repo: Repo, backends: Sequence[Backend]) -> list[Agreement]:
    """Run every backend on every representative."""
    return [
        agreement
        for weight, stored, matrix in representatives(plan, repo)
        for agreement in _check(weight, source, repo, stored, matrix, backends)
    ]


def _check(
    weight: Weight, source: Source, repo: Repo, stored: Stored, matrix: Matrix, backends: Sequence[Backend]
) -> Iterator[Agreement]:
    # A block of scales cannot be cut; everything else is stored by eights at the most.
    step = max(8, stored.scheme.block_n)
    start = max(0, (matrix.N - SAMPLE_ROWS) // 2) // step * step
    stop = min(matrix.N, start + SAMPLE_ROWS)
    decoded = weight.decode([read(source, part) for part in weight.decode_inputs(start, stop)], start, stop)
    if stored.scheme.scale_dtype in FLOATS:
        # Scales that were rounded because the user asked for it are the truth from then on; `exactness` has
        # compared the rounding itself.
        decoded = replace(decoded, scale=decoded.scale.astype(numpy_dtype(stored.scheme.scale_dtype)))
    truth = decoded.values()
    layer = Layer(
        stored.scheme, stop - start, matrix.K, repo.layout(stored).layer(stored, matrix, start, stop)
    )
    x = np.random.default_rng(_SEED).standard_normal((max(ROWS), matrix.K)).astype(np.float32)
    for backend in backends:
        reason = backend.unavailable() or backend.refuses(stored.scheme, stop - start, matrix.K)
        error = None if reason else max(_error(backend, layer, truth, x[:rows]) for rows in ROWS)
        yield Agreement(
            backend.name,
            stored.name,
            stored.scheme.label(),
            matrix.N,
            matrix.K,
            error,
            TOLERANCE.get(backend.name, 1e-2),
            reason,
        )


TOLERANCE = {"reference": 1e-6}
"""Largest relative error that passes. The reference computes in float64 and returns float32 (2^-24 = 6e-8)."""


def _error(backend: Backend, layer: Layer, truth: Array, x: Array) -> float:
    wanted = x.astype(np.float64) @ truth.T
    bias = layer.tensors.get("bias")
    if bias is not None:
        wanted = wanted + bias.astype(np.float64)
    got = backend.linear(layer, x).astype(np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(got)):
        return float("inf")
    norm = float(np.linalg.norm(wanted[finite]))
    return float(np.linalg.norm((got - wanted)[finite])) / (norm or 1.0)
