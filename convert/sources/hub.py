"""A checkpoint on the Hub: planned from config, index and headers; converted from shards that are downloaded first.

What flows: `open_hub` resolves the revision to one commit, lists its files, downloads config and index into the
client's cache, and reads each shard's header with range requests: a few hundred kilobytes for any model. That is enough
for `inspect` and `--dry-run`. `HubSource.fetch` then downloads every shard, a few at a time, into the cache, and hands
over a `CachedSource` on it. (`streamed.py` has the source that never holds all shards at once.)

What survives a fault: huggingface_hub resumes partial downloads and keeps finished ones, so the same command carries
on. Everything is asked for at the resolved commit: a push to the repository in between changes nothing.

What is trusted: the commit, and the Hub's list of its files with sha256 (large files) or git's sha1 (small ones). Every
file that is downloaded, or that the cache holds, is compared with it; one that differs is removed and fetched once
more. Ranges cannot be compared by themselves: `inspect` and `--dry-run` take headers as they come; a conversion reads
them again from files that were compared (`streamed.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xpuquant.conversion.hub.blobs import blob_named, checked_commit, listed_blob, mismatch
from xpuquant.conversion.hub.client import connect, is_offline, retried
from xpuquant.conversion.hub.downloads import Downloads, FileProgress
from xpuquant.conversion.hub.ranges import Ranges
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.sources.base import checkpoint_of, read_slice
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.conversion.sources.repo_files import (
    MAX_COPIED_BYTES,
    FoundFiles,
    is_parsed,
    json_limit,
    list_files,
    no_config,
    read_text,
    sort_files,
)
from xpuquant.conversion.tree import Identity, Tree, Written
from xpuquant.conversion.walk import wrong_name
from xpuquant.errors import Argument, DamagedError, EnvironmentFault, UsageError, shown
from xpuquant.formats.checkpoint import Array, Slice, whole
from xpuquant.formats.safetensors import PREFIX_BYTES, Tensor, header_length, parse_header

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HEADER_GUESS_BYTES = 1 << 16
"""First read of a shard: holds the header of a dense model's shard; a longer one costs a second request."""

_HEADERS_AT_ONCE = 8
_DOWNLOADS_AT_ONCE = 3


