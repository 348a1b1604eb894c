"""A checkpoint folder in memory: what mutations work on, and how it gets back onto a disk."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from support.checkpoints import FIXTURES

SMALL = 400_000
"""Bytes of a fixture that is mutated whole; all of tests/fixtures but a few."""


@dataclass
class Folder:
    """Files of a checkpoint. Tensors are kept apart until `write`, so that they can be changed one by one.

    name     the fixture it was
    config   config.json
    files    other files: name → bytes
    tensors  name → (dtype, shape, bytes)
    edits    what was done to it, for the report of a failure
    shards   how many files the tensors go into; with an index from 2 on
    entries  changes of header entries: name → fields that replace those written for it
    blobs    changes of whole files, as they are about to be written: (file name, what to do with its bytes)
    """

    name: str
    config: Any
    files: dict[str, bytes]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]
    edits: list[str] = field(default_factory=list)
    shards: int = 1
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    index: Any = None
    blobs: list[tuple[str, Any]] = field(default_factory=list)

    def write(self, target: Path) -> None:
        """Write it as a folder."""
        target.mkdir(parents=True)
        written: dict[str, bytes] = {**self.files, "config.json": dumps(self.config)}
        names = list(self.tensors)
        count = max(1, min(self.shards, len(names)))
        weight_map = {}
        for i in range(count):
            mine = names[i * len(names) // count : (i + 1) * len(names) // count]
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            written[file] = self._shard(mine)
            weight_map |= dict.fromkeys(mine, file)
        if count > 1 or self.index is not None:
            index = {"metadata": {}, "weight_map": weight_map}
            if callable(self.index):
                index = self.index(index)
            written["model.safetensors.index.json"] = dumps(index)
        for file, change in self.blobs:
            if file in written:
                written[file] = change(written[file])
        for file, data in written.items():
            path = target / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def _shard(self, names: list[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name in names:
            dtype, shape, content = self.tensors[name]
            span = [len(data), len(data) + len(content)]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span} | self.entries.get(name, {})
            data += content
        text = dumps(header)
        return struct.pack("<Q", len(text)) + text + data


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@cache
def _stored(path: Path) -> tuple[bytes, dict[str, bytes], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    config = files.pop("config.json")
    files.pop("model.safetensors.index.json", None)
    tensors = {}
    for shard in [name for name in files if name.endswith(".safetensors")]:
        blob = files.pop(shard)
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + at for at in entry["data_offsets"])
                tensors[name] = (entry["dtype"], tuple(entry["shape"]), blob[begin:end])
    return config, files, tensors


@cache
def fixtures() -> tuple[Path, ...]:
    """The fixtures that are mutated."""
    found = sorted(path.parent for path in FIXTURES.glob("*/config.json"))
    return tuple(path for path in found if sum(file.stat().st_size for file in path.glob("*.safetensors")) <= SMALL)


def load(path: Path) -> Folder:
    """A fresh copy of a fixture."""
    config, files, tensors = _stored(path)
    return Folder(path.name, json.loads(config), dict(files), dict(tensors))
