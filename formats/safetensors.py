"""The safetensors container: read a header, build a header. Tensor bytes are never touched here.

    8 bytes   N, little-endian u64
    N bytes   JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}
    rest      tensor bytes; offsets count from here, cover it without holes or overlap

The rules are those of `safetensors/src/tensor.rs`. Files come from strangers, so every one is checked before
anything is allocated from it, and each breach names the file and the tensor.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from xpuquant.errors import DamagedError, shown
from xpuquant.formats.dtypes import BITS
from xpuquant.values import frozen

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation; about 10^6 tensors."""

MAX_FILE_BYTES = 1 << 43
"""8 TiB. A sparse file costs its sender nothing; planning one of exabytes would cost the receiver all memory."""

MAX_CONTAINERS = 6_000_000
"""JSON objects and lists in one header: three per tensor. An empty list is 3 bytes of text and 64 of memory."""

MAX_NAME = 1024
"""Characters of a tensor name; the longest seen in the wild has 120."""

PREFIX_BYTES = 8
METADATA_KEY = "__metadata__"
_MAX_DIMS = 32
_MAX_ELEMENTS = 1 << 62


@frozen(slots=True)
class Tensor:
    """One tensor of a file: where its bytes lie and what they are.

    dtype  safetensors label (`I32`, `BF16`, `F8_E4M3`, ...)
    file   name of the shard, relative to the repo
    begin  absolute offset of the first byte in the file; `end` is one past the last
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class _Entry(NamedTuple):
    """What a header says of one tensor, not yet checked."""

    dtype: Any
    shape: Any
    offsets: Any


_LFS_POINTER = b"version "
"""The first 8 bytes of what `git clone` leaves without Git LFS. As a length they would be an exabyte and more."""


def header_length(prefix: bytes, file: str, file_size: int) -> int:
    """Bytes of the JSON header, from the first 8 bytes of a file of `file_size` bytes.

    Raises:
        DamagedError: the file is too short or the length cannot be right.
    """
    if len(prefix) < PREFIX_BYTES:
        _damaged(file, f"has {file_size} bytes, too few for a safetensors header")
    if file_size > MAX_FILE_BYTES:
        _damaged(file, f"claims {file_size} bytes, more than any checkpoint has")
    if prefix.startswith(_LFS_POINTER):
        _damaged(file, "is Git LFS's pointer to the file, not the file: run `git lfs pull` in its folder")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        _damaged(file, f"claims a header of {length} bytes; it is not a safetensors file, or is damaged")
    if length > file_size - PREFIX_BYTES:
        _damaged(file, f"is truncated inside its header ({file_size} bytes, header needs {length + 8})")
    return length


def parse_header(header: bytes, file: str, file_size: int) -> dict[str, Tensor]:
    """Name → tensor of one file, in file order.

    Args:
        header: the JSON bytes.
        file: shard name, used in messages and in the result.
        file_size: bytes of the whole file.

    Raises:
        DamagedError: anything the format forbids, or a file shorter than its header promises.
    """
    data_start = PREFIX_BYTES + len(header)
    with collector_paused():
        entries = _load_json(header, file)
        _check_metadata(entries.pop(METADATA_KEY, {}), file)
        # Popped, so that a million entries do not stay beside a million tensors.
        tensors = [_tensor(name, entries.pop(name), file, data_start) for name in list(entries)]
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = data_start
    for tensor in tensors:
        if tensor.begin != position:
            what = "overlaps the tensor before it" if tensor.begin < position else "leaves a hole before it"
            _damaged(file, f"tensor '{tensor.name}' {what}")
        position = tensor.end
    if position > file_size:
        _damaged(
            file,
            f"is truncated: {file_size} bytes, its header promises {position} "
            f"(tensor '{tensors[-1].name}' is cut); download it again",
        )
    if position < file_size:
        _damaged(file, f"has {file_size - position} bytes after its last tensor")
    return {tensor.name: tensor for tensor in tensors}


def header_metadata(header: bytes, file: str) -> dict[str, str]:
    """`__metadata__` of one file, empty where it has none.

    Raises: as `parse_header`.
    """
    with collector_paused():
        metadata = _load_json(header, file).get(METADATA_KEY, {})
    _check_metadata(metadata, file)
    return dict(metadata or {})


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file (prefix and header), padded so that the data starts 8-byte aligned.

    Args:
        tensors: (name, dtype label, shape, bytes), in file order.
        metadata: `__metadata__`; `{"format": "pt"}` is what Transformers insists on.
    """
    header: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % PREFIX_BYTES)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection while millions of objects come to be: it would look through all of them again and again,
    for cycles that JSON and plans do not have. That was more than half of the time of 10^6 tensors."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():
                # What came to be stays for long: so it joins the oldest objects, instead of being looked through now.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _load_json(header: bytes, file: str) -> dict[str, Any]:
    shared: dict[Any, Any] = {}

    def no_duplicates(pairs: list[tuple[str, Any]]) -> Any:
        table = dict(pairs)
        if len(table) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            _damaged(file, f"names '{twice}' twice in its header")
        if len(table) == 3 and type(shape := table.get("shape")) is list and _are_counts(shape):
            # A description: kept small. Most tensors of a file share a few dtypes and shapes.
            dtype, offsets, known = table.get("dtype"), table.get("data_offsets"), tuple(shape)
            if type(dtype) is str and type(offsets) is list:
                return _Entry(shared.setdefault(dtype, dtype), shared.setdefault(known, known), offsets)
        return table

    def no_constant(text: str) -> NoReturn:
        _damaged(file, f"has {text} in its header")

    containers = header.count(b"{") + header.count(b"[")
    if containers > MAX_CONTAINERS or header.count(b",") > 2 * MAX_CONTAINERS:
        _damaged(file, f"has a header of {containers} objects and lists; about 10^6 tensors are possible")
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (RecursionError, ValueError) as error:
        _damaged(file, f"has a header that is not JSON ({type(error).__name__}: {error})")
    if not isinstance(entries, dict):
        _damaged(file, "has a header that is not a JSON object")
    return entries


