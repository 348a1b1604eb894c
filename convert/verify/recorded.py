"""Exactness without the source: the decoded repo against the digests recorded when it was compared with the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from xpuquant.conversion.verify.column_cache import ColumnCache
from xpuquant.conversion.verify.context import Check
from xpuquant.conversion.verify.digests import KIND, MatrixDigest, digest_in, module_digest
from xpuquant.conversion.verify.exactness import (
    BLOCK_CODES,
    find_matrix,
    in_rows,
    matrices_by_role,
    matrices_in,
    tensor_digest,
)
from xpuquant.conversion.verify.proof import Checked, Claim, Rounding
from xpuquant.conversion.verify.sanity import SanityCount
from xpuquant.conversion.verify.threads import Call
from xpuquant.conversion.verify.verdict import CONTRADICTIONS, Sanity, contradiction
from xpuquant.formats.layouts.base import Stored
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import row_blocks


def check_recorded(record: Mapping[str, Any], check: Check) -> tuple[list[Checked], dict[str, Sanity]]:
    """Compare the decoded repo with the digests recorded at conversion. They were taken in the pass that compared every
    value with the source, so equal digests mean equal values.

    Args:
        record: xpuquant.json.

    Returns:
        As `check_exact`. What has no recorded digest is `NOT_CHECKED`.
    """
    repo = check.repo
    modules: Mapping[str, Any] = record.get("modules", {})
    tensors: Mapping[str, str] = record.get("tensors_sha256", {})
    dequantized = {name for entry in modules.values() for name in entry.get("dequantized", ())}

    def module(stored: Stored) -> tuple[Checked, Sanity | None]:
        return _check_module_digest(stored, modules.get(stored.name, {}), check)

    def plain(tensor: Tensor) -> tuple[Checked, Sanity | None]:
        digest, expected = tensor_digest(repo, tensor, check.progress), tensors.get(tensor.name)
        error = None if expected in (None, digest) else "bytes differ from those converted"
        is_matrix = tensor.name in dequantized
        held = Claim.DEQUANTIZED if is_matrix else Claim.EXACT
        matrices = matrices_in(tensor) if is_matrix else 0
        return _recorded(tensor.name, matrices, error, digest if expected else None, held), None

    calls = [Call(partial(module, stored)) for stored in repo.modules.values()]
    calls += [Call(partial(plain, tensor)) for tensor in repo.plain.values()]
    results = check.run(calls)
    counted = {checked.name: sanity for checked, sanity in results if sanity is not None}
    return [checked for checked, _ in results], counted


def _recorded(
    name: str, matrices: int, error: str | None, digest: str | None, held: Claim, rounding: Rounding | None = None
) -> Checked:
    """What a comparison with a recorded digest shows. `digest` is None where there is none to compare with."""
    if digest is None and error is None:
        return Checked(name, matrices, None, None, Claim.NOT_CHECKED)
    return Checked(name, matrices, error, digest, Claim.RECORDED, rounding, held)


def _check_module_digest(stored: Stored, entry: Mapping[str, Any], check: Check) -> tuple[Checked, Sanity | None]:
    """One module against its digest.

    Args:
        entry: the module in xpuquant.json.
    """
    kind, expected = digest_in(entry)
    rounding = _rounding_in(entry)
    name, stored, repo = stored.name, replace(stored, load=ColumnCache(stored.load)), check.repo
    sanity, digests, layout = SanityCount(stored.scheme.symmetric), list[MatrixDigest](), repo.layout(stored)

    held = Claim.EXACT if rounding is None else Claim.ROUNDED

    def checked(error: str | None, digest: str | None = None) -> Checked:
        return _recorded(name, len(digests), error, digest, held, rounding)

    try:
        matrices = matrices_by_role(repo, stored)
        experts: list[int | None] = [*sorted({at for _, at in matrices if at is not None})] or [None]
        roles = entry.get("roles", ()) or dict.fromkeys(role for role, _ in matrices)
        for matrix in (find_matrix(matrices, role, expert) for role in roles for expert in experts):
            digests.append(digest := MatrixDigest(matrix, kind))
            for start, stop in row_blocks(matrix.N, matrix.K, 8, BLOCK_CODES):
                show = layout.as_packed if kind == KIND else layout.decode
                rows = in_rows(show(stored, matrix, start, stop))
                digest.update(rows)
                sanity.update(rows)
        found = module_digest(stored, digests)
    except CONTRADICTIONS as fault:
        return checked(contradiction(fault)), None
    check.progress(sum(tensor.nbytes for tensor in stored.tensors.values()))
    error = None if expected in (None, found) else "decodes to something else than was converted"
    return checked(error, found if expected else None), sanity.sanity


def _rounding_in(entry: Mapping[str, Any]) -> Rounding | None:
    """What rounding changed when a module was converted, by its entry in xpuquant.json."""
    found = entry.get("rounding")
    return None if found is None else Rounding(found["dtype"], found["scales"], found["changed"], found["largest"])
