"""safetensors headers that no reader may accept: (header, bytes after it, a part of the message)."""

from __future__ import annotations

import json
from typing import Any


def entry(dtype: Any = "F16", shape: Any = (2, 3), offsets: Any = (0, 12), **more: Any) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}).encode()


BAD_HEADERS: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 0, "not JSON"),
    "not JSON": (b"hello", 0, "not JSON"),
    "a list": (b"[]", 0, "not a JSON object"),
    "deep": (b"[" * 100_000, 0, "not JSON"),
    "deep objects": (b'{"a":' * 100_000, 0, "not JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', 0, "not JSON"),
    "a lone surrogate": (b'{"\\ud800": {"dtype":"F16","shape":[],"data_offsets":[0,2]}}', 2, "control characters"),
    "a byte order mark": (b"\xef\xbb\xbf{}", 0, "not JSON"),
    "NaN": (entry(shape=[float("nan")]), 12, "NaN in its header"),
    "Infinity": (entry(offsets=[0, float("inf")]), 12, "Infinity in its header"),
    "a number of 10^5 digits": (b'{"a":{"dtype":"F16","shape":[' + b"9" * 100_000 + b"]}}", 0, "not JSON"),
    "two of a name": (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', 1, "names 'a' twice"),
    "two of a key": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', 1, "'dtype' twice"),
    "an escape in a name": (b'{"\\u001b[2J": {}}', 0, "control characters"),
    "a newline in a name": (b'{"a\\nb": {}}', 0, "control characters"),
    "a bidi override in a name": ('{"a\u202eb": {}}'.encode(), 0, "control characters"),
    "an empty name": (b'{"": {"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1, "empty"),
    "a name of 10^6 characters": (json.dumps({"a" * 10**6: {}}).encode(), 0, "too long"),
    "a tensor that is a list": (b'{"a": []}', 0, "no description"),
    "no dtype": (b'{"a":{"shape":[],"data_offsets":[0,0]}}', 0, "unknown dtype None"),
    "an unknown dtype": (entry(dtype="INT4"), 12, "unknown dtype 'INT4'"),
    "a dtype that is a deep list": (entry(dtype=json.loads("[" * 500 + "]" * 500)), 12, "unknown dtype"),
    "a negative size": (entry(shape=[-2, -3]), 12, "no valid shape"),
    "a size that is true": (entry(shape=[True, 6]), 12, "no valid shape"),
    "a size that is 2.0": (entry(shape=[2.0, 3]), 12, "no valid shape"),
    "a size that is a string": (entry(shape=["2", "3"]), 12, "no valid shape"),
    "a shape that is a number": (entry(shape=6), 12, "no valid shape"),
    "100 dimensions": (entry(shape=[1] * 100), 12, "no valid shape"),
    "a size beyond 2^64": (entry(shape=[2**70]), 12, "no valid shape"),
    "a product beyond 2^64": (entry(shape=[2**40, 2**40]), 12, "impossible shape"),
    "a product beyond 2^64 that is 0": (entry(shape=[2**62, 2**62, 0], offsets=[0, 12]), 12, "takes 12"),
    "negative offsets": (entry(offsets=[-12, 0]), 12, "no valid data_offsets"),
    "one offset": (entry(offsets=[0]), 12, "no valid data_offsets"),
    "offsets in reverse": (entry(offsets=[12, 0]), 12, "takes -12"),
    "offsets beyond the file": (entry(shape=[2**30], offsets=[0, 2**31]), 12, "truncated"),
    "too few bytes for the dtype": (entry(dtype="F32"), 12, "24 bytes, but takes 12"),
    "half a byte": (entry(dtype="F4", shape=[3], offsets=[0, 2]), 2, "does not end on a byte"),
    "bytes after the last tensor": (entry(), 13, "1 bytes after"),
    "a hole": (entry(offsets=[4, 16]), 16, "a hole before it"),
    "an overlap": (
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
        6,
        "overlaps",
    ),
    **{
        f"metadata: {said}": (b'{"__metadata__":' + said.encode() + b"}", 0, "__metadata__")
        for said in ("[]", "7", '"x"', "true", '{"a":1}', '{"a":null}', '{"a":["b"]}', '{"a":{}}')
    },
    "the same bytes twice": (
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        4,
        "overlaps",
    ),
}
