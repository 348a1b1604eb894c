"""`verify`: may this be deployed? Integrity, exactness, kernels and sanity, put together.

What flows: the files are hashed; the repo is opened; with a source, config and other files are compared with what the
conversion writes from it; every module is decoded once, which compares it with the source (or with the digests recorded
at conversion) and counts what sanity warns of; then kernels compute the matrices. A failure does not stop the rest: a
report that names everything is worth more than the first error. The repo itself is only read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.converted import ReadableRepo
from xpuquant.conversion.repo.journal import PRODUCER, PROVENANCE
from xpuquant.conversion.sources.base import Source, bytes_by_dtype, read_slice
from xpuquant.conversion.sources.repo_files import read_json
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify.agreement import check_kernels
from xpuquant.conversion.verify.contents import check_contents
from xpuquant.conversion.verify.context import Check, Origin
from xpuquant.conversion.verify.derivation import check_derived
from xpuquant.conversion.verify.exactness import (
    NOTHING,
    Known,
    check_exact,
    find_matrix,
    matrices_by_role,
)
from xpuquant.conversion.verify.expected import DecodeRows, Subject
from xpuquant.conversion.verify.integrity import check_integrity, check_unchanged, check_written
from xpuquant.conversion.verify.proof import Checked, Claim
from xpuquant.conversion.verify.recorded import check_recorded
from xpuquant.conversion.verify.rounding import odd, round_scales
from xpuquant.conversion.verify.sanity import findings
from xpuquant.conversion.verify.setting import model_of, setting_of
from xpuquant.conversion.verify.threads import pool_of
from xpuquant.conversion.verify.verdict import (
    CONTRADICTIONS,
    NO_DEMANDS,
    REFERENCE,
    Agreement,
    Demands,
    Finding,
    Sanity,
    Verdict,
)
from xpuquant.errors import Argument, DamagedError, UnsupportedError, UsageError, XpuquantError, one_line
from xpuquant.formats.layouts.base import Matrix, Stored
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.decoded import Decoded
from xpuquant.kernels import backends
from xpuquant.kernels.base import Backend

DURING_CONVERT = (REFERENCE, "onednn")
"""Backends `convert` runs: those that cost no second of start-up and no gigabyte."""


def select(names: Sequence[str], argument: str = "backends") -> list[Backend]:
    """Backends by name, the reference always among them; all of them where `names` is empty.

    Args:
        argument: of the public functions, that gave the names; for the message.

    Raises:
        UsageError: an unknown name.
    """
    known = backends()
    for name in names:
        if name not in known:
            raise UsageError(Argument(argument, name), f": want one of {', '.join(known)}")
    return [backend for name, backend in known.items() if not names or name in names or name == REFERENCE]


def converted_from(folder: Path) -> tuple[Options, str | None, str | None]:
    """(options, source's name, its commit) of a conversion, as far as they can be read: before they are checked."""
    try:
        record = read_json(Tree(folder), PROVENANCE)
        source = record["source"]
        return Options.from_dict(record["options"]), source["name"], source["revision"]
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
    demands: Demands = NO_DEMANDS,
) -> Verdict:
    """Check a finished repo.

    Args:
        source: what it was converted from; None checks against the digests recorded at conversion.
        chosen: backends to run; see `select`.
        every: run kernels on every matrix, not on one of each shape and a sample of each module.
        demands: what has to be shown besides.

    Raises:
        UsageError: not a converted repo, or not of this source. EnvironmentFault: unreadable files.
        DamagedError: the source is not sound.
    """
    integrity = check_integrity(folder, jobs, progress)
    verdict = Verdict(
        repo=folder.resolve().name,
        producer=str((integrity.record or {}).get("producer", "")),
        findings=integrity.findings,
        files=integrity.files,
        unavailable=_unavailable(chosen),
        demands=demands,
        setting=setting_of(chosen),
    )
    if integrity.record is None:
        return verdict
    origin = None
    if source is not None:
        try:
            options = Options.from_dict(integrity.record.get("options"))
        except UsageError as error:
            return _with_findings(verdict, Finding("integrity", PROVENANCE, str(error)))
        try:
            origin = Origin(make_plan(source.checkpoint, options), source)
        except UnsupportedError as error:
            what = one_line(f"with its options this source is not converted: {error}")
            return _with_findings(verdict, Finding("integrity", PROVENANCE, what))
        verdict = _with_findings(verdict, *check_contents(origin, Tree(folder), integrity.record))
    if integrity.repo is None:
        return verdict
    verdict = replace(verdict, model=model_of(read_json(Tree(folder), "config.json")))
    check = Check(integrity.repo, chosen, jobs, progress, full=True, every=every)
    try:
        if origin is None:
            verdict = _against_record(verdict, integrity.record, check)
        else:
            verdict = _against_source(verdict, origin, check, integrity.record)
    finally:
        integrity.repo.reader.close()
    return _with_findings(verdict, *check_unchanged(folder, integrity.known))


def verify_staged(origin: Origin, check: Check, name: str, producer: str, known: Known = NOTHING) -> Verdict:
    """Check what `convert` is about to publish; its sha256 have been taken from the same bytes as they were written.

    Args:
        check: its backends are not looked at: see `DURING_CONVERT`.
        name: the repo's name in the verdict.
        known: what was found before of the same bytes.

    Raises:
        DamagedError: the tensors written are not those planned.
    """
    check = replace(check, backends=select(DURING_CONVERT))
    # What loads the kernels is no work of many threads, and what computes with them is shared out like all else.
    with ThreadPoolExecutor(1, "kernels") as beside, pool_of(check.jobs) as pool:
        check = replace(check, pool=pool)

        def kernels() -> list[Agreement]:
            with check.stopping():
                return _kernels(_source_subjects(origin, check.repo), check)

        with check.stopping():
            running = beside.submit(kernels) if check.jobs > 1 else None
            verdict = verify_values(origin, check, name, producer, known)
            ran = kernels() if running is None else running.result()
    unavailable, setting = _unavailable(check.backends), setting_of(check.backends)
    return replace(verdict, unavailable=unavailable, kernels=ran, setting=setting)


