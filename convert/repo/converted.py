"""A converted repo as it lies on disk: which modules it holds, checked against its own config and headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xpuquant.conversion.repo.journal import PROVENANCE
from xpuquant.conversion.sources.repo_files import find_files
from xpuquant.conversion.sources.shard_reader import ShardReader
from xpuquant.conversion.tree import Tree
from xpuquant.errors import DamagedError, UsageError
from xpuquant.formats.checkpoint import Array, Slice
from xpuquant.formats.guard import guarded
from xpuquant.formats.layouts import layouts_by_name
from xpuquant.formats.layouts.base import Layout, Stored
from xpuquant.formats.layouts.compressed_tensors import config as portable
from xpuquant.formats.layouts.compressed_tensors.stored import stored_modules
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.scheme import QUANT_METHOD, Scheme, from_config


class StoredModules:
    """What a converted repo holds, by the headers of its shards and its config.

    tensors  name → tensor, of all shards
    modules  name → quantized module
    plain    name → tensor, of those that belong to no quantized module
    read     reads a slice of them
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], read: Callable[[Slice], Array], quantization: Mapping[str, Any]
    ) -> None:
        self.tensors = tensors
        self.read = read
        if quantization.get("quant_method") == portable.FAMILY:
            self.modules = stored_modules(quantization, self.tensors, read)
        else:
            self.modules = {
                name: self._stored(name, scheme, read) for name, scheme in from_config(quantization).items()
            }
        used = {tensor.name for stored in self.modules.values() for tensor in stored.tensors.values()}
        self.plain = {name: tensor for name, tensor in self.tensors.items() if name not in used}

    def layout(self, stored: Stored) -> Layout:
        """The layout of a stored module."""
        return layouts_by_name()[stored.scheme.layout]

    def _stored(self, name: str, scheme: Scheme, read: Callable[[Slice], Array]) -> Stored:
        layout = layouts_by_name().get(scheme.layout)
        if layout is None:
            raise DamagedError(f"config.json: unknown layout '{scheme.layout}' of {name}")
        tensors: dict[str, Tensor] = {}
        for suffix in layout.suffixes(scheme):
            if f"{name}.{suffix}" not in self.tensors:
                raise DamagedError(f"{name}.{suffix} is missing; config.json says {scheme.label()}")
            tensors[suffix] = self.tensors[f"{name}.{suffix}"]
        return Stored(name, scheme, tensors, read)


class ReadableRepo(StoredModules):
    """The same, with the folder that its files lie in.

    tree  the folder
    """

    def __init__(
        self,
        tree: Tree,
        tensors: Mapping[str, Tensor],
        read: Callable[[Slice], Array],
        quantization: Mapping[str, Any],
    ) -> None:
        self.tree = tree
        super().__init__(tensors, read, quantization)


class Repo(ReadableRepo):
    """An open converted repo in a folder. Its tensors are those that the headers on disk say."""

    def __init__(self, tree: Tree, shards: tuple[str, ...], quantization: Mapping[str, Any]) -> None:
        self.reader = ShardReader(tree, shards)
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            for name, tensor in self.reader.header(shard).items():
                if name in tensors:
                    raise DamagedError(f"'{name}' is in both {tensors[name].file} and {shard}")
                tensors[name] = tensor
        super().__init__(tree, tensors, self.reader.read, quantization)


def open_repo(folder: Path) -> Repo:
    """Open a finished repo; config.json, index and headers must agree.

    Raises:
        UsageError: not a converted repo. DamagedError: files that contradict each other.
    """
    found = find_files(folder)
    method = found.quantization.get("quant_method")
    # A portable output says nothing of us in its config: its provenance does.
    if method != QUANT_METHOD and not (method == portable.FAMILY and Tree(folder).holds(PROVENANCE)):
        raise UsageError(f"{folder}: was not converted by xpuquant (quant_method is {method!r})")
    with guarded("config.json"):
        repo = Repo(Tree(folder), found.shards, found.quantization)
    for name, shard in (found.index or {}).items():
        held = repo.tensors.get(name)
        if held is None or held.file != shard:
            raise DamagedError(f"the index puts '{name}' into {shard}, which does not hold it")
    if found.index is not None:
        for name, tensor in repo.tensors.items():
            if name not in found.index:
                raise DamagedError(f"{tensor.file} holds '{name}', which the index does not list")
    return repo
