"""Which files of a repo are what: shards, index, configs, files to copy, files to leave. Names only, no weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from xpuquant.errors import DamagedError, EnvironmentFault, UsageError, one_line

_MAX_CONFIG_BYTES = 32 << 20
_MAX_INDEX_BYTES = 128 << 20  # about 10^6 tensors, as for a header
_MAX_CONTAINERS = 2_000_000  # an empty list is 3 bytes of text, 64 of memory
_MAX_DEPTH = 100
_MAX_FILES = 100_000
_INDEX = "model.safetensors.index.json"
_ANY_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_WEIGHTS = (".gguf", ".ggml", ".onnx", ".onnx_data", ".msgpack", ".h5", ".tflite", ".npz", ".mlmodel")
_QUANTIZATION_CONFIGS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
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
    others = {name: read_json(locate(name)) for name in _QUANTIZATION_CONFIGS if name in names}
    quantization, notes = quantization_config(config, others)
    index_name = index_file(names)
    index = None if index_name is None else parse_index(read_json(locate(index_name)), index_name)
    shards, shard_notes = shard_files(names, index, index_name)
    extra, left = extra_files(names, shards, index_name)
    return FoundFiles(config, quantization, shards, index, extra, left, (*notes, *shard_notes))


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
    limit = _MAX_INDEX_BYTES if path.name.endswith(_ANY_INDEX) else _MAX_CONFIG_BYTES
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


def quantization_config(
    config: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """The quantization config, from the places producers put it, and notes where they disagree.

    config.json first (`quantization_config`, the text model's, or the legacy `compression_config`), then
    quantize_config.json and its spellings. Files written by GPTQModel keep the order of `dynamic` rules, which
    config.json (sorted keys) does not.
    """
    text = config.get("text_config")
    inside = [config, text] if isinstance(text, dict) else [config]
    found = [place.get("quantization_config") for place in inside] + [config.get("compression_config")]
    merged: dict[str, Any] = next((dict(value) for value in found if isinstance(value, dict)), {})
    if not merged and any(value for value in found):
        raise DamagedError("config.json: quantization_config is not an object")
    notes: list[str] = []
    for name, other in others.items():
        for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format"):
            if key in merged and key in other and merged[key] != other[key]:
                notes.append(one_line(f"config.json says {key}={merged[key]!r}, {name} says {other[key]!r}"))
        if isinstance(other.get("dynamic"), dict):
            merged["dynamic"] = other["dynamic"]
        merged = {**other, **merged}
    if merged and not merged.get("quant_method") and "config_groups" in merged:
        merged["quant_method"] = "compressed-tensors"
    if merged and not merged.get("quant_method") and others:
        merged["quant_method"] = "awq" if "zero_point" in merged or merged.get("version") == "gemm" else "gptq"
    return merged, notes


def index_file(names: Iterable[str]) -> str | None:
    """The index, by its usual name or the only other one in the root."""
    found = [name for name in names if name.endswith(_ANY_INDEX) and "/" not in name]
    if _INDEX in found:
        return _INDEX
    if len(found) > 1:
        raise UsageError(f"more than one index: {', '.join(found)}; keep one")
    return found[0] if found else None


def parse_index(index: Mapping[str, Any], name: str) -> dict[str, str]:
    """tensor → shard.

    Raises:
        DamagedError: no weight_map, or a shard that is not a plain file name of this folder.
    """
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise DamagedError(f"{name}: has no weight_map")
    for tensor, shard in table.items():
        if not isinstance(shard, str) or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise DamagedError(f"{name}: '{tensor}' is in {shard!r}, which is no safetensors file")
        if PurePosixPath(shard).name != shard or "\\" in shard:
            raise DamagedError(f"{name}: '{tensor}' is in {shard!r}, outside the folder")
    return table


def shard_files(
    names: Iterable[str], index: Mapping[str, str] | None, index_name: str | None
) -> tuple[tuple[str, ...], list[str]]:
    """The shards of the checkpoint, in order, and what is odd about them.

    Raises:
        UsageError: there are no safetensors weights.
        DamagedError: a shard is missing.
    """
    present = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if index is None:
        if not present:
            _refuse_pickles(names)
            raise UsageError("no *.safetensors file in the folder")
        _complete(present)
        return tuple(present), []
    shards = sorted(set(index.values()))
    there = set(present)
    for shard in shards:
        if shard not in there:
            raise DamagedError(f"{shard} is missing, {index_name} lists it; download it again")
    listed = set(shards)
    extra = [name for name in present if name not in listed]
    notes = [f"{name} is not in {index_name}: left out, as loaders do" for name in extra]
    return tuple(shards), notes


def _complete(present: Iterable[str]) -> None:
    held: dict[int, set[int]] = {}
    for name in present:
        if match := _SHARD.fullmatch(name):
            held.setdefault(int(match[2]), set()).add(int(match[1]))
    for total, numbers in held.items():
        # The smallest that is absent: at most one more than there are files.
        missing = next(number for number in range(1, len(numbers) + 2) if number not in numbers)
        if missing <= total:
            raise DamagedError(f"shard {missing} of {total} is missing; download it again")


def _refuse_pickles(names: Iterable[str]) -> None:
    for name in names:
        if name.endswith(_PICKLED):
            raise UsageError(
                f"{name}: pickled weights are never opened (they can run code); save the model as safetensors "
                "first: model.save_pretrained(folder, safe_serialization=True)"
            )


def extra_files(
    names: Iterable[str], shards: Iterable[str], index_name: str | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """(files to copy, file → reason for those that are not). Nothing is forgotten by an allow-list."""
    mine = {*shards, index_name, "config.json"}
    copied: list[str] = []
    left: dict[str, str] = {}
    for name in names:
        if name in mine:
            continue
        path = PurePosixPath(name)
        if path.suffix == ".safetensors" or name.endswith(_ANY_INDEX):
            left[name] = "weights outside the index"
        elif path.suffix in _PICKLED or path.suffix in _OTHER_WEIGHTS or path.parts[0] in _WEIGHT_FOLDERS:
            left[name] = "weights of another format"
        elif name in _QUANTIZATION_CONFIGS:
            left[name] = "describes the source's quantization"
        elif name in ("README.md", "xpuquant.json", "verify.json", "verify.md", "verify.html", "verify.svg"):
            left[name] = "written anew"
        elif name in (".gitattributes", ".gitignore"):
            left[name] = "belongs to the source's repository"
        else:
            copied.append(name)
    return tuple(copied), left
