"""How the command line spells an argument that a message names: `force=True` is `--force`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from xpuquant.errors import Argument


class Spelling:
    """The options of the command that was typed, and of the others where it has none of that name.

    A parameter of a command is called like the argument of the function in `xpuquant.api` that it stands for.

    group  the commands, as `app.built` makes them
    """

    def __init__(self, group: Any, typed: Sequence[str]) -> None:
        commands: dict[str, Any] = group.commands
        typed_command = next((word for word in typed if word in commands), "")
        # `convert` has nearly all of them.
        names = dict.fromkeys([typed_command, "convert", *commands])
        self._commands = [commands[name] for name in names if name in commands]

    def __call__(self, argument: Argument) -> str:
        parameter = next((found for found in self._parameters() if found.name == argument.name), None)
        if parameter is None:
            return str(argument)
        value = argument.value
        if parameter.param_type_name == "argument":
            word = (parameter.metavar or parameter.name).strip("[]").upper()
            return word if value is ... else f"{word} {_quoted(value)}"
        option: str = parameter.opts[0]
        if not parameter.is_flag:
            return option if value is ... else f"{option} {_quoted(value)}"
        if value is False:
            return parameter.secondary_opts[0] if parameter.secondary_opts else f"no {option}"
        return option

    def _parameters(self) -> Iterator[Any]:
        for command in self._commands:
            yield from command.params


def _quoted(value: object) -> str:
    """A value as it is typed."""
    return " ".join(shlex.quote(str(one)) for one in (value if isinstance(value, list | tuple) else [value]))
