"""The commands that look and check: `inspect`, `verify`, `diff`, `doctor`. They write nothing but reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xpuquant.conversion.cli import arguments as args
from xpuquant.errors import Argument, NotVerifiedError, UsageError, VerificationError

if TYPE_CHECKING:
    from xpuquant.conversion.verify.verdict import Verdict


def inspect(
    source: args.SourceArgument,
    on_unsupported: args.OnUnsupportedOption = "refuse",
    tensor_parallel: args.TensorParallelOption = None,
    context: args.ContextOption = 8192,
    revision: args.RevisionOption = None,
    as_json: args.JsonOption = False,
    quiet: args.QuietOption = False,
    verbose: args.VerboseOption = False,
) -> None:
    """What is it, will it convert, which GPUs hold it. Also how big, and which kernel per module: from headers only. Of
    a converted repo: from what, verified how, what serves it."""
    from xpuquant.conversion.cli.inspect_answers import inspected
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.inspection import RANKS, look_at
    from xpuquant.conversion.options import Options

    output = Output(as_json, quiet, verbose)
    options = Options(on_unsupported=on_unsupported)
    found = look_at(source, revision, options, _numbers(tensor_parallel) or RANKS, context)
    output.answer(inspected(found))


def verify(
    out: args.OutCheckedArgument,
    source: args.CheckedSourceOption = None,
    revision: args.CheckedRevisionOption = None,
    backends: args.BackendsOption = None,
    every: args.EveryOption = False,
    require_exact: args.RequireExactOption = False,
    require_backends: args.RequireBackendsOption = None,
    report: args.ReportOption = None,
    jobs: args.JobsOption = 0,
    as_json: args.JsonOption = False,
    quiet: args.QuietOption = False,
    verbose: args.VerboseOption = False,
) -> None:
    """Check a converted folder before it is deployed. Exit code 0: verified; 1: failed; 5: not verified, because
    something that had to be checked was not. OUT is only read."""
    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.runs.checking import verify_folder
    from xpuquant.conversion.verify.verdict import Outcome

    output = Output(as_json, quiet, verbose)
    with output.progress() as progress:
        verdict = verify_folder(
            out,
            source=source,
            revision=revision,
            backends=backends or (),
            every=every,
            require_exact=require_exact,
            require_backends=require_backends or (),
            report=report,
            jobs=jobs,
            reporter=progress,
        )
    if as_json or not quiet or verdict.outcome is Outcome.VERIFIED:  # else the error is the answer in one line
        output.answer(answers.verified(verdict, report))
    _raise_unless_verified(verdict, out)


def diff(
    a: args.FirstArgument,
    b: args.SecondArgument,
    values: args.ValuesOption = True,
    decode: args.DecodeOption = True,
    as_json: args.JsonOption = False,
    quiet: args.QuietOption = False,
    verbose: args.VerboseOption = False,
) -> None:
    """Compare the tensors of two repos, by bytes and by value. Names, dtypes and shapes too; what the two store
    otherwise is decoded. Exit code 0: equal, at least in value; 1: different."""
    from xpuquant.conversion.cli.diff_answers import compared
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.diff import compare

    output = Output(as_json, quiet, verbose)
    with output.progress() as progress:
        difference = compare(a, b, values=values, decode=decode, reporter=progress)
    output.answer(compared(difference))
    if not difference.same_values:
        raise VerificationError(f"{a} and {b} differ")


def explain(
    source: args.SourceArgument,
    module: args.ModuleArgument,
    on_unsupported: args.OnUnsupportedOption = "refuse",
    revision: args.RevisionOption = None,
    as_json: args.JsonOption = False,
    quiet: args.QuietOption = False,
    verbose: args.VerboseOption = False,
) -> None:
    """One module: its tensors, decisions, layout and kernel. The decisions are those made from its tensors. Of a
    converted repo: what it was, and what it is stored as."""
    from xpuquant.conversion.cli.explain_answers import explained, stored_module
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.explanation import Explanation, look_into
    from xpuquant.conversion.options import Options

    output = Output(as_json, quiet, verbose)
    found = look_into(source, revision, module, Options(on_unsupported=on_unsupported))
    output.answer(explained(found) if isinstance(found, Explanation) else stored_module(found))


def formats(
    as_json: args.JsonOption = False, quiet: args.QuietOption = False, verbose: args.VerboseOption = False
) -> None:
    """What is read and what is written."""
    from xpuquant.conversion.cli.explain_answers import formats_known
    from xpuquant.conversion.cli.output import Output
    from xpuquant.formats.layouts import layouts_by_name
    from xpuquant.formats.readers import READERS

    Output(as_json, quiet, verbose).answer(formats_known(READERS, list(layouts_by_name().values())))


def doctor(
    as_json: args.JsonOption = False, quiet: args.QuietOption = False, verbose: args.VerboseOption = False
) -> None:
    """Which kernel backends run here, and why others do not. Says what would change that."""
    from xpuquant.conversion.cli import answers
    from xpuquant.conversion.cli.output import Output
    from xpuquant.conversion.doctor import examine

    Output(as_json, quiet, verbose).answer(answers.diagnosed(examine()))


def _raise_unless_verified(verdict: Verdict, out: str) -> None:
    """Raises VerificationError where the verdict is a failure, NotVerifiedError where something was not checked."""
    if verdict.failing:
        first = verdict.failing[0]
        more = len(verdict.failing) - 1
        also = f" (and {more} more)" if more else ""
        raise VerificationError(f"{out} must not be deployed: {first.line()}{also}")
    if verdict.gaps:
        raise NotVerifiedError(f"{out} is not verified: {'; '.join(gap.line() for gap in verdict.gaps)}")


def _numbers(words: Sequence[str] | None) -> tuple[int, ...]:
    """`--tp 2,4 --tp 8` as numbers.

    Raises:
        UsageError: not numbers of GPUs.
    """
    numbers: list[int] = []
    for word in ",".join(words or ()).split(",") if words else ():
        if not word.strip().isdecimal() or not int(word):
            raise UsageError(Argument("tensor_parallel", word), ": want numbers of GPUs, like 2 or 2,4")
        numbers.append(int(word))
    return tuple(numbers)
