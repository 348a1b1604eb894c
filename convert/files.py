"""Which files of a repo are what: shards, index, configs, files to copy, files to leave. Names only, no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from xpuquant.errors import DamagedError, EnvironmentFault, UsageError, one_line

_MAX_JSON_BYTES = 256 << 20
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_WEIGHTS = (".gguf", ".ggml", ".onnx", ".onnx_data", ".msgpack", ".h5", ".tflite", ".npz", ".mlmodel")
_OLD_CONFIGS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
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
        raise UsageError(one_line(f"{folder}: has no config.json; is it a model folder?"))
    config = read_json(folder / "config.json")
    quantization, notes = quantization_config(config, {
        name: read_json(folder / name) for name in _OLD_CONFIGS if name in names
    })  # fmt: skip
    index_name = index_file(names)
    index = None if index_name is None else parse_index(read_json(folder / index_name), index_name)
    shards, shard_notes = shard_files(names, index, index_name)
    extra, left = extra_files(names, shards, index_name)
    return FoundFiles(config, quantization, shards, index, extra, left, (*notes, *shard_notes))


def list_files(folder: Path) -> list[str]:
    """Every file below a folder, relative POSIX paths, sorted. Symlinks out of the folder are refused, but for
    the Hub cache's own, which lead from `snapshots/` to `blobs/` of one repo."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    names: list[str] = []
    try:
        pending = [folder]
        while pending:
            for entry in sorted(pending.pop().iterdir()):
                if entry.is_dir() and not entry.is_symlink():
                    if entry.name not in _SKIPPED_FOLDERS:
                        pending.append(entry)
                    continue
                target = entry.resolve()
                if entry.is_symlink() and not (target.is_relative_to(root) or target.is_relative_to(blobs)):
                    raise UsageError(
                        one_line(f"{entry}: is a link out of the folder; copy the file in instead")
                    )
                if entry.is_file():
                    names.append(entry.relative_to(folder).as_posix())
    except OSError as error:
        raise EnvironmentFault(f"{error.filename}: cannot be read ({error.strerror})") from error
    return sorted(names)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DamagedError: not JSON, or not an object. EnvironmentFault: unreadable.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise DamagedError(f"{path.name}: is too large for a JSON config ({path.stat().st_size} bytes)")
        data = path.read_bytes()
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read ({error.strerror})") from error
    return parse_json(data, path.name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from bytes; see `read_json`."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(one_line(f"{name}: is not JSON ({error})")) from None
    if not isinstance(value, dict):
        raise DamagedError(f"{name}: is not a JSON object")
    return value


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
        merged["quant_method"] = (
            "awq" if "zero_point" in merged or merged.get("version") == "gemm" else "gptq"
        )
    return merged, notes


def index_file(names: Iterable[str]) -> str | None:
    """The index, by its usual name or the only other one in the root."""
    found = [name for name in names if name.endswith(".safetensors.index.json") and "/" not in name]
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
            raise DamagedError(one_line(f"{name}: '{tensor}' is in {shard!r}, which is no safetensors file"))
        if PurePosixPath(shard).name != shard or "\\" in shard:
            raise DamagedError(one_line(f"{name}: '{tensor}' is in {shard!r}, outside the folder"))
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
    for shard in shards:
        if shard not in present:
            raise DamagedError(f"{shard} is missing, {index_name} lists it; download it again")
    extra = [name for name in present if name not in shards]
    notes = [f"{name} is not in {index_name}: left out, as loaders do" for name in extra]
    return tuple(shards), notes


def _complete(present: Iterable[str]) -> None:
    numbered = [(match, name) for name in present if (match := _SHARD.fullmatch(name))]
    for match, name in numbered:
        have = {int(other[1]) for other, _ in numbered if other[2] == match[2]}
        missing = set(range(1, int(match[2]) + 1)) - have if int(match[2]) < 100_000 else set()
        if missing:
            raise DamagedError(
                f"shard {min(missing)} of {int(match[2])} is missing beside {name}; download it again"
            )


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
        if path.suffix == ".safetensors" or name.endswith(".safetensors.index.json"):
            left[name] = "weights outside the index"
        elif path.suffix in _PICKLED or path.suffix in _OTHER_WEIGHTS or path.parts[0] in _WEIGHT_FOLDERS:
            left[name] = "weights of another format"
        elif name in _OLD_CONFIGS:
            left[name] = "describes the source's quantization"
        elif name in ("README.md", "xpuquant.json", "verify.json", "verify.md", "verify.html", "verify.svg"):
            left[name] = "written anew"
        elif name in (".gitattributes", ".gitignore"):
            left[name] = "belongs to the source's repository"
        else:
            copied.append(name)
    return tuple(copied), left
