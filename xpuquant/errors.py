"""The error tree. Each class is one exit code; each message is one line that names the fix.

Library code raises these; only the command line prints them.
"""

import reprlib
from collections.abc import Callable

from xpuquant.values import frozen

MESSAGE_LENGTH = 4000
"""Longest message of an error, in characters: a refusal lists its modules."""


@frozen
class Argument:
    """An argument of the public functions in a message, with the value it has or should have.

    In Python it reads `max_shard_size='5GB'`; the command line spells it as its option, `--max-shard-size 5GB`.

    name   as the functions of `xpuquant` call it
    value  `...` where only the name is meant
    """

    name: str
    value: object = ...

    def __str__(self) -> str:
        return self.name if self.value is ... else f"{self.name}={shown(self.value)}"


class XpuquantError(Exception):
    """Base of everything a user can cause or meet. Never raised itself.

    The message is one printable line whatever names of strangers are in it, wherever it is shown: serving engines have
    no sink that would see to it. It is given in parts, so that an `Argument` among them is spelt as whoever shows it
    does: `UsageError(f"{out}: exists; ", Argument("force", True), " replaces it")`.
    """

    exit_code = 1

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)

    def __str__(self) -> str:
        return self.spelt(str)

    def spelt(self, spell: Callable[[Argument], str]) -> str:
        """The message, with its arguments as `spell` writes them."""
        parts = (spell(part) if isinstance(part, Argument) else str(part) for part in self.args)
        return one_line("".join(parts), MESSAGE_LENGTH)


class VerificationError(XpuquantError):
    """The output does not decode to what the source decodes to, or a kernel disagrees. Exit 1.

    files  the output's files in which that is, by name; None where it may be in any
    """

    exit_code = 1

    def __init__(self, *parts: object, files: frozenset[str] | None = None) -> None:
        super().__init__(*parts)
        self.files = files


class NotVerifiedError(XpuquantError):
    """Nothing wrong was found, but not everything that had to be checked was. Exit 5."""

    exit_code = 5


class UsageError(XpuquantError):
    """Wrong arguments, or an input that no XPU kernel can serve. Exit 2."""

    exit_code = 2


class UnsupportedError(UsageError):
    """The checkpoint is sound, but some modules have no exact XPU layout. Exit 2."""


class DamagedError(XpuquantError):
    """The input contradicts itself: truncated, missing or misshapen tensors. Exit 3."""

    exit_code = 3


class EnvironmentFault(XpuquantError):
    """Disk, network, permissions, or an extra that is not installed. Exit 4."""

    exit_code = 4


class Interrupted(XpuquantError):
    """Stopped by the user; the same command resumes. Exit 130."""

    exit_code = 130


def one_line(text: object, limit: int = 300) -> str:
    """`text` made safe to print on one terminal line.

    Names come from strangers' files: control characters and terminal escapes are shown, not sent.
    """
    # Cut before it is looked at: a stranger's text may be as long as his file.
    head = str(text)[: limit + 1].replace("\n", " ")
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in head)
    return safe if len(safe) <= limit else f"{safe[: limit - 1]}…"


def shown(value: object) -> str:
    """A value from a stranger's JSON for a message: `repr`, bounded in depth and length."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 3, 8, 4
_REPR.maxstring = _REPR.maxother = 80


def lack_of(error: BaseException) -> EnvironmentFault | None:
    """What of a machine has run out, where that is what an exception says: memory, or threads."""
    if isinstance(error, MemoryError):
        return EnvironmentFault("out of memory; try ", Argument("jobs", 1))
    # CPython has no exception of its own for it (Python/thread_pthread.h gives up; Modules/_threadmodule.c says so).
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return EnvironmentFault(
            "the system starts no more threads (see ulimit -u and ulimit -v); try ", Argument("jobs", 1)
        )
    return None
