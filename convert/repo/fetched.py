"""A converted repo by what a user calls it: a folder, or a repository on the Hub, whose files are downloaded first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.journal import PROVENANCE
from xpuquant.conversion.sources.open import on_the_hub, or_no_such_folder
from xpuquant.conversion.walk import is_hidden
from xpuquant.errors import UsageError

_DOWNLOADS_AT_ONCE = 3


def fetched_repo(name: str, reporter: Reporter) -> Path:
    """The folder of a converted repo; one on the Hub is downloaded into the client's cache, every file compared with
    what the Hub says that it is.

    Args:
        name: a folder, which is returned as it is, or `owner/name`, its main branch, or `owner/name@revision`.

    Raises:
        UsageError: neither a folder nor a converted repo on the Hub. EnvironmentFault: network, disk.
        DamagedError: what comes is not what the Hub says it has.
    """
    folder = Path(name)
    if folder.exists() or folder.is_symlink():
        return folder
    repo, revision = on_the_hub(name)
    from xpuquant.conversion.sources.hub import CachedSource, open_hub

    with or_no_such_folder(name):
        source = open_hub(repo, revision)
    if isinstance(source, CachedSource):  # offline
        return source.folder
    remote = source.remote
    if PROVENANCE not in remote.blobs:
        raise UsageError(f"{name}: has no {PROVENANCE}; it was not converted by xpuquant")
    files = [file for file in remote.blobs if not is_hidden(file)]
    source.check_disk(files)
    reporter.phase("download", sum(remote.blobs[file].nbytes for file in files))
    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        trees = list(pool.map(lambda file: remote.download(file, None, reporter.advance), files))
    return trees[0].path
