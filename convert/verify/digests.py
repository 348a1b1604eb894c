"""Digests of decoded weights: what a repo is compared with when its source is gone.

A digest is of the meaning, not of the bytes: it survives another sharding, and a converter that packed wrongly and
recorded the sha256 of what it wrote does not pass. One is recorded per module at conversion, from the decoded output,
in the pass that has just found it equal to the decoded source.

Definition of `rows_xxh3`, for the module's matrices in order (`linear`; or gate, up, down of each expert, or
gate_up, down):

    codes    XXH3-128 of the codes, row by row in source column order. Of `Packed` rows two to a byte, the even column
             low: `u4` unsigned, `e2m1` as they are. Of `Decoded` rows int8 (int16 above 4 bits) for `int` (code minus
             zero point), int8 for `2e2m1` (twice the number), uint8 for fp8 codes
    zeros    XXH3-128 of the zero points uint8 `[N, G]` of `u4`; `-` where there are none
    scales   XXH3-128 of the stored scale rows that cover each weight row, in their dtype, little-endian; of `2e2m1`
             under the global scale, float64
    columns  XXH3-128 of the scale column of each weight column, int32

and the digest is the sha256 of lines: the scheme as JSON with sorted keys, see `_LATER`; `role expert N K number
scale-dtype codes zeros scales columns` for each matrix; `suffix sha256` for each tensor that rows do not show (bias,
activation scale).
It guards against mistakes, not against people: those would have to get past the sha256 of every file. Repos of earlier
versions have `decoded_xxh3` or `decoded_sha256`: all rows as `Decoded` (e2m1 two to a byte), no word for zero points,
and XXH3-128 or sha256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from xpuquant.formats.layouts.base import Matrix, Stored
from xpuquant.formats.scheme import Scheme
from xpuquant.formats.weights.decoded import each_row, in_order, lies_by_columns
from xpuquant.formats.weights.packed import Packed, Rows

_LATER = ("divides", "gated")
"""Fields that a scheme has got since digests were defined: they are in its line only where they are not at their
default, so that the digests of earlier repos stay what they are."""

_PLAIN_SUFFIXES = ("_bias", "input_scale")

KIND = "rows_xxh3"
"""The kind of digest that conversions record, and its name in xpuquant.json."""


class Hash(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


def _xxh3(data: bytes = b"") -> Hash:
    import xxhash

    return xxhash.xxh3_128(data)


_HASHES: Mapping[str, Callable[..., Hash]] = {
    KIND: _xxh3,
    "decoded_xxh3": _xxh3,
    "decoded_sha256": hashlib.sha256,
}


def digest_in(entry: Mapping[str, Any]) -> tuple[str, str | None]:
    """(kind, digest) of a module in xpuquant.json; the digest is None where there is none of a kind that is known."""
    return next(((kind, entry[kind]) for kind in _HASHES if kind in entry), (KIND, None))


class MatrixDigest:
    """The digest of one matrix, fed with its rows in order: packed where its layout shows them so, but for the kinds
    of earlier versions."""

    def __init__(self, matrix: Matrix, kind: str = KIND) -> None:
        self._matrix = matrix
        self._hash = _HASHES[kind]
        self._codes = self._hash()
        self._zeros = self._hash() if kind == KIND else None
        self._has_zeros = False
        self._scales = self._hash()
        self._columns = ""
        self._types = ""

    def update(self, rows: Rows) -> None:
        codes, number = np.ascontiguousarray(rows.codes).reshape(-1), rows.number
        if isinstance(rows, Packed):
            number = "u4" if number == "int" else number
            if rows.zeros is not None and self._zeros is not None:
                self._has_zeros = True
                self._zeros.update(np.ascontiguousarray(rows.zeros).data)
        elif number == "e2m1":
            pairs = codes.view("<u2")
            codes = (pairs | pairs >> np.uint16(4)).astype(np.uint8)
        self._codes.update(codes.view(np.uint8).data)
        scale = rows.scale if _is_count(rows.row, len(rows.scale)) else np.take(rows.scale, rows.row, axis=0)
        rows_of_scale = in_order(scale) if lies_by_columns(scale) else np.ascontiguousarray(scale)
        self._scales.update(rows_of_scale.reshape(-1).view(np.uint8).data)
        if not self._columns:
            self._types = f"{number} {rows.scale.dtype.name}"
            self._columns = self._hash(rows.col.astype("<i4").data).hexdigest()

    def line(self) -> str:
        matrix = self._matrix
        expert = "-" if matrix.expert is None else str(matrix.expert)
        words = [matrix.role, expert, str(matrix.N), str(matrix.K), self._types, self._codes.hexdigest()]
        if self._zeros is not None:
            words.append(self._zeros.hexdigest() if self._has_zeros else "-")
        return " ".join((*words, self._scales.hexdigest(), self._columns))


def module_digest(stored: Stored, matrices: Sequence[MatrixDigest]) -> str:
    """The digest of a module, from those of its matrices."""
    scheme = asdict(stored.scheme)
    for key in _LATER:
        if scheme[key] == getattr(Scheme, key):
            del scheme[key]
    digest = hashlib.sha256(f"{json.dumps(scheme, sort_keys=True)}\n".encode())
    for matrix in matrices:
        digest.update(f"{matrix.line()}\n".encode())
    for suffix in sorted(stored.tensors):
        if suffix.endswith(_PLAIN_SUFFIXES):
            data = np.ascontiguousarray(stored.array(suffix)).reshape(-1).view(np.uint8)
            digest.update(f"{suffix} {hashlib.sha256(data.data).hexdigest()}\n".encode())
    return digest.hexdigest()


def _is_count(row: np.ndarray[tuple[int, ...], np.dtype[np.int64]], rows: int) -> bool:
    count = each_row(rows)
    return row is count or (len(row) == rows and bool((row == count).all()))
