"""A repository on the Hub, converted on a disk too small for it: only the shards in use are here.

What flows: the small tensors that decide the plan (column orders, zero points) are read by range requests, many at
once. Then whole shards are downloaded into a folder of the conversion's own, each when it is first read or a little
ahead, and deleted by `release`. A shard that the client's cache already holds is read there and stays there. Each is
compared with the Hub's sha256, and then the ranges of it that the plan was made from with the shard itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from xpuquant.conversion.hub.downloads import Downloads
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.sources.hub import HubSource, Remote
from xpuquant.conversion.sources.shard_reader import ShardReader
from xpuquant.conversion.tree import Tree
from xpuquant.formats.checkpoint import Array, Slice, as_array, whole
from xpuquant.formats.safetensors import Tensor

_VALUES_AT_ONCE = 16
_MAX_VALUE_BYTES = 1 << 24
_MAX_VALUES_BYTES = 1 << 30
"""Kept while planning. Column orders and zero points of a 70B model are a few hundred megabytes."""


class StreamedSource(HubSource):
    """A repository of which only the shards in use are here."""

    def __init__(self, remote: Remote) -> None:
        self._values: dict[str, bytes] = {}
        self._suffixes_read: set[str] = set()
        self._lock = threading.Lock()
        self._readers: dict[str, ShardReader] = {}
        self._tree: Tree | None = None
        self._progress: Progress = lambda nbytes: None
        self._downloads = Downloads(self._download, at_once=2)
        super().__init__(remote)

    def keep_in(self, tree: Tree) -> None:
        """Download shards into a folder. Comes before the first read of a tensor; without it they go to the client's
        cache."""
        self._tree = tree

    def fetch_shards(self, shards: Sequence[str], progress: Progress) -> None:
        """Download some shards before they are read.

        Args:
            progress: called with bytes of them that are there.

        Raises: as `fetch`.
        """
        self._progress = progress
        for running in [self._downloads.start(shard) for shard in shards]:
            running.result()

    def peek(self, tensor: Tensor) -> Array | None:
        """Any small tensor: a conversion looks at the values, whatever the config says."""
        if tensor.nbytes > _MAX_VALUE_BYTES:
            return None
        suffix = _suffix(tensor)
        if suffix not in self._suffixes_read:
            # Readers ask for the same tensor of one module after the other: fetch those of all modules at once.
            self._suffixes_read.add(suffix)
            self._fetch_values([other for other in self.checkpoint.tensors.values() if _suffix(other) == suffix])
        data = self._values.get(tensor.name)
        if data is None:
            data = self.remote.read(tensor.file, tensor.begin, tensor.end)
        return as_array(whole(tensor), np.frombuffer(data, np.uint8).copy())

    def read_into(self, box: Slice, out: Array) -> None:
        """Fill `out` (flat uint8, `box.nbytes` long) with the bytes of a slice; waits until its shard is here."""
        self._reader(box.tensor.file).read_into(box, out)

    def prefetch(self, shard: str) -> None:
        """Begin to download a shard, and do not wait."""
        self._downloads.start(shard)

    def release(self, shard: str) -> None:
        """Delete a shard that will not be read again, unless it lies in the client's cache."""
        self._values.clear()
        with self._lock:
            reader = self._readers.pop(shard, None)
        if reader is not None:
            reader.close()
        self._downloads.forget(shard)
        if self._tree is not None:
            self._tree.remove(shard)

    def is_cached(self, shard: str) -> bool:
        """Whether the client's cache holds a shard."""
        return self.remote.cached(shard) is not None

    def _download(self, shard: str) -> Tree:
        # The client finds what the cache holds, where it is asked for no other folder.
        elsewhere = None if self._tree is None or self.is_cached(shard) else self._tree.path
        tree = self.remote.download(shard, elsewhere, self._progress)
        self.remote.check_answers(shard, tree)
        return tree

    def _reader(self, shard: str) -> ShardReader:
        with self._lock:
            reader = self._readers.get(shard)
        if reader is not None:
            return reader
        tree = self._downloads.start(shard).result()
        with self._lock:
            return self._readers.setdefault(shard, ShardReader(tree, [shard]))

    def _fetch_values(self, tensors: list[Tensor]) -> None:
        def fetch(tensor: Tensor) -> tuple[str, bytes]:
            return tensor.name, self.remote.read(tensor.file, tensor.begin, tensor.end)

        total = sum(len(data) for data in self._values.values())
        chosen = []
        for tensor in (tensor for tensor in tensors if tensor.nbytes <= _MAX_VALUE_BYTES):
            total += tensor.nbytes
            if total > _MAX_VALUES_BYTES:
                break
            chosen.append(tensor)
        with ThreadPoolExecutor(_VALUES_AT_ONCE) as pool:
            self._values.update(pool.map(fetch, chosen))


def _suffix(tensor: Tensor) -> str:
    """The last part of a tensor's name: `g_idx`, `qzeros`."""
    return tensor.name.rpartition(".")[2]
