"""Checking a converted folder before it is deployed: opens what it was converted from, verifies, writes the reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xpuquant.conversion.options import default_jobs
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.fetched import fetched_repo
from xpuquant.conversion.report.reports import check_report, write_reports
from xpuquant.conversion.runs.local import downloaded
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify.integrity import weigh
from xpuquant.conversion.verify.run import converted_from, select, verify
from xpuquant.conversion.verify.verdict import Demands, Verdict
from xpuquant.errors import Argument, EnvironmentFault, UsageError


def verify_folder(
    out: str,
    *,
    source: str | None = None,
    revision: str | None = None,
    backends: Sequence[str] = (),
    every: bool = False,
    require_exact: bool = False,
    require_backends: Sequence[str] = (),
    report: Path | None = None,
    jobs: int = 0,
    reporter: Reporter,
) -> Verdict:
    """Check a converted repo, which is only read.

    Args:
        out: a folder, or `owner/name` on the Hub, which is downloaded.
        source: folder or repo id it was converted from; None: check against the digests recorded at conversion.
        revision: of a `source` on the Hub; None: the commit it was converted from.
        backends: kernel libraries that have to run; none: all that run here do.
        every: run kernels on every matrix, all rows and all numbers of rows.
        require_exact: a value that was rounded or dequantized is a failure; without `source`, nothing is verified.
        require_backends: kernel libraries that have to compute every module.
        report: folder to write verify.json, .md, .html and .svg into.
        jobs: workers; 0: one per core, at most 8.

    Raises:
        UsageError: not a converted folder, not of this source, an unknown backend. DamagedError: an unsound source.
        EnvironmentFault: a backend of `backends` that does not run here, unreadable files, a report that cannot be
            written, network.
    """
    if report is not None and report.resolve() == Path(out).resolve():
        raise UsageError(Argument("report", str(report)), ": is what is checked; name another folder")
    if revision is not None and source is None:
        raise UsageError(Argument("revision"), " is one of the source's: give ", Argument("source"), " too")
    # Without a name all that run here do; one that must is among them anyway.
    select(require_backends, "require_backends")
    chosen = select((*backends, *require_backends) if backends else ())
    for backend in chosen:
        if backend.name in backends and (reason := backend.unavailable()) is not None:
            raise EnvironmentFault(Argument("backends", backend.name), f": {reason}")
    demands = Demands(require_exact, tuple(backends), tuple(require_backends))
    folder = fetched_repo(out, reporter)
    opened = None if source is None else _open(source, revision, folder, reporter)
    reporter.phase("verify", 2 * weigh(folder) if folder.is_dir() else 0)
    verdict = verify(
        folder, opened, chosen, every=every, jobs=jobs or default_jobs(), progress=reporter.advance, demands=demands
    )
    if opened is not None:
        verdict = replace(verdict, findings=(*verdict.findings, *check_report(Tree(folder), verdict)))
    if folder != Path(out):
        verdict = replace(verdict, repo=out)  # not the commit, as which its folder in the cache is named
    if report is not None:
        try:
            tree = Tree(report)
            tree.make()
            write_reports(tree, verdict)
        except OSError as error:
            raise EnvironmentFault(f"{report}: cannot be written ({error.strerror})") from error
    return verdict


def _open(name: str, revision: str | None, out: Path, reporter: Reporter) -> Source:
    """The source, with its weights here; a repository on the Hub at the commit it was converted from."""
    options, repo, commit = converted_from(out)
    opened = open_source(name, revision or (commit if name == repo else None))
    return downloaded(opened, options, reporter)
