"""Which safetensors files hold a model's weights: those that Transformers and vLLM load. Names only, no weights.

Transformers (modeling_utils.py, `_get_resolved_checkpoint_files`) opens `model.safetensors` and nothing else where
there is one, otherwise the files of `model.safetensors.index.json`. vLLM (default_loader.py, `_prepare_weights`;
weight_utils.py, `filter_duplicate_safetensors_files`) opens the files of that index, and without one every
`*.safetensors` of the folder. Where the two would open different files, nothing here chooses: the refusal names both.

Some files are weights of the model for neither, whatever else lies beside them: adapters, Mistral's `consolidated`
copy under other tensor names, variants (`model.fp16.safetensors`), the state of a training run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import PurePosixPath
from typing import Any

from xpuquant.errors import DamagedError, UsageError
from xpuquant.values import frozen

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

FOREIGN = (".gguf", ".ggml", ".onnx", ".onnx_data", ".msgpack", ".h5", ".tflite", ".npz", ".mlmodel")
"""Weights of other programs."""

_ANY_INDEX = re.compile(r".*\.safetensors\.index\.(?:[\w-]+\.)?json")
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")

_NOT_WEIGHTS = {
    "an adapter, not weights of the model": re.compile(
        r"(?!.*(?:merged|fused))(?:adapters?[-_.].*|(?:.*[-_.])?loras?(?:[-_.].*)?)", re.I
    ),
    "Mistral's copy of the weights, under other tensor names": re.compile(r"consolidated[-.].*"),
    "a variant of the weights, which loaders open only when asked for it": re.compile(
        r"(?:model|pytorch_model|diffusion_pytorch_model)(?:-\d+-of-\d+)?\.(?!safetensors)[\w-]+\.safetensors"
    ),
    "state of a training run": re.compile(r"(?:optimizer|scheduler|scaler|rng_state|training_args)[\w.-]*"),
}
"""Why a file holds no weights of the model → its name."""


@frozen
class WeightFiles:
    """The files of a checkpoint.

    shards      in order
    index       tensor → shard; None where no index is used
    index_name  the index file that is used
    left        safetensors file of the root → why it is no part of the checkpoint
    notes       what is odd about them, and what was left out
    """

    shards: tuple[str, ...]
    index: Mapping[str, str] | None = None
    index_name: str | None = None
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def is_index(name: str) -> bool:
    """Whether a file lists the shards of safetensors weights, of any variant."""
    return _ANY_INDEX.fullmatch(name) is not None


def why_no_weights(name: str) -> str | None:
    """Why a safetensors file is no weights of the model, by its name alone; None where it may be."""
    return next((why for why, pattern in _NOT_WEIGHTS.items() if pattern.fullmatch(name)), None)


def index_file(names: Iterable[str]) -> str | None:
    """The index, by its usual name or the only other one in the root. That of Mistral's copy or of a variant counts
    only where there is nothing else.

    Raises:
        UsageError: several that could be meant.
    """
    names = list(names)
    found = [name for name in names if is_index(name) and "/" not in name]
    if INDEX in found:
        return INDEX
    others = any(_in_root(name) and why_no_weights(name) is None for name in names)
    usual = [name for name in found if why_no_weights(_weights_of(name)) is None]
    found = usual if usual or others else found
    if len(found) > 1:
        raise UsageError(f"more than one index: {', '.join(found)}; keep one")
    return found[0] if found else None


def _weights_of(index_name: str) -> str:
    """`model.fp16.safetensors` for `model.safetensors.index.fp16.json`: the name its weights would have as one file."""
    stem, _, rest = index_name.partition(".safetensors.index.")
    variant = rest.removesuffix("json")
    return f"{stem}.{variant}safetensors"


def _in_root(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name


def parse_index(index: Mapping[str, Any], name: str) -> dict[str, str]:
    """tensor → shard.

    Raises:
        DamagedError: no weight_map, or a shard that is not a plain file name of this folder.
    """
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise DamagedError(f"{name}: has no weight_map")
    shards: dict[str, str] = {}
    files: dict[str, str] = {}
    for tensor, shard in table.items():
        if isinstance(shard, str) and shard in shards:
            files[tensor] = shards[shard]
            continue
        if not isinstance(shard, str) or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise DamagedError(f"{name}: '{tensor}' is in {shard!r}, which is no safetensors file")
        # `./x.safetensors` is x.safetensors, for loaders that join paths.
        file = str(PurePosixPath(shard))
        if PurePosixPath(file).name != file or "\\" in file:
            raise DamagedError(f"{name}: '{tensor}' is in {shard!r}, outside the folder")
        files[tensor] = shards[shard] = file
    return files


def pick_weight_files(
    names: Iterable[str], index: Mapping[str, str] | None, index_name: str | None, named: str | None = None
) -> WeightFiles:
    """The files that hold the checkpoint.

    Args:
        index: what `index_name` says, see `parse_index`; None where there is no index.
        named: `transformers_weights` of config.json: the file or index that Transformers opens instead.

    Raises:
        UsageError: there are no safetensors weights, or it cannot be told which are meant.
        DamagedError: a shard is missing.
    """
    names = list(names)
    present = [name for name in names if _in_root(name)]
    found = None if index is None or index_name is None else _indexed(present, index, index_name)
    if found is None:
        stale = [] if index_name is None else [f"{index_name} lists files that are not there: ignored"]
        found = _unindexed(names, present, stale)
    if named and named not in (*found.shards, found.index_name):
        raise UsageError(
            f"Transformers loads {named} ('transformers_weights' of config.json), vLLM {_shown(found.shards)}; "
            "remove the one that is not meant, and the key"
        )
    return found


def _indexed(present: Sequence[str], index: Mapping[str, str], index_name: str) -> WeightFiles | None:
    """The files of the index; None for an index of files that have been replaced by `model.safetensors`."""
    shards, there = sorted(set(index.values())), set(present)
    missing = [shard for shard in shards if shard not in there]
    if SINGLE in there and SINGLE not in shards:
        if len(missing) == len(shards):
            return None
        raise UsageError(
            f"Transformers loads {SINGLE}, vLLM the files that {index_name} lists ({_shown(shards)}); remove the "
            "weights that are not meant, and for a single file the index"
        )
    if missing:
        raise DamagedError(f"{missing[0]} is missing, {index_name} lists it; download it again")
    left = {name: why_no_weights(name) or "weights outside the index" for name in present if name not in set(shards)}
    notes = tuple(f"{name} is not in {index_name}: left out, as loaders do" for name in left)
    return WeightFiles(tuple(shards), index, index_name, left, notes)


def _unindexed(names: Sequence[str], present: Sequence[str], notes: Sequence[str]) -> WeightFiles:
    left = {name: why for name in present if (why := why_no_weights(name)) is not None}
    shards = [name for name in present if name not in left]
    if not shards:
        shards, left = _only_copies(names, left)
    if SINGLE in shards and len(shards) > 1:
        others = [name for name in shards if name != SINGLE]
        raise UsageError(
            f"Transformers loads {SINGLE} alone, vLLM {_shown(others)} as well, and no index says which are meant; "
            "remove what is not, or add an index"
        )
    _check_sets(shards)
    said = (f"{name} is left out: {why}" for name, why in left.items())
    return WeightFiles(tuple(shards), left=left, notes=(*notes, *said))


def _only_copies(names: Sequence[str], left: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """What vLLM opens where nothing has a usual name: Mistral's copy, or the only variant.

    Raises:
        UsageError: nothing is the weights of a model.
    """
    for kind in ("Mistral", "variant"):
        copies = [name for name, why in left.items() if kind in why]
        if copies:
            return copies, {name: why for name, why in left.items() if name not in copies}
    for name in left:
        raise UsageError(f"{name} is {left[name]}, and there are no others; merge it into its base model first")
    for name in names:
        if name.endswith(PICKLED):
            raise UsageError(
                f"{name}: pickled weights are never opened (they can run code); save the model as safetensors "
                "first: model.save_pretrained(folder, safe_serialization=True)"
            )
    for name in names:
        if name.endswith(FOREIGN):
            raise UsageError(
                f"{name}: weights of another format, which is not read, and no *.safetensors file beside it"
            )
    inner = sorted({name.rpartition("/")[0] for name in names if name.endswith(".safetensors")})
    if inner:
        raise UsageError(
            f"no *.safetensors file in the folder itself, only below it: {_shown(inner)}; name the folder that has "
            "both config.json and weights"
        )
    raise UsageError("no *.safetensors file in the folder")


def are_of_one_set(one: str, other: str) -> bool:
    """Whether two files are numbered shards of one export."""
    matches = [_SHARD.fullmatch(name) for name in (one, other)]
    return all(matches) and len({(match[1], match[3]) for match in matches if match}) == 1


def _check_sets(shards: Sequence[str]) -> None:
    """Raises DamagedError where one of `-00001-of-00003` is missing, UsageError where two sets have one name or an
    incomplete one lies beside others."""
    held: dict[str, dict[int, set[int]]] = {}
    for name in shards:
        if match := _SHARD.fullmatch(name):
            held.setdefault(match[1], {}).setdefault(int(match[3]), set()).add(int(match[2]))
    several = [name for name in shards if (match := _SHARD.fullmatch(name)) and len(held[match[1]]) > 1]
    if several:
        raise UsageError(
            f"{several[0]} and {several[-1]} are of two exports, and no index says which is meant; remove one"
        )
    for stem, totals in held.items():
        for total, numbers in totals.items():
            # The smallest that is absent: at most one more than there are files.
            missing = next(number for number in range(1, len(numbers) + 2) if number not in numbers)
            if missing > total:
                continue
            others = [name for name in shards if not name.startswith(f"{stem}-")]
            if others:
                raise UsageError(
                    f"shard {missing} of {total} of {stem} is missing, {others[0]} lies beside the others, and no "
                    "index says which are meant; remove what is not"
                )
            raise DamagedError(f"shard {missing} of {total} is missing; download it again")


def _shown(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
