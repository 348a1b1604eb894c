"""The command line. Each command gathers its arguments, calls the library, and hands an `Answer` to the sink.

Exit codes: 0 ok, 1 failed verification, 2 usage or unconvertible, 3 damaged input, 4 environment, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from xpuquant.convert import cli_push, cli_verify
from xpuquant.errors import EnvironmentFault, Interrupted, UsageError, XpuquantError

INTERNAL_ERROR = 70
"""sysexits.h EX_SOFTWARE: a bug of ours, not of the user's input."""

app = typer.Typer(
    name="xpuquant",
    help="Convert quantized LLM checkpoints, once and exactly, into the layouts Intel GPU kernels read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_JOBS = max(1, min(8, len(os.sched_getaffinity(0))))
"""A worker per core; beyond 8 the disk is the limit."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Jobs = Annotated[int, typer.Option(min=1, max=256, help="Workers (default: one per core, at most 8).")]
SourceName = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder with a quantized checkpoint, or OWNER/NAME on the Hub.")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of SRC on the Hub (default: main).")
]
LayoutName = Annotated[
    str, typer.Option("--layout", help="Layout to write: xpu, or compressed-tensors, which stock loaders read.")
]
OnUnsupported = Annotated[
    str, typer.Option(help="Modules no XPU kernel takes: refuse, or dequantize them to bf16 (lossy).")
]

ScaleDtype = Annotated[
    str, typer.Option(help="keep the source's, or round scales to float16, bfloat16, float32.")
]
MaxShardSize = Annotated[str, typer.Option(help="Largest output file, e.g. 5GB or 512MiB.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Check every value of the output.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        from xpuquant import __version__

        sys.stdout.write(f"xpuquant {__version__}\n")
        raise typer.Exit


@app.command()
def convert(
    source: SourceName,
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Folder to write (default: SRC-xpu).")
    ] = None,
    layout: LayoutName = "xpu",
    scale_dtype: ScaleDtype = "keep",
    on_unsupported: OnUnsupported = "refuse",
    max_shard_size: MaxShardSize = "5GB",
    jobs: Jobs = DEFAULT_JOBS,
    verify: Verify = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion in OUT.")] = False,
    ray: Annotated[str, typer.Option(help="Run on a Ray cluster: its address, auto, or local.")] = "",
    part: Annotated[
        str, typer.Option("--shard", help="Make only part i/n; `finish` puts parts together.")
    ] = "",
    revision: Revision = None,
    push_to: Annotated[
        str | None, typer.Option(metavar="REPO", help="Publish the result on the Hub as OWNER/NAME.")
    ] = None,
    private: cli_push.Private = True,
    branch: cli_push.Branch = None,
    pr: cli_push.PullRequest = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Keep only the shards of SRC in use; with --push-to, of the output too."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Convert, verify and write a ready-to-load repo. Run it again to resume after an interruption."""
    from functools import partial

    from xpuquant.convert import conversion, execute, summary
    from xpuquant.convert.journal import check_output
    from xpuquant.convert.options import Options, parse_dtype, parse_size
    from xpuquant.convert.output import Output
    from xpuquant.convert.plan import make_plan
    from xpuquant.convert.source import Source, downloaded, open_source

    options = Options(layout, parse_dtype(scale_dtype), on_unsupported, parse_size(max_shard_size))
    output = Output(as_json)
    destination = cli_push.Destination(push_to, private, branch, pr) if push_to else None
    opened: Source = open_source(source, revision, stream)
    if destination is not None:
        destination.check_source(opened.name)
    if dry_run:
        output.answer(summary.planned(make_plan(opened.checkpoint, options), opened, jobs))
        return
    target = out or conversion.default_output(source, layout)
    if destination is not None and not force and cli_push.is_converted(target, opened, options):
        # An earlier run came as far as publishing.
        with output.progress() as progress:
            pushed = cli_push.push_folder(target, destination, progress)
        output.answer(cli_push.pushed_answer(pushed))
        return
    if stream:
        if ray or part:
            raise UsageError(
                "--stream makes one shard after the other; it goes with neither --ray nor --shard"
            )
        work = cli_push.Streaming(opened, target, options, destination, jobs, verify, force)
        output.answer(cli_push.stream(work, output, command_line()))
        return
    check_output(target, force or bool(part))
    with output.progress() as progress:
        opened = downloaded(opened, options, progress)
    if part:
        from xpuquant.convert import parts

        with output.progress() as progress:
            output.answer(parts.convert_part(opened, target, options, parts.parse_part(part), jobs, progress))
        return
    executor: conversion.Executor = execute.execute
    if ray:
        from xpuquant.convert.ray_executor import execute_on_ray

        executor = partial(execute_on_ray, address=ray)
    with output.progress() as progress:
        result = conversion.convert(
            opened,
            target,
            options,
            jobs=jobs,
            verify=verify,
            force=force,
            reporter=progress,
            command=command_line(),
            executor=executor,
        )
        answer = summary.converted(result)
        if destination is not None:
            pushed = cli_push.push_folder(target, destination, progress)
            answer = cli_push.together(answer, cli_push.pushed_answer(pushed))
    output.answer(answer)


app.command()(cli_push.push)
app.command()(cli_verify.verify)
app.command()(cli_verify.diff)
app.command()(cli_verify.doctor)


@app.command()
def finish(
    source: SourceName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder the parts were written to.")],
    layout: LayoutName = "xpu",
    scale_dtype: ScaleDtype = "keep",
    on_unsupported: OnUnsupported = "refuse",
    max_shard_size: MaxShardSize = "5GB",
    jobs: Jobs = DEFAULT_JOBS,
    verify: Verify = True,
    revision: Revision = None,
    as_json: JsonFlag = False,
) -> None:
    """Put the parts of `convert --shard i/n` together: check that all are there, verify, publish."""
    from xpuquant.convert import conversion, parts, summary
    from xpuquant.convert.options import Options, parse_dtype, parse_size
    from xpuquant.convert.output import Output
    from xpuquant.convert.source import downloaded, open_source

    options = Options(layout, parse_dtype(scale_dtype), on_unsupported, parse_size(max_shard_size))
    output = Output(as_json)
    with output.progress() as progress:
        opened = downloaded(open_source(source, revision), options, progress)
        parts.adopt_parts(opened, options, out)
        result = conversion.convert(
            opened, out, options, jobs=jobs, verify=verify, reporter=progress, command=command_line()
        )
    output.answer(summary.converted(result))


@app.command()
def inspect(
    source: SourceName,
    on_unsupported: OnUnsupported = "refuse",
    tp: Annotated[
        list[int] | None, typer.Option(min=1, help="Tensor-parallel sizes to check (repeatable).")
    ] = None,
    revision: Revision = None,
    as_json: JsonFlag = False,
) -> None:
    """What is it, will it convert, how big, which kernel per module: from headers only."""
    from xpuquant.convert import inspect as inspection
    from xpuquant.convert.options import Options
    from xpuquant.convert.output import Output
    from xpuquant.convert.source import open_source

    options = Options(on_unsupported=on_unsupported)
    Output(as_json).answer(inspection.inspect(open_source(source, revision), options, tuple(tp or (2, 4, 8))))


def command_line() -> str:
    """The command as typed, for the card."""
    import shlex

    return shlex.join(["xpuquant", *sys.argv[1:]])


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Errors become one line on standard error."""
    signal.signal(signal.SIGTERM, _terminate)
    # Progress and errors are ours to print; huggingface_hub reads these when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions:
        # numpy's remarks on a stranger's scales (overflow, NaN): they are data here, and compared bit by bit.
        warnings.simplefilter("ignore")
    try:
        code: Any = app(args=list(arguments), standalone_mode=False)
    except Exception as error:
        return _failed(error)
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    except SystemExit:
        # Standard output is closed (`| head`): nobody is left to tell.
        return EnvironmentFault.exit_code
    if code == Interrupted.exit_code:
        return _failed(Interrupted("interrupted; run the same command again to resume"))
    return code if isinstance(code, int) else 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _failed(error: Exception) -> int:
    from xpuquant.convert.output import Output

    shown, code = explain(error)
    Output().error(shown)
    if os.environ.get("XPUQUANT_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    return code


def explain(error: Exception) -> tuple[str, int]:
    """(one line, exit code) for any exception."""
    for kind, sentence in _SENTENCES:
        if isinstance(error, kind):
            return sentence(error)
    hint = "please report it; XPUQUANT_TRACEBACK=1 shows where"
    return f"internal error: {type(error).__name__}: {error} ({hint})", INTERNAL_ERROR


def _click(error: Any) -> tuple[str, int]:
    text = error.format_message() if hasattr(error, "format_message") else "aborted"
    return text, 2 if hasattr(error, "format_message") else Interrupted.exit_code


def _sentences() -> list[tuple[type[Exception], Callable[[Any], tuple[str, int]]]]:
    # typer carried click as a dependency and now as its own copy; its errors know their base either way.
    base = next(
        kind for kind in typer.BadParameter.__mro__ if kind.__name__ in ("ClickException", "TyperException")
    )
    return [
        (XpuquantError, lambda error: (str(error), error.exit_code)),
        (base, _click),
        (
            typer.Abort,
            lambda error: ("interrupted; run the same command again to resume", Interrupted.exit_code),
        ),
        (MemoryError, lambda error: ("out of memory; try --jobs 1", EnvironmentFault.exit_code)),
        (
            OSError,
            lambda error: (
                f"{error.filename or 'I/O'}: {error.strerror or error}",
                EnvironmentFault.exit_code,
            ),
        ),
        (ImportError, lambda error: (f"{error}; is the extra installed?", EnvironmentFault.exit_code)),
    ]


_SENTENCES = _sentences()
