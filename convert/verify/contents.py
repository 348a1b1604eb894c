"""What a repo holds beside its weights, against what the conversion writes from the source: config.json key by key, the
index, and every file that is copied (tokenizer, templates, generation config, code). sha256 that were recorded again
after a change hide nothing from this.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from xpuquant.conversion.repo.checksums import hash_file, wrong_size
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.quantization import without_quantization
from xpuquant.conversion.sources.repo_files import json_limit, named_twice, read_json
from xpuquant.conversion.sources.weight_files import INDEX
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify.context import Origin
from xpuquant.conversion.verify.verdict import Finding
from xpuquant.errors import DamagedError, EnvironmentFault, one_line, shown
from xpuquant.formats.safetensors import METADATA_KEY, PREFIX_BYTES, header_length, header_metadata

_CONFIG = "config.json"

_TIE = "tie_word_embeddings"

MOST_DIFFERENCES = 20
"""Of one JSON file; a config of another model differs everywhere."""


def check_contents(origin: Origin, tree: Tree, record: Mapping[str, Any]) -> list[Finding]:
    """Compare everything but weights, reports and the card.

    Args:
        record: xpuquant.json.

    Raises:
        EnvironmentFault: unreadable files, network.
    """
    plan, source = origin.plan, origin.source
    written = {_CONFIG: plan.output_config(source.checkpoint.config, str(record.get("producer", "")))}
    if len(plan.shards) > 1:
        written[INDEX] = plan.index()
    before = without_quantization(source.checkpoint.config) if plan.has_own_head else {}
    found = [finding for name, content in written.items() for finding in _json(tree, name, content, before)]
    found += [finding for shard in plan.shards for finding in _metadata(tree, shard.name, shard.header)]
    found += _copied(source, tree)
    recorded = {name for table in ("shards", "files") for name in record.get(table, {})}
    known = {*written, *source.extra_files, *(shard.name for shard in plan.shards)}
    found += [
        _wrong(name, "is recorded as part of the conversion, but the source does not give it")
        for name in sorted(recorded - known)
    ]
    found += [
        _wrong(name, "is what the conversion writes from the source, but xpuquant.json does not record it")
        for name in sorted(known - recorded)
    ]
    return found


def _wrong(where: str, what: str) -> Finding:
    return Finding("integrity", one_line(where), one_line(what))


def _json(tree: Tree, name: str, wanted: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[Finding]:
    """Where a JSON file says something else than the conversion writes. The order of keys says nothing.

    Args:
        before: config.json as conversions wrote it that left the source's `tie_word_embeddings` to a quantized head.
    """
    if not tree.holds(name):
        return  # integrity has reported it
    try:
        held = read_json(tree, name)
        if (twice := named_twice(tree.read(name, json_limit(name)))) is not None:
            yield _wrong(name, f"names {shown(twice)} twice: one loader takes the first, another the last")
    except DamagedError as error:
        yield _wrong(name, str(error))
        return
    if name == _CONFIG:
        yield from _ties(wanted, before, held)
    found = differences(json.loads(json.dumps(wanted)), held)
    for number, what in enumerate(found):
        if number == MOST_DIFFERENCES:
            yield _wrong(name, "differs in more places")
            return
        yield _wrong(name, what)


def _ties(wanted: Mapping[str, Any], before: Mapping[str, Any], held: Any, place: str = "") -> Iterator[Finding]:
    """What an output of before a quantized head was untied says, or does not say, of its head: a fault where the source
    ties it, which vLLM obeys; a warning where the source says nothing, which means what the model's class has. `held`
    says it afterwards."""
    if not isinstance(held, dict):
        return
    for key, value in wanted.items():
        inner = before.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            yield from _ties(value, inner, held.get(key), f"{place}{key}.")
        if key != _TIE or value is not False or (key in before, inner) != (key in held, held.get(key)):
            continue
        if inner is True:
            what = "is true, as in the source, but the head is quantized, and vLLM would multiply with the embeddings"
            yield _wrong(_CONFIG, f"{place}{key} {what}: convert again")
        elif key not in before:
            what = "is missing: an earlier conversion; where the model's class ties the head, vLLM drops this one"
            yield Finding("integrity", _CONFIG, f"{place}{key} {what}: convert again", fails=False)
        else:
            continue
        held[key] = False


def differences(wanted: Any, held: Any, place: str = "") -> Iterator[str]:
    """Where two JSON values differ, in words: `rope_scaling.factor is 2.0, the source gives 8.0`."""
    if isinstance(wanted, dict) and isinstance(held, dict):
        for key in [*wanted, *(key for key in held if key not in wanted)]:
            inner = f"{place}.{key}" if place else str(key)
            if key not in held:
                yield f"{inner} is missing, the source gives {shown(wanted[key])}"
            elif key not in wanted:
                yield f"{inner} is {shown(held[key])}, the source gives no such key"
            else:
                yield from differences(wanted[key], held[key], inner)
    elif isinstance(wanted, list) and isinstance(held, list) and len(wanted) == len(held):
        for i, (ours, theirs) in enumerate(zip(wanted, held, strict=True)):
            yield from differences(ours, theirs, f"{place}[{i}]")
    # As text: NaN equals itself, and 1, 1.0 and true are three things.
    elif json.dumps(wanted, sort_keys=True) != json.dumps(held, sort_keys=True):
        yield f"{place or 'it'} is {shown(held)}, the source gives {shown(wanted)}"


def _metadata(tree: Tree, name: str, header: bytes) -> Iterator[Finding]:
    """Where a shard's `__metadata__` says something else than the conversion writes. Its tensors are compared by value.

    Args:
        header: with which the conversion writes the shard.
    """
    if not tree.holds(name):
        return
    try:
        with os.fdopen(tree.open(name), "rb") as file:
            length = header_length(file.read(PREFIX_BYTES), name, os.fstat(file.fileno()).st_size)
            held = header_metadata(file.read(length), name)
    except DamagedError:
        return  # integrity has reported it
    except OSError as error:
        raise EnvironmentFault(f"{tree.path / name}: cannot be read ({error.strerror})") from error
    for what in islice(differences(header_metadata(header[PREFIX_BYTES:], name), held, METADATA_KEY), MOST_DIFFERENCES):
        yield _wrong(name, what)


def _copied(source: Source, tree: Tree) -> list[Finding]:
    """Files that are copied as they are, each against the source's."""
    missing: Sequence[str] = [name for name in source.extra_files if not tree.holds_anything(name)]
    found = [_wrong(name, "is missing, the source has it") for name in missing]
    with tempfile.TemporaryDirectory(prefix="xpuquant-") as temporary:
        copies = Tree(Path(temporary))
        for name in source.extra_files:
            if name not in missing:
                written = source.copy_file(name, copies)
                # By size first: a file of the repo is read only as far as the source's goes.
                nbytes = written.identity.size
                is_size = wrong_size(tree, name, nbytes) is None
                if not is_size or hash_file(tree, name, nbytes) != written.sha256:
                    found.append(_wrong(name, "is not the source's file"))
                copies.remove(name)
    return found
