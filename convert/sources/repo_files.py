"""Which files of a repo are what: shards, index, configs, files to copy, files to leave. Names only, no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from xpuquant.conversion.sources.quantization import (
    QUANTIZATION_FILES,
    describes_quantization,
    quantization_config,
)
from xpuquant.conversion.sources.secret_names import secret_notes
from xpuquant.conversion.sources.unfinished import begun
from xpuquant.conversion.sources.weight_files import (
    ADAPTER_CONFIG,
    FOREIGN,
    INDEX,
    PICKLED,
    WeightFiles,
    index_file,
    is_index,
    parse_index,
    pick_weight_files,
    why_no_weights,
)
from xpuquant.conversion.tree import Listed, Tree
from xpuquant.conversion.walk import is_hidden
from xpuquant.errors import DamagedError, EnvironmentFault, UsageError
from xpuquant.values import frozen

_MAX_CONFIG_BYTES = 32 << 20
_MAX_INDEX_BYTES = 128 << 20  # about 10^6 tensors, as for a header
_MAX_CONTAINERS = 2_000_000  # an empty list is 3 bytes of text, 64 of memory
_MAX_DEPTH = 100
MAX_COPIED_BYTES = 4 << 30
"""Of a file that is copied. No loader reads one of a hundredth of that beside the weights; a sparse file of a terabyte
costs its sender nothing."""

MAX_TEXT_BYTES = 4 << 20
"""Of a text file that is read for the card. The longest cards of the Hub have some hundred kilobytes."""

_PICKLED_INDEX = re.compile(r"[\w.-]+\.(?:bin|h5|msgpack)\.index(?:\.[\w-]+)?\.json")
_WEIGHT_FOLDERS = {"original", "metal"}
_WRITTEN_ANEW = ("README.md", "xpuquant.json", "verify.json", "verify.md", "verify.html", "verify.svg")
WRITTEN = (*_WRITTEN_ANEW, "config.json", INDEX)
"""What a conversion writes beside shards and copied files."""

_MOST_NOTES = 20
"""Of one kind: a folder of a thousand pipes is told in a screen."""

_OUR_SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


@frozen
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
    tree = Tree(folder)
    listed = _listed(tree)
    strays = tree.strays(filter(_is_needed, tree.names()))
    wrong = next(filter(_is_needed, strays), None)
    if wrong is not None:
        raise DamagedError(f"{folder / wrong}: {strays[wrong]}; put the file there, or move this away")
    if not any(file.name == "config.json" for file in listed):
        raise UsageError(f"{folder}: {begun(tree) or no_config([file.name for file in listed])}")
    found = sort_files([file.name for file in listed], lambda name: tree, {file.name: file.means for file in listed})
    said = [f"{name} {what}: not taken over" for name, what in strays.items()]
    return replace(found, notes=(*found.notes, *said[:_MOST_NOTES], *_more(said)))


def _is_needed(name: str) -> bool:
    """Whether a checkpoint may not be read without a file of that name."""
    weights = name.endswith(".safetensors") and why_no_weights(name) is None
    return "/" not in name and (weights or is_parsed(name))


def _more(said: Sequence[str]) -> list[str]:
    return [f"{len(said) - _MOST_NOTES} more are no files: not taken over"] if len(said) > _MOST_NOTES else []


def no_config(names: Iterable[str]) -> str:
    """Why files without a config.json at the top are no model, and where one is."""
    names = list(names)
    inner = sorted(name.removesuffix("/config.json") for name in names if name.endswith("/config.json"))
    if inner:
        return f"has no config.json; the model is a folder inside it ({', '.join(inner[:3])}): convert that folder"
    if "params.json" in names:
        return (
            "has no config.json, but params.json: Mistral's own format, with tensor names of its own; convert the repo "
            "that Transformers loads"
        )
    return "has no config.json; is it a model folder?"


def sort_files(
    names: Sequence[str], locate: Callable[[str], Tree], means: Mapping[str, str] | None = None
) -> FoundFiles:
    """Sort out a repo's files by their names and the content of its configs and index.

    Args:
        names: every file, `config.json` among them.
        locate: the tree in which a file of that name can be read here.
        means: name → path of the file that is read under it, where links have been looked at.

    Raises: as `find_files`.
    """
    config = read_json(locate("config.json"), "config.json")
    others = {name: read_json(locate(name), name) for name in QUANTIZATION_FILES if name in names}
    quantization, notes = quantization_config(config, others)
    index_name = index_file(names)
    index = None if index_name is None else parse_index(read_json(locate(index_name), index_name), index_name)
    named = config.get("transformers_weights")
    weights = pick_weight_files(names, index, index_name, named if isinstance(named, str) else None)
    extra, left = extra_files(names, weights, _dense_folders(names, locate), means or {})
    notes = [*notes, *weights.notes, *secret_notes(extra, "copied")]
    return FoundFiles(config, quantization, weights.shards, weights.index, extra, left, tuple(notes))


def _dense_folders(names: Sequence[str], locate: Callable[[str], Tree]) -> frozenset[str]:
    """Folders of a Sentence Transformers model's further modules (`2_Dense/model.safetensors`): parts of the model
    that are no part of its Transformers checkpoint. `modules.json` lists them."""
    if "modules.json" not in names:
        return frozenset()
    try:
        modules = json.loads(locate("modules.json").read("modules.json", MAX_TEXT_BYTES))
    except (OSError, ValueError, RecursionError, DamagedError):
        return frozenset()
    listed = modules if isinstance(modules, list) else []
    return frozenset(str(module.get("path")) for module in listed if isinstance(module, dict) and module.get("path"))


def list_files(folder: Path) -> list[str]:
    """Every file below a folder that may belong to a model, relative POSIX paths, sorted.

    Raises:
        UsageError: a link that may not be followed (see `Tree`), or a name that cannot be shown.
        EnvironmentFault: a file or folder that cannot be read: said now, not after hours.
    """
    return [file.name for file in _listed(Tree(folder))]


def _listed(tree: Tree) -> list[Listed]:
    try:
        return tree.files()
    except OSError as error:
        raise EnvironmentFault(f"{error.filename}: cannot be read ({error.strerror})") from error


def is_parsed(name: str) -> bool:
    """Whether a file of that name may be read while planning."""
    return name in ("config.json", *QUANTIZATION_FILES) or (is_index(name) and "/" not in name)


def json_limit(name: str) -> int:
    """Bytes that a JSON file of that name may have."""
    return _MAX_INDEX_BYTES if is_index(PurePosixPath(name).name) else _MAX_CONFIG_BYTES


def read_json(tree: Tree, name: str) -> dict[str, Any]:
    """The JSON object in a config, an index or a record.

    Raises:
        DamagedError: not JSON, not an object, no regular file, or too large for what it is.
        EnvironmentFault: unreadable.
    """
    try:
        data = tree.read(name, json_limit(name))
    except OSError as error:
        raise EnvironmentFault(f"{tree.path / name}: cannot be read ({error.strerror})") from error
    return parse_json(data, PurePosixPath(name).name)


def read_text(tree: Tree, name: str) -> str | None:
    """A small text file; None where there is none that can be read."""
    try:
        return tree.read(name, MAX_TEXT_BYTES).decode("utf-8", "replace")
    except (OSError, DamagedError, UsageError):
        return None


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


def named_twice(data: bytes) -> str | None:
    """A key that an object in JSON that can be read has twice; None where there is none."""
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        if len(seen := dict(pairs)) < len(pairs):
            found.append(next(key for key in seen if sum(key == other for other, _ in pairs) > 1))

    json.loads(data.decode("utf-8"), object_pairs_hook=look)
    return found[0] if found else None


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
    names: Iterable[str],
    weights: WeightFiles,
    kept: frozenset[str] = frozenset(),
    means: Mapping[str, str] = {},
) -> tuple[tuple[str, ...], dict[str, str]]:
    """(files to copy, file → reason for those that are not). Nothing is forgotten by an allow-list.

    Args:
        weights: what the checkpoint consists of.
        kept: folders whose weights are copied as they are.
        means: name → path of the file that a link leads to: weights are not copied under another name either.

    Raises:
        UsageError: a folder that has the name of a file which the conversion writes.
    """
    mine = {*weights.shards, weights.index_name, "config.json"}
    copied: list[str] = []
    left: dict[str, str] = {}
    mistral = any(why.startswith("Mistral") for why in weights.left.values())
    for name in names:
        if name in mine:
            continue
        first, below, _ = name.partition("/")
        if below and (first in WRITTEN or _OUR_SHARD.fullmatch(first)):
            raise UsageError(f"{first}: is a folder, and the conversion writes a file of that name; rename it")
        path, target = PurePosixPath(name), PurePosixPath(means.get(name, name))
        if name in weights.left:
            left[name] = weights.left[name]
        elif path.suffix == ".safetensors" and path.parent.as_posix() in kept:
            copied.append(name)
        elif ".safetensors" in (path.suffix, target.suffix) or is_index(name):
            left[name] = "weights outside the index"
        elif path.name == ADAPTER_CONFIG:
            left[name] = "describes an adapter"
        elif {path.suffix, target.suffix} & {*PICKLED, *FOREIGN} or path.parts[0] in _WEIGHT_FOLDERS:
            left[name] = "weights of another format"
        elif _PICKLED_INDEX.fullmatch(name) or (mistral and name == "params.json"):
            left[name] = "describes weights that are left out"
        elif describes_quantization(name):
            left[name] = "describes the source's quantization"
        elif name in _WRITTEN_ANEW:
            left[name] = "written anew"
        elif name in (".gitattributes", ".gitignore"):
            left[name] = "belongs to the source's repository"
        elif is_hidden(name):
            left[name] = "hidden: no loader reads it"
        else:
            copied.append(name)
    return tuple(copied), left
