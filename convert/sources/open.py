"""From what the user names to a source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.errors import Argument, EnvironmentFault, UsageError

if TYPE_CHECKING:
    from xpuquant.conversion.sources.hub import HubSource


def open_source(name: str, revision: str | None = None, stream: bool = False) -> LocalSource | HubSource:
    """Open a folder, or a repository on the Hub at a revision (a branch, a tag, a commit).

    Args:
        name: path of a folder, or `owner/name`.
        revision: of a repository; None is its main branch.
        stream: read the repository shard by shard, without ever holding all of it (`streamed.py`).

    Raises:
        UsageError: neither a folder nor a model on the Hub; a revision of a folder.
        EnvironmentFault: the Hub cannot be reached, or does not let us in.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"{name} is a folder; ", Argument("revision"), " is for repositories on the Hub")
        if stream:
            raise UsageError(f"{name} is a folder; ", Argument("stream"), " is for repositories on the Hub")
        return LocalSource(folder)
    if folder.exists():
        raise UsageError(f"{name} is a file; give the folder it lies in")
    from xpuquant.conversion.sources.hub import is_repo_id, open_hub  # a folder needs no client of the Hub

    if not is_repo_id(name):
        raise UsageError(f"{no_such_folder(folder)}, and no repo id like owner/name")
    with or_no_such_folder(name):
        return open_hub(name, revision, stream=stream)


@contextmanager
def or_no_such_folder(name: str) -> Iterator[None]:
    """Around opening a repository: where there is none, or no Hub that answers, the error says too that there is no
    such folder. Whoever mistyped a path did not mean the Hub."""
    from xpuquant.conversion.hub.client import has_no_answer

    try:
        yield
    except (UsageError, EnvironmentFault) as error:
        if type(error.__cause__).__name__ == "RepositoryNotFoundError" or has_no_answer(error):
            raise type(error)(f"{no_such_folder(Path(name))}; on the Hub: ", *error.args) from error
        raise


def no_such_folder(path: Path) -> str:
    """That a path does not exist, for a message, with the names beside it that it may have been mistyped for."""
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir() and entry.name.isprintable()]
    except OSError:
        beside = []
    close = get_close_matches(path.name, beside, n=1)
    return f"{path}: no such folder here" + (f" (did you mean {path.with_name(close[0])}?)" if close else "")
