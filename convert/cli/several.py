"""`convert --from FILE`: several conversions, and a table of them at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import typer

from xpuquant.conversion.cli import answers
from xpuquant.conversion.cli.output import Answer, Output
from xpuquant.conversion.cli.plan_answers import planned
from xpuquant.conversion.cli.tables import TextTable
from xpuquant.conversion.results import Converted, Planned
from xpuquant.conversion.runs.request import ConvertRequest, convert, plan_only
from xpuquant.conversion.runs.several import Attempted, check_outputs, try_each
from xpuquant.conversion.sizes import counted, duration, size
from xpuquant.values import frozen


@frozen
class _Ended:
    """One of them.

    error    the line that says why it failed; empty where it did not
    code     exit code that it would have had alone
    seconds  that it took
    """

    tried: Attempted[Converted | Planned]
    error: str
    code: int
    seconds: float


def convert_several(requests: Sequence[ConvertRequest], output: Output, *, dry_run: bool) -> None:
    """Convert, or only plan, one after the other.

    Raises:
        UsageError: two would write the same folder. typer.Exit: some failed; with the exit code of the first of them.
    """
    check_outputs(requests)

    def one(request: ConvertRequest) -> Converted | Planned:
        output.note(f"{requests.index(request) + 1} of {len(requests)}: {request.source}")
        if dry_run:
            return plan_only(request)
        with output.progress() as progress:
            return convert(request, progress)

    ended: list[_Ended] = []
    began = time.monotonic()
    for tried in try_each(requests, one):
        now = time.monotonic()
        error, code = ("", 0) if tried.error is None else _explained(tried.error)
        ended.append(_Ended(tried, error, code, now - began))
        began = now
    output.answer(_answer(ended, output))
    failed = [one for one in ended if one.code]
    if failed:
        first = failed[0]
        output.error(f"{len(failed)} of {len(ended)} failed; the first: {first.tried.request.source}: {first.error}")
        raise typer.Exit(first.code)


def _explained(error: Exception) -> tuple[str, int]:
    from xpuquant.conversion.cli.app import explain  # which imports the commands

    return explain(error, ["convert"])


def _answer(ended: Sequence[_Ended], output: Output) -> Answer:
    rows = [_row(one) for one in ended]
    done = sum(not one.code for one in ended)
    brief = f"{done} of {len(ended)} sources {'convert' if _only_planned(ended) else 'are converted'}"
    table = TextTable("", ("source", "output", "size", "took", "result"), rows)
    warned = [f"{one.tried.request.source}: {line}" for one in ended for line in _warned(one, output)]
    return Answer([table, brief], {"results": [_data(one, output) for one in ended]}, brief, warned)


def _warned(one: _Ended, output: Output) -> Sequence[str]:
    """What its conversion alone would have said, with `--quiet`, beside its line."""
    result = one.tried.result
    return answers.converted(result, output).warned if isinstance(result, Converted) else ()


def _only_planned(ended: Sequence[_Ended]) -> bool:
    return any(isinstance(one.tried.result, Planned) for one in ended)


def _row(one: _Ended) -> tuple[str, str, str, str, str]:
    request, result = one.tried.request, one.tried.result
    took = duration(one.seconds)
    if isinstance(result, Planned):
        return request.source, str(request.target), size(result.write_bytes), took, "converts"
    if result is None:
        return request.source, "", "", took, one.error
    said = (
        "was finished before" if not result.is_new else str(result.verdict.outcome if result.verdict else "converted")
    )
    if result.verdict is not None and result.verdict.warnings:
        said += f", {counted(len(result.verdict.warnings), 'warning')} in verify.md"
    return request.source, str(request.target), size(result.plan.write_bytes), took, said


def _data(one: _Ended, output: Output) -> dict[str, Any]:
    request, result = one.tried.request, one.tried.result
    found: dict[str, Any] = {}
    if isinstance(result, Converted):
        found = dict(answers.converted(result, output).data)
    elif result is not None:
        found = dict(planned(result, request.target, request.workers).data)
    return {
        "source": request.source,
        "out": str(request.target),
        "exit_code": one.code,
        "error": one.error or None,
        "seconds": round(one.seconds, 3),
        "conversion": found or None,
    }
