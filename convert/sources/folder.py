"""A checkpoint in a folder here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from xpuquant.conversion.sources.base import checkpoint_of
from xpuquant.conversion.sources.repo_files import MAX_COPIED_BYTES, find_files, read_text
from xpuquant.conversion.sources.shard_reader import ShardReader
from xpuquant.conversion.tree import Identity, Tree, Written, check_same
from xpuquant.errors import EnvironmentFault, UsageError, XpuquantError
from xpuquant.formats.checkpoint import Array, Slice


class LocalSource:
    """A folder with safetensors shards."""

    revision: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        self._tree = Tree(folder)
        # Before it is read, so that what was read is what is watched.
        config = None
        with suppress(OSError, XpuquantError):  # said when it is read
            config = self._tree.identity("config.json")
        found = find_files(folder)
        self.extra_files = found.extra
        self.left_files: Mapping[str, str] = found.left
        self._shards = ShardReader(self._tree, found.shards)
        self._watched = {name: self._identity(name) for name in ("config.json", *found.extra)}
        if config is not None:
            self._watched["config.json"] = config
        self._check_sizes()
        self.checkpoint = checkpoint_of(found, map(self._shards.header, found.shards), self._shards.peek)
        self.nbytes = self._shards.nbytes

    def read_into(self, box: Slice, out: Array) -> None:
        self._shards.read_into(box, out)

    def copy_file(self, name: str, into: Tree) -> Written:
        return into.copy_from(self._tree, name, MAX_COPIED_BYTES, self._watched.get(name))

    def read_text(self, name: str) -> str | None:
        return read_text(self._tree, name)

    def fingerprint(self) -> str:
        # The configs too: they decide what the tensors mean.
        configs = json.dumps([self.checkpoint.config, self.checkpoint.quantization], sort_keys=True)
        return hashlib.sha256((self._shards.fingerprint() + configs).encode()).hexdigest()

    def identities(self) -> Mapping[str, Identity]:
        return self._shards.identities

    def check_unchanged(self) -> None:
        self._shards.check_unchanged()
        for name, identity in self._watched.items():
            check_same(self._tree.path / name, identity, self._identity(name))

    def _identity(self, name: str) -> Identity:
        try:
            return self._tree.identity(name)
        except OSError as error:
            raise EnvironmentFault(f"{self.folder / name}: cannot be read ({error.strerror})") from error

    def _check_sizes(self) -> None:
        for name, identity in self._watched.items():
            if identity.size > MAX_COPIED_BYTES:
                raise UsageError(
                    f"{self.folder / name}: has {identity.size} bytes, more than any file that a loader reads beside "
                    "the weights; move it away"
                )