def is_repo_id(name: str) -> bool:
    """Whether a name that is no folder can be a repository on the Hub: `owner/name`."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name and not name.endswith(".git")


def _checked(name: str) -> str:
    """`name`, if a file may be made here under it. The Hub has no other names; a server that claims to be the Hub
    might."""
    wrong = wrong_name(name) or ("has backslashes in its name" if "\\" in name else None)
    if wrong is not None:
        raise DamagedError(f"{shown(name)} {wrong}: a file of a repository that cannot be kept here")
    return name


class Remote:
    """One repository at one commit, to read from.

    commit  its id
    blobs   file → what the Hub says that it is
    """

    def __init__(self, api: HfApi, repo_id: str, revision: str | None) -> None:
        self.api = api
        self.repo_id = repo_id
        self._revision = revision
        info = retried(lambda: api.model_info(repo_id, revision=revision, files_metadata=True), repo_id)
        self.commit = checked_commit(info.sha)
        self.blobs = {
            _checked(file.rfilename): listed_blob(
                file.rfilename, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id
            )
            for file in info.siblings or ()
        }
        self._ranges = Ranges(api, repo_id, self.commit)
        self._answered: dict[str, list[tuple[int, int, bytes]]] = {}

    def download(self, name: str, folder: Path | None = None, progress: Progress = lambda nbytes: None) -> Tree:
        """A whole file, in the client's cache or below `folder`; returns the tree that holds it. Resumes, and costs a
        reading when it is there.

        Raises:
            DamagedError: what came is not what the Hub says it has, and was not the second time either.
        """
        if self.blobs[name].sha256 is None and self.blobs[name].git is None:
            raise DamagedError(
                f"{self.repo_id}: the Hub lists {name} without a digest, so what comes could be compared with nothing; "
                "download it by other means, and convert the folder"
            )
        counted = FileProgress(self.blobs[name].nbytes, progress)
        for _attempt in (1, 2):
            path = Path(
                retried(
                    lambda: self.api.hf_hub_download(
                        self.repo_id, name, revision=self.commit, local_dir=folder, tqdm_class=counted.bar()
                    ),
                    self.repo_id,
                )
            )
            tree = Tree(path.parents[name.count("/")])
            differs = mismatch(tree, name, self.blobs[name])
            if differs is None:
                counted.finish()
                return tree
            # Its name in the cache says what it is not: nobody may find it there.
            tree.discard(name)
        raise DamagedError(f"{self.repo_id}: {name} {differs}; twice, so removed here: run the same command again")

    def cached(self, name: str) -> Tree | None:
        """The tree of the client's cache that holds a file as the Hub has it; None where there is none."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo_id, name, revision=self.commit)
        return Tree(Path(found).parents[name.count("/")]) if isinstance(found, str) else None

    def remember(self) -> None:
        """Note in the cache which commit the revision was, so that it is found there offline."""
        retried(
            lambda: self.api.hf_hub_download(self.repo_id, "config.json", revision=self._revision),
            self.repo_id,
        )

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes `begin:end` of a file, as a server says; see `check_answers`."""
        data = retried(lambda: self._ranges.read(name, begin, end), self.repo_id)
        self._answered.setdefault(name, []).append((begin, end, hashlib.sha256(data).digest()))
        return data

    def check_answers(self, name: str, tree: Tree) -> None:
        """Compare the ranges of a file that were read so far with the whole file, which is the one that the Hub lists.

        Raises:
            DamagedError: a server answered with other bytes. OSError
        """
        answered = self._answered.get(name, [])
        if not answered:
            return
        with os.fdopen(tree.open(name), "rb") as file:
            for begin, end, digest in answered:
                file.seek(begin)
                if hashlib.sha256(file.read(end - begin)).digest() != digest:
                    raise DamagedError(
                        f"{self.repo_id}: bytes {begin} to {end} of {name} came other than they are in the file; "
                        "run the same command again"
                    )
        # Only what has passed is forgotten: a download that failed here is begun again.
        self._answered.pop(name, None)

    def header(self, name: str) -> dict[str, Tensor]:
        """Name → tensor of a shard.

        Raises:
            DamagedError: not a sound safetensors file.
        """
        nbytes = self.blobs[name].nbytes
        start = self.read(name, 0, min(nbytes, _HEADER_GUESS_BYTES))
        length = header_length(start[:PREFIX_BYTES], name, nbytes)
        end = PREFIX_BYTES + length
        if end > len(start):
            start += self.read(name, len(start), end)
        return parse_header(start[PREFIX_BYTES:end], name, nbytes)


class HubSource:
    """A repository of which only config, index and headers have been read. Tensors are read by range requests, which
    is right for a few of them and slow for a model."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.name = remote.repo_id
        self.revision: str | None = remote.commit
        self.found = self._find()
        self.extra_files = self.found.extra
        self.left_files: Mapping[str, str] = self.found.left
        self.nbytes = sum(remote.blobs[shard].nbytes for shard in self.found.shards)
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
            self.checkpoint = checkpoint_of(self.found, pool.map(remote.header, self.found.shards), self.peek)

    def peek(self, tensor: Tensor) -> Array | None:
        """A tensor that decides whether the model converts at all: the column order (`g_idx`) of an act-order model.
        None for others: they are not worth a request per module, so this plan believes the config; a conversion looks
        at the values."""
        is_act_order = self.checkpoint.quantization.get("desc_act") is not False
        return read_slice(self, whole(tensor)) if is_act_order and tensor.name.endswith("g_idx") else None

    def read_into(self, box: Slice, out: Array) -> None:
        """Fill `out` (flat uint8, `box.nbytes` long) with the bytes of a slice, one request for each run of them."""
        position = 0
        for offset, length in box.runs():
            data = self.remote.read(box.tensor.file, offset, offset + length)
            out[position : position + length] = np.frombuffer(data, np.uint8)
            position += length

    def copy_file(self, name: str, into: Tree) -> Written:
        """Copy one of `extra_files`."""
        return into.copy_from(self.remote.download(name), name, self.remote.blobs[name].nbytes)

    def read_text(self, name: str) -> str | None:
        """A small text file of the repository; None where it has none of that name, or it is too large to be read."""
        blob = self.remote.blobs.get(name)
        if blob is None or blob.nbytes > json_limit(name):
            return None
        return read_text(self.remote.download(name), name)

    def fingerprint(self) -> str:
        """The commit names the content."""
        return f"{self.name}@{self.revision}"

    def identities(self) -> Mapping[str, Identity]:
        """The commit names the content."""
        return {}

    def check_unchanged(self) -> None:
        """A commit cannot change."""

    def fetch(self, progress: Progress) -> CachedSource:
        """Download every shard into the cache.

        Args:
            progress: called with bytes of shards that are there.

        Raises:
            EnvironmentFault: network, disk.
        """
        self.check_disk((*self.found.shards, *self.found.extra))
        downloads = Downloads(lambda shard: self.remote.download(shard, None, progress), _DOWNLOADS_AT_ONCE)
        running = [downloads.start(shard) for shard in self.found.shards]
        for future in running:
            folder = future.result().path
        for name in self.found.extra:
            self.remote.download(name)
        self.remote.remember()
        return CachedSource(folder, self.name, self.remote.commit, self)

    def _find(self) -> FoundFiles:
        names = sorted(self.remote.blobs)
        try:
            if "config.json" not in names:
                raise UsageError(no_config(names))
            self._check_sizes(names)
            return sort_files(names, self.remote.download)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from None

    def _check_sizes(self, names: Iterable[str]) -> None:
        """Before anything is downloaded."""
        for name in names:
            nbytes = self.remote.blobs[name].nbytes
            if is_parsed(name) and nbytes > json_limit(name):
                limit = json_limit(name) >> 20
                raise DamagedError(f"{self.name}: {name} is too large for a JSON config (more than {limit} MiB)")

    def check_disk(self, names: Sequence[str]) -> None:
        """Raises EnvironmentFault where files do not fit into the cache, before they are downloaded."""
        from huggingface_hub import constants

        for name in self.found.extra:
            if self.remote.blobs[name].nbytes > MAX_COPIED_BYTES:
                raise UsageError(f"{self.name}: {name} is too large for a file that a loader reads beside the weights")
        needed = sum(self.remote.blobs[name].nbytes for name in names if self.remote.cached(name) is None)
        place = Path(constants.HF_HUB_CACHE)
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise EnvironmentFault(
                f"{constants.HF_HUB_CACHE}: {free / 1e9:.1f} GB free, {self.name} needs {needed / 1e9:.1f} GB; "
                "free some, set HF_HOME to another disk, or pass ",
                Argument("stream", True),
            )


