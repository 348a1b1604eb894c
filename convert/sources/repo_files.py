"""Which files of a repo are what: shards, index, configs, files to copy, files to leave. Names only, no weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from xpuquant.conversion.sources.quantization import (
    QUANTIZATION_FILES,
    describes_quantization,
    quantization_config,
)
from xpuquant.conversion.sources.weight_files import (
    ADAPTER_CONFIG,
    PICKLED,
    WeightFiles,
    index_file,
    is_index,
    parse_index,
    pick_weight_files,
)
from xpuquant.errors import DamagedError, EnvironmentFault, UsageError

_MAX_CONFIG_BYTES = 32 << 20
_MAX_INDEX_BYTES = 128 << 20  # about 10^6 tensors, as for a header
_MAX_CONTAINERS = 2_000_000  # an empty list is 3 bytes of text, 64 of memory
_MAX_DEPTH = 100
_MAX_FILES = 100_000
_OTHER_WEIGHTS = (".gguf", ".ggml", ".onnx", ".onnx_data", ".msgpack", ".h5", ".tflite", ".npz", ".mlmodel")
_PICKLED_INDEX = re.compile(r"[\w.-]+\.(?:bin|h5|msgpack)\.index(?:\.[\w-]+)?\.json")
_SKIPPED_FOLDERS = {".git", ".cache", "__pycache__", ".xpuquant"}
_WEIGHT_FOLDERS = {"original", "metal"}


@dataclass(frozen=True)
class FoundFiles:
    """A repo's files, sorted out.

    shards  safetensors files the checkpoint consists of, in order
    index   tensor → shard, where there is an index file
    extra   files to copy; `left` are the others, with the reason
    """

    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    shards: tuple[str, ...]
    index: Mapping[str, str] | None
    extra: tuple[str, ...]
    left: Mapping[str, str]
    notes: tuple[str, ...]


def find_files(folder: Path) -> FoundFiles:
    """Sort out a local folder.

    Raises:
        UsageError: no config.json, no safetensors weights.
        DamagedError: a JSON file that is not one, an index that points outside the folder or at a missing shard.
    """
    names = list_files(folder)
    if "config.json" not in names:
        raise UsageError(f"{folder}: has no config.json; is it a model folder?")
    return sort_files(names, lambda name: folder / name)


def sort_files(names: Sequence[str], locate: Callable[[str], Path]) -> FoundFiles:
    """Sort out a repo's files by their names and the content of its configs and index.

    Args:
        names: every file, `config.json` among them.
        locate: where a file of that name can be read here.

    Raises: as `find_files`.
    """
    config = read_json(locate("config.json"))
    others = {name: read_json(locate(name)) for name in QUANTIZATION_FILES if name in names}
    quantization, notes = quantization_config(config, others)
    index_name = index_file(names)
    index = None if index_name is None else parse_index(read_json(locate(index_name)), index_name)
    named = config.get("transformers_weights")
    weights = pick_weight_files(names, index, index_name, named if isinstance(named, str) else None)
    extra, left = extra_files(names, weights, _dense_folders(names, locate))
    return FoundFiles(config, quantization, weights.shards, weights.index, extra, left, (*notes, *weights.notes))


def _dense_folders(names: Sequence[str], locate: Callable[[str], Path]) -> frozenset[str]:
    """Folders of a Sentence Transformers model's further modules (`2_Dense/model.safetensors`): parts of the model
    that are no part of its Transformers checkpoint. `modules.json` lists them."""
    if "modules.json" not in names:
        return frozenset()
    try:
        modules = json.loads(locate("modules.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return frozenset()
    listed = modules if isinstance(modules, list) else []
    return frozenset(str(module.get("path")) for module in listed if isinstance(module, dict) and module.get("path"))


def list_files(folder: Path) -> list[str]:
    """Every file below a folder, relative POSIX paths, sorted.

    Raises:
        UsageError: a link out of the folder (but for the Hub cache's own, which lead from `snapshots/` to the repo's
            `blobs/`, and since huggingface_hub 2 from there to the `blobs/` that all repos share), or a name that
            cannot be shown.
        EnvironmentFault: a file or folder that cannot be read: said now, not after hours.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed += [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    names: list[str] = []
    try:
        pending = [folder]
        while pending:
            for entry in sorted(pending.pop().iterdir()):
                if not entry.name.isprintable():
                    raise UsageError(f"{entry}: has control characters in its name; rename it")
                if entry.is_symlink():
                    _check_link(entry, allowed)
                elif entry.is_dir():
                    if entry.name not in _SKIPPED_FOLDERS:
                        pending.append(entry)
                    continue
                # Neither sockets nor pipes nor devices.
                if entry.is_file():
                    names.append(entry.relative_to(folder).as_posix())
                    if not os.access(entry, os.R_OK, effective_ids=True):
                        raise EnvironmentFault(f"{entry}: cannot be read (Permission denied)")
                    if len(names) > _MAX_FILES:
                        raise UsageError(f"{folder}: holds more than {_MAX_FILES} files; is it a model folder?")
    except OSError as error:
        raise EnvironmentFault(f"{error.filename}: cannot be read ({error.strerror})") from error
    return sorted(names)


def _check_link(link: Path, allowed: Iterable[Path]) -> None:
    try:
        target = link.resolve(strict=True)
    except (FileNotFoundError, RuntimeError):
        raise UsageError(f"{link}: is a link that leads nowhere; copy the file in instead") from None
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise UsageError(f"{link}: is a link out of the folder; copy the file in instead")
    if target.is_dir():
        raise UsageError(f"{link}: is a link to a folder; copy the folder in instead")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a config or an index.

    Raises:
        DamagedError: not JSON, not an object, or too large for what it is. EnvironmentFault: unreadable.
    """
    limit = _MAX_INDEX_BYTES if is_index(path.name) else _MAX_CONFIG_BYTES
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise DamagedError(f"{path.name}: is too large for a JSON config (more than {limit >> 20} MiB)")
    return parse_json(data, path.name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from bytes; see `read_json`. Infinity and NaN are let through: real configs have them."""
    if data.count(b"{") + data.count(b"[") > _MAX_CONTAINERS:
        raise DamagedError(f"{name}: has more than {_MAX_CONTAINERS} objects and lists")
    try:
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
        _check_depth(value)
        # Half a character, `\\ud800`, is legal JSON and can be written to no file. Only escapes can make one.
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name}: is not a JSON object ({error})") from None
    return value


