"""The command line: its commands, exit codes and errors. Commands are beside it.

Exit codes: 0 ok, 1 failed verification, 2 usage or unconvertible, 3 damaged input, 4 environment, 5 not verified,
130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from xpuquant.conversion.cli import check_commands, convert_commands
from xpuquant.conversion.cli.encoding import open_closed_streams, speak_plainly
from xpuquant.conversion.cli.spelling import Spelling
from xpuquant.conversion.write.memory import keep_freed_memory
from xpuquant.errors import EnvironmentFault, Interrupted, XpuquantError, lack_of

INTERNAL_ERROR = 70
"""sysexits.h EX_SOFTWARE: a bug of ours, not of the user's input."""

PROGRAM = "xpuquant"
"""What is typed, also where Python runs the package as a module."""


class _Light:
    """A command that looks only at values about which something can be wrong.

    Typer (0.29) has pydantic check each, defaults too, and text that stays text: to import that costs as much as all
    the rest of a command line.
    """

    def get_params(self, context: Any) -> list[Any]:
        """Typer's, which are asked for their values by `process_value`."""
        parameters: list[Any] = super().get_params(context)  # type: ignore[misc]
        for parameter in parameters:
            if not isinstance(parameter.process_value, partial):
                parameter.process_value = partial(_value, parameter, parameter.process_value)
        return parameters


def _value(parameter: Any, check: Callable[[Any, Any], Any], context: Any, value: Any) -> Any:
    """A parameter's value: as it is where nothing about it can be wrong, otherwise as Typer checks it."""
    wanted = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    if wanted is None or parameter.required or parameter.multiple or parameter.nargs != 1:
        return check(context, value)
    if wanted in (str, Path) and isinstance(value, str):
        value = wanted(value)
    elif value is not None and not (wanted is int and value == parameter.default):
        return check(context, value)
    return value if parameter.callback is None else parameter.callback(context, parameter, value)


class _Command(_Light, TyperCommand):
    pass


class _Group(_Light, TyperGroup):
    pass


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        from xpuquant import __version__

        sys.stdout.write(f"xpuquant {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def show_help(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(metavar="COMMAND", help="One of the others.")] = None,
) -> None:
    """Show this list, or how a command is called."""
    words = ["--help"] if command is None else [command, "--help"]
    COMMANDS(args=words, prog_name=PROGRAM, standalone_mode=False)


def _gathered(commands: Mapping[str, Callable[..., None]]) -> typer.Typer:
    gathered = typer.Typer(
        name=PROGRAM,
        cls=_Group,
        help="Convert quantized LLM checkpoints, once and exactly, into the layouts Intel GPU kernels read.",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    gathered.callback(invoke_without_command=True)(_root)
    for name, command in commands.items():
        gathered.command(name, cls=_Command)(command)
    return gathered


_COMMANDS: Mapping[str, Callable[..., None]] = {
    "help": show_help,
    "convert": convert_commands.convert,
    "finish": convert_commands.finish,
    "inspect": check_commands.inspect,
    "verify": check_commands.verify,
    "push": convert_commands.push,
    "diff": check_commands.diff,
    "explain": check_commands.explain,
    "formats": check_commands.formats,
    "doctor": check_commands.doctor,
}

COMMANDS = _gathered(_COMMANDS)


@cache
def built(only: str | None = None) -> Any:
    """The commands as they parse arguments, or one of them alone. Built once: all of them cost as much as a small
    conversion."""
    return typer.main.get_command(COMMANDS if only is None else _gathered({only: _COMMANDS[only]}))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code. Errors become one line on standard error."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        speak_plainly(stream)
    signal.signal(signal.SIGTERM, _terminate)
    # A write beyond `ulimit -f` is an error, which is said. Python ignores the signal for it, but Intel's OpenCL, which
    # oneDNN loads, takes it for a crash and asks for a report. Not delivered, it reaches neither.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXFSZ})
    keep_freed_memory()
    # Progress and errors are ours to print; huggingface_hub reads these when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions:
        # numpy's remarks on a stranger's scales (overflow, NaN): they are data here, and compared bit by bit.
        warnings.simplefilter("ignore")
    typed = arguments[0] if arguments and arguments[0] in _COMMANDS else None
    try:
        code: Any = built(typed)(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except Exception as error:
        return _failed(error, arguments)
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    except SystemExit as end:
        # A shell asked for completions. Or standard output is closed (`| head`): nobody is left to tell.
        return 0 if end.code in (0, None) else EnvironmentFault.exit_code
    if code == Interrupted.exit_code:
        return _failed(_interrupted(arguments), arguments)
    return code if isinstance(code, int) else 0


_RESUMED = ("convert", "finish", "push")
"""Commands that go on where an earlier run was stopped. The others only look, and begin anew."""


def _interrupted(arguments: Sequence[str]) -> Interrupted:
    resumes = any(word in _RESUMED for word in arguments[:1])
    return Interrupted("interrupted; run the same command again" + " to resume" * resumes)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _failed(error: Exception, arguments: Sequence[str]) -> int:
    from xpuquant.conversion.cli.output import Output

    shown, code = explain(error, arguments)
    Output().error(shown)
    if os.environ.get("XPUQUANT_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    return code


def explain(error: Exception, arguments: Sequence[str] = ()) -> tuple[str, int]:
    """(one line, exit code) for any exception of a command line."""
    error = lack_of(error) or error
    if isinstance(error, typer.Abort):
        error = _interrupted(arguments)
    if isinstance(error, XpuquantError):
        return error.spelt(Spelling(built(), arguments)), error.exit_code
    for kind, sentence in _SENTENCES:
        if isinstance(error, kind):
            return sentence(error)
    hint = "please report it; XPUQUANT_TRACEBACK=1 shows where"
    return f"internal error: {type(error).__name__}: {error} ({hint})", INTERNAL_ERROR


def _click(error: Any) -> tuple[str, int]:
    if not hasattr(error, "format_message"):
        return "aborted", Interrupted.exit_code
    option = getattr(error, "option_name", None)
    if option and error.ctx is not None and error.ctx.parent is None and (command := _command_with(option)):
        return f"{error.message.rstrip('.')} before a command; it follows one, as in {PROGRAM} {command} {option}", 2
    close = getattr(error, "possibilities", None)
    if close:  # a mistyped option: the closest comes first
        return f"{error.message.rstrip('.')}. Did you mean {close[0]}?", 2
    return error.format_message(), 2


def _command_with(option: str) -> str | None:
    """The first command that has an option."""
    commands = built().commands.items()
    return next((name for name, one in commands if any(option in each.opts for each in one.params)), None)


def _sentences() -> list[tuple[type[Exception], Callable[[Any], tuple[str, int]]]]:
    # typer carried click as a dependency and now as its own copy; its errors know their base either way.
    base = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ in ("ClickException", "TyperException"))
    return [
        (base, _click),
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
