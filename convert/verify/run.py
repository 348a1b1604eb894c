"""`verify`: may this be deployed? Integrity, exactness, kernels and sanity, put together.

What flows: the files are hashed; the repo is opened; every module is decoded once, which compares it with the source
(or with the digests recorded at conversion), counts what sanity warns of, and leaves the matrices proven for the
kernels to be compared on. A failure does not stop the rest: a report that names everything is worth more than the first
error. The repo itself is only read.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.converted import Repo
from xpuquant.conversion.repo.journal import PROVENANCE
from xpuquant.conversion.sources.base import Source, read_slice
from xpuquant.conversion.sources.repo_files import read_json
from xpuquant.conversion.verify.agreement import check_kernels
from xpuquant.conversion.verify.exactness import (
    check_exact,
    find_matrix,
    matrices_by_role,
)
from xpuquant.conversion.verify.expected import Rows, Subject
from xpuquant.conversion.verify.health import findings
from xpuquant.conversion.verify.integrity import Integrity, check_integrity
from xpuquant.conversion.verify.recorded import check_recorded
from xpuquant.conversion.verify.verdict import (
    CONTRADICTIONS,
    REFERENCE,
    Agreement,
    Checked,
    Finding,
    Health,
    Verdict,
)
from xpuquant.errors import DamagedError, UsageError, XpuquantError, one_line
from xpuquant.formats.dtypes import FLOATS, numpy_dtype
from xpuquant.formats.layouts.base import Stored
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.kernels import backends
from xpuquant.kernels.base import Backend

DURING_CONVERT = (REFERENCE, "onednn")
"""Backends `convert` runs: those that cost no second of start-up and no gigabyte."""


def select(names: Sequence[str]) -> list[Backend]:
    """Backends by name, the reference always among them; all of them where `names` is empty.

    Raises:
        UsageError: an unknown name.
    """
    known = backends()
    for name in names:
        if name not in known:
            raise UsageError(f"--backend {name}: want one of {', '.join(known)}")
    return [backend for name, backend in known.items() if not names or name in names or name == REFERENCE]


def recorded(folder: Path) -> tuple[Options, str | None, str | None]:
    """(options, source's name, its commit) of a conversion, as far as they can be read: before they are checked."""
    try:
        record = read_json(folder / PROVENANCE)
        source = record["source"]
        return Options(**record["options"]), source["name"], source["revision"]
    except (XpuquantError, KeyError, TypeError):
        return Options(), None, None


def verify(
    folder: Path,
    source: Source | None,
    chosen: Sequence[Backend],
    *,
    every: bool = False,
    jobs: int = 1,
    progress: Progress = lambda _: None,
) -> Verdict:
    """Check a finished repo.

    Args:
        source: what it was converted from; None checks against the digests recorded at conversion.
        chosen: backends to run; see `select`.
        every: run kernels on every matrix, not on one of each shape and a sample of each module.

    Raises:
        UsageError: not a converted repo, or not of this source. EnvironmentFault: unreadable files.
        DamagedError: the source is not sound.
    """
    integrity = check_integrity(folder, jobs, progress)
    blank = Verdict(
        repo=folder.resolve().name,
        producer=str((integrity.record or {}).get("producer", "")),
        findings=integrity.findings,
        files=integrity.files,
        unavailable=_unavailable(chosen),
    )
    if integrity.repo is None or integrity.record is None:
        return blank
    try:
        if source is not None:
            return _with_source(blank, integrity.record, integrity.repo, source, chosen, every, jobs, progress)
        return _without(blank, integrity, integrity.repo, chosen, every, jobs, progress)
    finally:
        integrity.repo.reader.close()


def verify_staged(
    plan: Plan, source: Source, repo: Repo, name: str, producer: str, jobs: int, progress: Progress
) -> Verdict:
    """Check what `convert` is about to publish; its sha256 have just been computed from the same bytes.

    Raises:
        DamagedError: the tensors written are not those planned.
    """
    chosen = select(DURING_CONVERT)
    blank = Verdict(repo=name, producer=producer, unavailable=_unavailable(chosen))
    with ThreadPoolExecutor(1, "kernels") as beside:
        kernels = partial(check_kernels, _subjects(plan, source, repo), chosen, full=False, every=False)
        # Few matrices, in one thread: it would otherwise be alone at the end.
        agreements = beside.submit(kernels) if jobs > 1 else None
        exact, health = check_exact(plan, source, repo, jobs, progress)
        ran = kernels() if agreements is None else agreements.result()
    return _complete(
        blank, repo, ran, exact, health, basis=f"every value of the source, {_shown(source)}", before=sizes(source)
    )


def _with_source(
    blank: Verdict,
    record: Mapping[str, Any],
    repo: Repo,
    source: Source,
    chosen: Sequence[Backend],
    every: bool,
    jobs: int,
    progress: Progress,
) -> Verdict:
    try:
        plan = make_plan(source.checkpoint, Options(**record["options"]))
    except (TypeError, KeyError):
        broken = Finding("integrity", "xpuquant.json", "its options cannot be read")
        return replace(blank, findings=(*blank.findings, broken))
    try:
        exact, health = check_exact(plan, source, repo, jobs, progress)
    except DamagedError as error:
        other = Finding("exactness", _shown(source), f"{error}; is this the source it was converted from?")
        return replace(blank, findings=(*blank.findings, other))
    source.check_unchanged()
    ran = check_kernels(_subjects(plan, source, repo), chosen, full=True, every=every)
    return _complete(
        blank, repo, ran, exact, health, basis=f"every value of the source, {_shown(source)}", before=sizes(source)
    )


def _without(
    blank: Verdict,
    integrity: Integrity,
    repo: Repo,
    chosen: Sequence[Backend],
    every: bool,
    jobs: int,
    progress: Progress,
) -> Verdict:
    assert integrity.record is not None
    exact, health, missing = check_recorded(integrity.record, repo, jobs, progress)
    basis = "the digests recorded at conversion, when every value was compared with the source"
    if missing:
        what = f"{missing} modules and tensors have no recorded digest (--no-verify); pass --source to check them"
        blank = replace(blank, findings=(*blank.findings, Finding("exactness", blank.repo, what, fails=False)))
        basis = "" if not exact else basis
    before = integrity.record.get("source", {}).get("bytes_by_dtype", {})
    ran = check_kernels(_stored_subjects(repo), chosen, full=True, every=every)
    return _complete(blank, repo, ran, exact, health, basis=basis, before=before)


def _complete(
    blank: Verdict,
    repo: Repo,
    kernels: Sequence[Agreement],
    exact: Sequence[Checked],
    health: Mapping[str, Health],
    *,
    basis: str,
    before: Mapping[str, int],
) -> Verdict:
    proven = bool(exact) and all(checked.error is None for checked in exact)
    return replace(
        blank,
        basis=basis,
        exact=exact,
        kernels=kernels,
        health=health,
        findings=(*blank.findings, *findings(health, proven)),
        schemes={name: stored.scheme.label() for name, stored in repo.modules.items()},
        before=before,
        after=_by_dtype((tensor.dtype, tensor.nbytes) for tensor in repo.tensors.values()),
    )


def _subjects(plan: Plan, source: Source, repo: Repo) -> Iterator[Subject]:
    """Every matrix, to be compared with the source's."""
    for planned in plan.modules:
        stored = repo.modules.get(planned.conversion.name)
        if stored is None or planned.conversion.scheme != stored.scheme:
            continue
        try:
            matrices = matrices_by_role(repo, stored)
            for role, expert, weight in planned.weights:
                matrix = find_matrix(matrices, role, expert)
                layout = repo.layout(stored)
                taken = layout.for_kernels(stored)
                if taken is not None and (matrix.N, matrix.K) == (weight.N, weight.K):
                    yield Subject(taken, layout, matrix, _source_rows(weight, source, stored.scheme))
        except CONTRADICTIONS:
            continue  # exactness has reported it


def _source_rows(weight: Weight, source: Source, scheme: Scheme) -> Rows:
    def rows(start: int, stop: int) -> Decoded:
        recipe = weight.decoded(start, stop)
        decoded = recipe.build([read_slice(source, part) for part in recipe.inputs])
        if scheme.scale_dtype not in FLOATS:
            return decoded
        # Scales that were rounded because the user asked for it are the truth from then on; exactness has
        # compared the rounding itself.
        return replace(decoded, scale=decoded.scale.astype(numpy_dtype(scheme.scale_dtype)))

    return rows


def _stored_subjects(repo: Repo) -> Iterator[Subject]:
    """Every matrix, to be compared with its own decoded form, whose digest has been compared."""
    for stored in repo.modules.values():
        try:
            matrices = repo.layout(stored).matrices(stored)
        except CONTRADICTIONS:
            continue
        layout = repo.layout(stored)
        taken = layout.for_kernels(stored)
        for matrix in matrices if taken is not None else ():
            yield Subject(taken or stored, layout, matrix, _stored_rows(repo, stored, matrix))


def _stored_rows(repo: Repo, stored: Stored, matrix: Any) -> Rows:
    return lambda start, stop: repo.layout(stored).decode(stored, matrix, start, stop)


def _unavailable(chosen: Sequence[Backend]) -> dict[str, str]:
    missing = {backend.name: backend.unavailable() for backend in chosen}
    return {name: one_line(reason) for name, reason in missing.items() if reason is not None}


def _shown(source: Source) -> str:
    """A source without this machine's folders."""
    return source.name.rstrip("/").rpartition("/")[2] if source.revision is None else source.name


def sizes(source: Source) -> dict[str, int]:
    """dtype → bytes of a source's tensors."""
    return _by_dtype((tensor.dtype, tensor.nbytes) for tensor in source.checkpoint.tensors.values())


def _by_dtype(tensors: Iterator[tuple[str, int]]) -> dict[str, int]:
    total: Tally[str] = Tally()
    for dtype, nbytes in tensors:
        total[dtype] += nbytes
    return dict(sorted(total.items(), key=lambda entry: -entry[1]))