def _check_depth(value: Any) -> None:
    """What could be read at the limit of Python's stack may not be writable again."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        below = (member for table in level for member in (table.values() if type(table) is dict else table))
        level = [member for member in below if type(member) in (dict, list)]
        if not level:
            return
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def extra_files(
    names: Iterable[str], weights: WeightFiles, kept: frozenset[str] = frozenset()
) -> tuple[tuple[str, ...], dict[str, str]]:
    """(files to copy, file → reason for those that are not). Nothing is forgotten by an allow-list.

    Args:
        weights: what the checkpoint consists of.
        kept: folders whose weights are copied as they are.
    """
    mine = {*weights.shards, weights.index_name, "config.json"}
    copied: list[str] = []
    left: dict[str, str] = {}
    mistral = any(why.startswith("Mistral") for why in weights.left.values())
    for name in names:
        if name in mine:
            continue
        path = PurePosixPath(name)
        if name in weights.left:
            left[name] = weights.left[name]
        elif path.suffix == ".safetensors" and path.parent.as_posix() in kept:
            copied.append(name)
        elif path.suffix == ".safetensors" or is_index(name):
            left[name] = "weights outside the index"
        elif path.name == ADAPTER_CONFIG:
            left[name] = "describes an adapter"
        elif path.suffix in PICKLED or path.suffix in _OTHER_WEIGHTS or path.parts[0] in _WEIGHT_FOLDERS:
            left[name] = "weights of another format"
        elif _PICKLED_INDEX.fullmatch(name) or (mistral and name == "params.json"):
            left[name] = "describes weights that are left out"
        elif describes_quantization(name):
            left[name] = "describes the source's quantization"
        elif name in ("README.md", "xpuquant.json", "verify.json", "verify.md", "verify.html", "verify.svg"):
            left[name] = "written anew"
        elif name in (".gitattributes", ".gitignore"):
            left[name] = "belongs to the source's repository"
        else:
            copied.append(name)
    return tuple(copied), left