class CachedSource(LocalSource):
    """A repository whose files are in the client's cache."""

    def __init__(self, folder: Path, repo_id: str, commit: str, planned: HubSource | None = None) -> None:
        """`planned` is the repository as it was seen before the download: files that are not needed are not here, but
        are told of all the same."""
        super().__init__(folder)
        self.name = repo_id
        self.revision = commit
        if planned is not None:
            self.left_files = planned.left_files
            self.checkpoint = replace(self.checkpoint, notes=planned.checkpoint.notes)

    def fingerprint(self) -> str:
        return f"{self.name}@{self.revision}"


def check_cache(tree: Tree, repo_id: str) -> None:
    """Compare the files of a snapshot in the client's cache with their names there, which are the Hub's digests. A
    cache without links (its file system has none) keeps no such names, and is taken as it is.

    Raises:
        DamagedError: a file is not what its name says. EnvironmentFault: unreadable.
    """
    for name in list_files(tree.path):
        blob = blob_named(tree.blob(name), tree.size(name))
        differs = None if blob is None else mismatch(tree, name, blob)
        if differs is not None:
            raise DamagedError(f"{repo_id}: {name} in the cache {differs}; download it again: {tree.path / name}")


def open_hub(
    repo_id: str, revision: str | None = None, token: str | None = None, stream: bool = False
) -> HubSource | CachedSource:
    """Open a repository; offline (`HF_HUB_OFFLINE`), from the cache.

    Raises:
        UsageError: no such repository, revision or model. EnvironmentFault: gated, network, offline and not cached.
        DamagedError: files that contradict each other.
    """
    api = connect(token)
    if is_offline():
        folder = Path(
            retried(lambda: api.snapshot_download(repo_id, revision=revision, local_files_only=True), repo_id)
        )
        check_cache(Tree(folder), repo_id)
        return CachedSource(folder, repo_id, folder.name)
    if stream:
        from xpuquant.conversion.sources.streamed import StreamedSource

        return StreamedSource(Remote(api, repo_id, revision))
    return HubSource(Remote(api, repo_id, revision))
