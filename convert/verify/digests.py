"""Digests of decoded weights: what a repo is compared with when its source is gone.

A digest is of the meaning, not of the bytes: it survives another sharding, and a converter that packed wrongly and
recorded the sha256 of what it wrote does not pass. One is recorded per module at conversion, from the decoded output,
in the pass that has just found it equal to the decoded source.

Definition of `decoded_xxh3`, for the module's matrices in order (`linear`; or gate, up, down of each expert, or
gate_up, down):

    codes    XXH3-128 of the codes of `Decoded`, row by row in source column order: int8 (int16 above 4 bits) for
             integers (code minus zero point), uint8 for fp8 codes, two e2m1 codes to a byte (the even column low)
    scales   XXH3-128 of the stored scale rows that cover each weight row, in their dtype, little-endian
    columns  XXH3-128 of the scale column of each weight column, int32

and the digest is the sha256 of lines: the scheme as JSON with sorted keys; `role expert N K number scale-dtype codes
scales columns` for each matrix; `suffix sha256` for each tensor that `Decoded` does not show (bias, activation scale).
It guards against mistakes, not against people: those would have to get past the sha256 of every file. The codes are
twice the bytes of the file, and sha256 of them took longer than all the rest of a verification; repos that were made so
have `decoded_sha256`, the same with sha256 throughout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from xpuquant.formats.layouts.base import Matrix, Stored
from xpuquant.formats.weights.decoded import Decoded

_PLAIN_SUFFIXES = ("_bias", "input_scale")

KIND = "decoded_xxh3"
"""The kind of digest that conversions record, and its name in xpuquant.json."""


class Hash(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


def _xxh3(data: bytes = b"") -> Hash:
    import xxhash

    return xxhash.xxh3_128(data)


_HASHES: Mapping[str, Callable[..., Hash]] = {KIND: _xxh3, "decoded_sha256": hashlib.sha256}


def digest_in(entry: Mapping[str, Any]) -> tuple[str, str | None]:
    """(kind, digest) of a module in xpuquant.json; the digest is None where there is none of a kind that is known."""
    return next(((kind, entry[kind]) for kind in _HASHES if kind in entry), (KIND, None))


class MatrixDigest:
    """The digest of one matrix, fed with its rows in order."""

    def __init__(self, matrix: Matrix, kind: str = KIND) -> None:
        self._matrix = matrix
        self._hash = _HASHES[kind]
        self._codes = self._hash()
        self._scales = self._hash()
        self._columns = ""
        self._types = ""

    def update(self, rows: Decoded) -> None:
        codes = np.ascontiguousarray(rows.codes).reshape(-1)
        if rows.number == "e2m1":
            pairs = codes.view("<u2")
            codes = (pairs | pairs >> np.uint16(4)).astype(np.uint8)
        self._codes.update(codes.view(np.uint8).data)
        scale = rows.scale if _is_count(rows.row, len(rows.scale)) else np.take(rows.scale, rows.row, axis=0)
        self._scales.update(np.ascontiguousarray(scale).reshape(-1).view(np.uint8).data)
        if not self._columns:
            self._types = f"{rows.number} {rows.scale.dtype.name}"
            self._columns = self._hash(rows.col.astype("<i4").data).hexdigest()

    def line(self) -> str:
        matrix = self._matrix
        expert = "-" if matrix.expert is None else str(matrix.expert)
        words = (matrix.role, expert, str(matrix.N), str(matrix.K), self._types)
        return " ".join((*words, self._codes.hexdigest(), self._scales.hexdigest(), self._columns))


def module_digest(stored: Stored, matrices: Sequence[MatrixDigest]) -> str:
    """The digest of a module, from those of its matrices."""
    digest = hashlib.sha256(f"{json.dumps(asdict(stored.scheme), sort_keys=True)}\n".encode())
    for matrix in matrices:
        digest.update(f"{matrix.line()}\n".encode())
    for suffix in sorted(stored.tensors):
        if suffix.endswith(_PLAIN_SUFFIXES):
            data = np.ascontiguousarray(stored.array(suffix)).reshape(-1).view(np.uint8)
            digest.update(f"{suffix} {hashlib.sha256(data.data).hexdigest()}\n".encode())
    return digest.hexdigest()


def _is_count(row: np.ndarray[tuple[int, ...], np.dtype[np.int64]], rows: int) -> bool:
    return len(row) == rows and bool((row == np.arange(rows)).all())