def _check_metadata(metadata: Any, file: str) -> None:
    """Text to text, as the reference implementation wants it (`HashMap<String, String>`): loaders stop at any other."""
    if metadata is None:
        return
    if type(metadata) is not dict:
        _damaged(file, f"has a {METADATA_KEY} that is no object: {shown(metadata)}")
    for name, value in metadata.items():
        if type(value) is not str:
            _damaged(file, f"has a {METADATA_KEY} with {shown(name)} that is no text: {shown(value)}")


def _tensor(name: str, entry: Any, file: str, data_start: int) -> Tensor:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        _damaged(file, f"has a tensor name that is empty, too long or holds control characters: '{name}'")
    if type(entry) is dict:
        entry = _Entry(entry.get("dtype"), entry.get("shape"), entry.get("data_offsets"))
    elif type(entry) is not _Entry:
        _damaged(file, f"tensor '{name}' has no description")
    dtype, shape, offsets = entry
    if type(dtype) is not str or dtype not in BITS:
        _damaged(file, f"tensor '{name}' has unknown dtype {shown(dtype)}")
    if type(shape) not in (list, tuple) or len(shape) > _MAX_DIMS or not _are_counts(shape):
        _damaged(file, f"tensor '{name}' has no valid shape: {shown(shape)}")
    if type(offsets) is not list or len(offsets) != 2 or not _are_counts(offsets):
        _damaged(file, f"tensor '{name}' has no valid data_offsets: {shown(offsets)}")
    count = math.prod(shape)
    if count > _MAX_ELEMENTS:
        _damaged(file, f"tensor '{name}' has an impossible shape {shown(shape)}")
    begin, end = offsets
    size, rest = divmod(count * BITS[dtype], 8)
    if rest:
        _damaged(file, f"tensor '{name}' ({dtype} {shape}) does not end on a byte")
    if end - begin != size:
        _damaged(file, f"tensor '{name}' is {dtype} {shape}, {size} bytes, but takes {end - begin}")
    return Tensor(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


def _are_counts(values: Sequence[Any]) -> bool:
    # `type is int`, not isinstance: true is no size. A loop, because this runs two million times for a large repo.
    for value in values:  # noqa: SIM110
        if type(value) is not int or value < 0 or value > _MAX_ELEMENTS:
            return False
    return True


def _damaged(file: str, what: str) -> NoReturn:
    raise DamagedError(f"{file}: {what}")
