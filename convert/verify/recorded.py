"""Exactness where the source is gone: the repo decodes to what was digested when it was converted.

The digests (`digests.py`) were taken in the pass that compared every value with the source, so equal digests
mean equal values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.converted import Repo
from xpuquant.conversion.verify.column_cache import Panels
from xpuquant.conversion.verify.digests import MatrixDigest, module_digest, recorded
from xpuquant.conversion.verify.exactness import (
    BLOCK_CODES,
    byte_blocks,
    find_matrix,
    in_rows,
    matrices_by_role,
    read_bytes,
    run_all,
)
from xpuquant.conversion.verify.health import Counter
from xpuquant.conversion.verify.verdict import CONTRADICTIONS, Checked, Health, contradiction
from xpuquant.formats.layouts.base import Stored
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import row_blocks


def check_recorded(
    record: Mapping[str, Any], repo: Repo, jobs: int, progress: Progress
) -> tuple[list[Checked], dict[str, Health], int]:
    """Compare the decoded repo with the digests recorded at conversion.

    Args:
        record: xpuquant.json.

    Returns:
        As `check_exact`, of what has a digest; and how many modules and tensors have none.
    """
    modules: Mapping[str, Any] = record.get("modules", {})
    tensors: Mapping[str, str] = record.get("tensors_sha256", {})

    def module(stored: Stored) -> tuple[Checked, Health | None]:
        entry = modules.get(stored.name, {})
        return _recorded_module(repo, stored, entry.get("roles", ()), *recorded(entry), progress)

    def plain(tensor: Tensor) -> tuple[Checked, Health | None]:
        digest, expected = _tensor_digest(repo, tensor, progress), tensors.get(tensor.name)
        error = None if expected in (None, digest) else "bytes differ from those converted"
        return Checked(tensor.name, 0, error, digest if expected else None), None

    calls = [partial(module, stored) for stored in repo.modules.values()]
    calls += [partial(plain, tensor) for tensor in repo.plain.values()]
    results = run_all(jobs, calls)
    known = [checked for checked, _ in results if checked.digest is not None or checked.error is not None]
    counted = {checked.name: health for checked, health in results if health is not None}
    return known, counted, len(results) - len(known)


def _recorded_module(
    repo: Repo, stored: Stored, roles: Sequence[str], kind: str, expected: str | None, progress: Progress
) -> tuple[Checked, Health | None]:
    name, stored = stored.name, replace(stored, load=Panels(stored.load))
    counter, digests, layout = Counter(stored.scheme.symmetric), list[MatrixDigest](), repo.layout(stored)
    try:
        matrices = matrices_by_role(repo, stored)
        experts: list[int | None] = [*sorted({at for _, at in matrices if at is not None})] or [None]
        roles = roles or list(dict.fromkeys(role for role, _ in matrices))
        for matrix in (find_matrix(matrices, role, expert) for role in roles for expert in experts):
            digests.append(digest := MatrixDigest(matrix, kind))
            for start, stop in row_blocks(matrix.N, matrix.K, 8, BLOCK_CODES):
                rows = in_rows(layout.decode(stored, matrix, start, stop))
                digest.update(rows)
                counter.update(rows)
        found = module_digest(stored, digests)
    except CONTRADICTIONS as fault:
        return Checked(name, len(digests), contradiction(fault)), None
    progress(sum(tensor.nbytes for tensor in stored.tensors.values()))
    error = None if expected in (None, found) else "decodes to something else than was converted"
    return Checked(name, len(digests), error, found if expected else None), counter.health


def _tensor_digest(repo: Repo, tensor: Tensor, progress: Progress) -> str:
    digest = hashlib.sha256()
    for start, stop in byte_blocks(tensor):
        data = read_bytes(repo, tensor, start, stop)
        digest.update(data.data)
        progress(data.size)
    return digest.hexdigest()
