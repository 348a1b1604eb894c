"""A checkpoint in a folder here."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from xpuquant.conversion.sources.base import checkpoint_of
from xpuquant.conversion.sources.repo_files import find_files
from xpuquant.conversion.sources.shard_reader import ShardReader
from xpuquant.formats.checkpoint import Array, Slice


class LocalSource:
    """A folder with safetensors shards."""

    revision: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        found = find_files(folder)
        self.extra_files = found.extra
        self.left_files: Mapping[str, str] = found.left
        self._shards = ShardReader(folder, found.shards)
        self.checkpoint = checkpoint_of(found, map(self._shards.header, found.shards), self._shards.peek)
        self.nbytes = self._shards.nbytes

    def read_into(self, box: Slice, out: Array) -> None:
        self._shards.read_into(box, out)

    def copy_file(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Content only: the mode follows the umask, and a link of the Hub cache becomes a file.
        shutil.copyfile(self.folder / name, target)

    def read_text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def fingerprint(self) -> str:
        # The configs too: they decide what the tensors mean.
        configs = json.dumps([self.checkpoint.config, self.checkpoint.quantization], sort_keys=True)
        return hashlib.sha256((self._shards.fingerprint() + configs).encode()).hexdigest()

    def check_unchanged(self) -> None:
        self._shards.check_unchanged()
