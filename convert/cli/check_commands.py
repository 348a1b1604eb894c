"""The commands that check: `verify`, `diff`, `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xpuquant.errors import EnvironmentFault, UsageError, VerificationError

if TYPE_CHECKING:
    from xpuquant.conversion.progress import Reporter
    from xpuquant.conversion.sources.base import Source
    from xpuquant.conversion.verify.verdict import Verdict

_JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
_Jobs = Annotated[int, typer.Option(min=0, max=256, help="Workers (default: one per core, at most 8).")]


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `convert` wrote.")],
    source: Annotated[
        str | None,
        typer.Option(help="What it was converted from. Without it: the digests recorded at conversion."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a --source on the Hub.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Kernel library to run; repeat it for more (default: all that run here)."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run kernels on every matrix, all rows and all M.")] = False,
    report: Annotated[Path | None, typer.Option(help="Folder to write verify.json, .md, .html and .svg into.")] = None,
    jobs: _Jobs = 0,
    as_json: _JsonFlag = False,
) -> None:
    """Check a converted folder before it is deployed. Exit code 0: it may be; 1: it may not. OUT is only read."""
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.cli.verdict_answer import answer
    from xpuquant.conversion.report.reports import write_reports
    from xpuquant.conversion.verify.integrity import weigh
    from xpuquant.conversion.verify.run import select
    from xpuquant.conversion.verify.run import verify as check

    output = Output(as_json)
    if report is not None and report.resolve() == out.resolve():
        raise UsageError("--report: OUT itself is what is checked; name another folder")
    chosen = select(backend or [])
    with output.progress() as progress:
        opened = None if source is None else _open(source, revision, out, progress)
        progress.phase("verify", 2 * weigh(out) if out.is_dir() else 0)
        verdict = check(out, opened, chosen, every=every, jobs=jobs or _cores(), progress=progress.advance)
    if report is not None:
        try:
            report.mkdir(parents=True, exist_ok=True)
            write_reports(report, verdict)
        except OSError as error:
            raise EnvironmentFault(f"{report}: cannot be written ({error.strerror})") from error
    output.answer(answer(verdict, report))
    _exit(verdict, out)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder with safetensors, or a .safetensors file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Compare bytes, or only names, dtypes and shapes.")
    ] = True,
    as_json: _JsonFlag = False,
) -> None:
    """Compare the tensors of two repos: names, dtypes, shapes, values. Exit code 0: equal; 1: different."""
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.diff import answer, compare

    output = Output(as_json)
    with output.progress() as progress:
        difference = compare(Path(a), Path(b), values=values, reporter=progress)
    output.answer(answer(difference))
    if not difference.equal:
        raise VerificationError(f"{a} and {b} differ")


def doctor(as_json: _JsonFlag = False) -> None:
    """Which kernel backends run here, why others do not, and what would change that."""
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.doctor import answer, examine

    Output(as_json).answer(answer(examine()))


def _open(name: str, revision: str | None, out: Path, reporter: Reporter) -> Source:
    """The source, with its weights here; a repository on the Hub at the commit it was converted from."""
    from xpuquant.conversion.runs.local import downloaded
    from xpuquant.conversion.sources.open import open_source
    from xpuquant.conversion.verify.run import converted_from

    options, repo, commit = converted_from(out)
    opened = open_source(name, revision or (commit if name == repo else None))
    return downloaded(opened, options, reporter)


def _cores() -> int:
    import os

    return max(1, min(8, len(os.sched_getaffinity(0))))


def _exit(verdict: Verdict, out: Path) -> None:
    """Raises VerificationError where the verdict is a failure."""
    if not verdict.passed:
        first = verdict.failing[0]
        more = len(verdict.failing) - 1
        also = f" (and {more} more)" if more else ""
        raise VerificationError(f"{out} must not be deployed: {first.line()}{also}")
