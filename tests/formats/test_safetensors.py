"""The container parser against everything a stranger can write into a header; the reference library is the oracle."""

from __future__ import annotations

import gc
import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from support.headers import BAD_HEADERS

from xpuquant.errors import MESSAGE_LENGTH, DamagedError
from xpuquant.formats.dtypes import BITS
from xpuquant.formats.safetensors import MAX_HEADER_BYTES, build_header, collector_paused, header_length, parse_header


def parse(header: bytes, data_bytes: int = 0) -> dict[str, Any]:
    return dict(parse_header(header, "model.safetensors", 8 + len(header) + data_bytes))


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_refuses_in_one_line(case: str) -> None:
    header, data_bytes, message = BAD_HEADERS[case]
    with pytest.raises(DamagedError, match=r"^model\.safetensors: ") as raised:
        parse(header, data_bytes)
    text = str(raised.value)
    assert message in text
    assert text.isprintable() and len(text) <= MESSAGE_LENGTH


@pytest.mark.parametrize(
    ("prefix", "size", "message"),
    [
        (b"", 0, "too few"),
        (b"\1\0\0", 3, "too few"),
        (struct.pack("<Q", 2**64 - 1), 100, "claims a header"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), 2**40, "claims a header"),
        (struct.pack("<Q", 1000), 100, "truncated inside its header"),
        (struct.pack("<Q", 10), 2**60, "more than any checkpoint"),
        (b"PK\3\4\0\0\0\0", 100, "truncated inside its header"),
    ],
)
def test_refuses_a_wrong_length(prefix: bytes, size: int, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        header_length(prefix, "model.safetensors", size)


def test_empty_tensors_and_scalars_are_legal() -> None:
    header = build_header([("empty", "F16", (0, 5), 0), ("scalar", "F32", (), 4), ("none", "U8", (0,), 0)], {})
    tensors = parse(header[8:], 4)
    assert [(t.name, t.shape, t.nbytes) for t in tensors.values()] == [
        ("empty", (0, 5), 0),
        ("scalar", (), 4),
        ("none", (0,), 0),
    ]


def test_tensors_called_like_the_fields_of_a_description() -> None:
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i, name in enumerate(("dtype", "shape", "data_offsets"))
    }
    assert list(parse(json.dumps(entries).encode(), 3)) == ["dtype", "shape", "data_offsets"]


def test_headers_of_other_writers_are_read() -> None:
    spaced = b' {"__metadata__": {"format": "pt"}, "a": {"data_offsets": [0, 1], "shape": [1], "dtype": "U8"}}   '
    assert list(parse(spaced, 1)) == ["a"]
    assert parse(b"{}") == {}


def many(count: int) -> bytes:
    tensors = ((f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.w", "F16", (1, 1), 2) for i in range(count))
    return build_header(tensors, {})[8:]


def test_a_million_tensors_take_seconds_and_no_more_memory_than_they_need() -> None:
    """A tenth of them here; scripts/lanes/trust takes the million through the command line."""
    header = many(100_000)
    began = time.process_time()
    assert len(parse(header, 200_000)) == 100_000
    assert time.process_time() - began < 10
    few = many(10_000)
    tracemalloc.start()
    try:
        assert len(parse(few, 20_000)) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 1200 * 10_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("filler", [b"[],", b"{},", b"[[[[[]]]]],", b"0,", b"[0],", b'"",'])
def test_small_text_does_not_become_large_memory(filler: bytes) -> None:
    """A list takes 25 times its text; so they are counted before they are made."""
    header = b'{"a":[' + filler * (40_000_000 // len(filler)) + b"0]}"
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="objects and lists"):
            parse(header)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(st.characters(categories=("L", "N"), include_characters="._-"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(set(BITS) - {"F4", "F6_E2M3", "F6_E3M2", "C64"})), SHAPES),
    max_size=6,
)


@given(TENSORS)
def test_what_is_built_is_parsed_back(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    listed = []
    for name, (dtype, shape) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        listed.append((name, dtype, shape, count * BITS[dtype] // 8))
    header = build_header(listed, {"format": "pt"})
    assert len(header) % 8 == 0
    data = bytes(sum(size for *_, size in listed))
    parsed = parse(header[8:], len(data))
    assert {t.name: (t.dtype, t.shape, t.nbytes) for t in parsed.values()} == {
        name: (dtype, shape, size) for name, dtype, shape, size in listed
    }
    # The reference library agrees that this is a safetensors file, and on what it holds.
    theirs = dict(safetensors.deserialize(header + data))
    assert {name: tuple(held["shape"]) for name, held in theirs.items()} == {
        name: shape for name, (_, shape) in tensors.items()
    }


SEED = build_header([("a.qweight", "I32", (4, 8), 128), ("a.scales", "F16", (2, 8), 32), ("b", "F32", (), 4)], {})


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_no_mutation_is_accepted_that_the_reference_library_refuses(
    edits: list[tuple[int, int]], data: st.DataObject
) -> None:
    blob = bytearray(SEED + bytes(164))
    for at, value in edits:
        blob[at] = value
    del blob[data.draw(st.integers(len(blob) - 3, len(blob))) :]
    try:
        length = header_length(bytes(blob[:8]), "f", len(blob))
        ours = set(parse_header(bytes(blob[8 : 8 + length]), "f", len(blob)))
    except DamagedError:
        return
    assert ours == {name for name, _ in safetensors.deserialize(bytes(blob))}


def test_a_real_file_reads_as_the_reference_library_reads_it() -> None:
    path = Path(__file__).parent.parent / "fixtures" / "gptqmodel-qwen3-w4g32" / "model.safetensors"
    blob = path.read_bytes()
    length = header_length(blob[:8], path.name, len(blob))
    ours = parse_header(blob[8 : 8 + length], path.name, len(blob))
    theirs = dict(safetensors.deserialize(blob))
    assert {name: blob[t.begin : t.end] for name, t in ours.items()} == {
        name: bytes(held["data"]) for name, held in theirs.items()
    }


def test_what_is_made_while_the_collector_pauses_is_not_looked_through_at_once() -> None:
    looked: list[str] = []
    gc.callbacks.append(lambda phase, info: looked.append(phase))
    try:
        with collector_paused():
            made: list[list[int]] = [[] for _ in range(10_000)]
        later: list[list[int]] = [[] for _ in range(10)]
        assert not looked and gc.isenabled() and len(made) > len(later)
    finally:
        gc.callbacks.pop()


def test_what_a_process_has_frozen_stays_so() -> None:
    """Servers freeze what they have before they fork."""
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with collector_paused():
            pass
        assert frozen and gc.get_freeze_count() > frozen // 2
    finally:
        gc.unfreeze()
