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
        name: path of a folder, `owner/name` or `owner/name@revision`.
        revision: of a repository; None is the one in its name, or its main branch.
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
    repo, revision = on_the_hub(name, revision)
    from xpuquant.conversion.sources.hub import open_hub

    with or_no_such_folder(name):
        return open_hub(repo, revision, stream=stream)


def on_the_hub(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """What a name that is no path stands for on the Hub: (`owner/name`, a revision or None).

    Args:
        name: `owner/name`, or `owner/name@revision` as in the client's own paths (`hf://owner/name@revision`).
        revision: that was asked for beside the name.

    Raises:
        UsageError: no repo id; two revisions, or none behind the @.
    """
    from xpuquant.conversion.sources.hub import is_repo_id  # a folder needs no client of the Hub

    repo, at, named = name.partition("@")
    if not is_repo_id(repo):
        raise UsageError(f"{no_such_folder(Path(name))}, and no repo id like owner/name")
    if at and not named:
        raise UsageError(f"{name}: no revision follows the @; want {repo}@ and a branch, a tag or a commit")
    if at and revision is not None:
        raise UsageError(f"{name} names a revision already; leave out ", Argument("revision"))
    return repo, named or revision


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