def verify_values(origin: Origin, check: Check, name: str, producer: str, known: Known = NOTHING) -> Verdict:
    """The part of `verify_staged` that reads everything: headers, every value, and what is counted of them."""
    exact, sanity = check_exact(origin, check, known)
    verdict = Verdict(
        name,
        producer,
        shards=len(origin.plan.shards),
        findings=check_written(origin.plan.shards, check.repo.tree),
        model=model_of(origin.source.checkpoint.config),
        **_of_source(origin),
    )
    return _with_exactness(verdict, check.repo, exact, sanity)


def _against_source(verdict: Verdict, origin: Origin, check: Check, record: Mapping[str, Any]) -> Verdict:
    """A verdict on integrity, and the rest by comparing with the source, xpuquant.json too."""
    try:
        exact, sanity = check_exact(origin, check)
    except DamagedError as error:
        what = f"{error}; is this the source it was converted from?"
        return _with_findings(verdict, Finding("exactness", _shown(origin.source), what))
    origin.source.check_unchanged()
    verdict = _with_findings(verdict, *check_derived(origin, record, exact, check, PRODUCER))
    ran = _kernels(_source_subjects(origin, check.repo), check)
    return _with_exactness(replace(verdict, kernels=ran, **_of_source(origin)), check.repo, exact, sanity)


def _against_record(verdict: Verdict, record: Mapping[str, Any], check: Check) -> Verdict:
    """A verdict on integrity, and the rest by comparing with what xpuquant.json says."""
    exact, sanity = check_recorded(record, check)
    is_recorded, recorded = any(one.claim is Claim.RECORDED for one in exact), record.get("source", {})
    verdict = replace(
        verdict,
        basis="the digests recorded at conversion, in its own xpuquant.json" if is_recorded else "",
        before=recorded.get("bytes_by_dtype", {}),
        source=_at(str(recorded.get("name", "")), recorded.get("revision")),
        kernels=_kernels(_stored_subjects(check.repo), check),
    )
    return _with_exactness(verdict, check.repo, exact, sanity)


def _of_source(origin: Origin) -> dict[str, Any]:
    """What a verdict says of the source it was made with."""
    name = _shown(origin.source)
    return {
        "basis": f"every value of the source, {name}",
        "before": bytes_by_dtype(origin.source.checkpoint.tensors.values()),
        "source": _at(name, origin.source.revision),
    }


def _kernels(subjects: Iterable[Subject], check: Check) -> list[Agreement]:
    return check_kernels(subjects, check.backends, full=check.full, every=check.every, run=check.run)


def _with_findings(verdict: Verdict, *found: Finding) -> Verdict:
    return replace(verdict, findings=(*verdict.findings, *found))


def _with_exactness(
    verdict: Verdict, repo: ReadableRepo, exact: Sequence[Checked], sanity: Mapping[str, Sanity]
) -> Verdict:
    """The verdict with its part on exactness and sanity, and with what the repo holds."""
    found = {one.name: one for one in exact}
    strange = [Finding("exactness", one.name, what, fails=False) for one in exact if (what := _odd_rounding(one))]
    return replace(
        _with_findings(verdict, *strange, *findings(sanity, found)),
        exact=exact,
        sanity=sanity,
        schemes={name: stored.scheme.label() for name, stored in repo.modules.items()},
        after=bytes_by_dtype(repo.tensors.values()),
    )


def _odd_rounding(checked: Checked) -> str | None:
    if checked.error is not None or checked.rounding is None or checked.lost is not Claim.ROUNDED:
        return None
    return odd(checked.rounding)


def _source_subjects(origin: Origin, repo: ReadableRepo) -> Iterator[Subject]:
    """Every matrix, to be compared with the source's."""
    for planned in origin.plan.modules:
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
                    rows = _source_rows(weight, origin.source, planned.conversion.rounded)
                    yield Subject(taken, layout, matrix, rows)
        except CONTRADICTIONS:
            continue  # exactness has reported it


def _source_rows(weight: Weight, source: Source, rounded: str | None) -> DecodeRows:
    def rows(start: int, stop: int) -> Decoded:
        recipe = weight.decoded(start, stop)
        decoded = recipe.build([read_slice(source, part) for part in recipe.inputs])
        # Kernels are to compute the scales as they were rounded; what rounding changed, exactness has counted.
        return decoded if rounded is None else round_scales(decoded, rounded)

    return rows


def _stored_subjects(repo: ReadableRepo) -> Iterator[Subject]:
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


def _stored_rows(repo: ReadableRepo, stored: Stored, matrix: Matrix) -> DecodeRows:
    return lambda start, stop: repo.layout(stored).decode(stored, matrix, start, stop)


def _unavailable(chosen: Sequence[Backend]) -> dict[str, str]:
    missing = {backend.name: backend.unavailable() for backend in chosen}
    return {name: one_line(reason) for name, reason in missing.items() if reason is not None}


def _shown(source: Source) -> str:
    """A source without this machine's folders."""
    return source.name.rstrip("/").rpartition("/")[2] if source.revision is None else source.name


def _at(name: str, revision: object) -> str:
    """A repo with its commit."""
    return f"{name} at {revision}" if revision else name
