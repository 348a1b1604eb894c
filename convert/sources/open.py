"""From what the user names to a source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.errors import Argument, UsageError

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
        raise UsageError(f"{name}: no such folder, and no repo id like owner/name")
    return open_hub(name, revision, stream=stream)
