"""Nibbles for tests: one packer for numpy, one packer and unpacker for torch.

Written from the definition and sharing nothing with the package, so that a mistake there cannot hide here. Codes are
below 16; of two in a byte the even one is the low nibble; words are little-endian. Other widths are packed one code at
a time by `support.ints.stream`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # some lanes have no torch
    import torch

Array = np.ndarray[Any, Any]


def pack_bytes(codes: Array) -> Array:
    """uint8 `[..., C/2]` from integers `[..., C]`."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def pack_words(codes: Array) -> Array:
    """int32 `[..., C/8]` from integers `[..., C]`: code j of a word at bit 4j."""
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for j in range(8):
        words |= codes[..., j::8].astype(np.uint32) << np.uint32(4 * j)
    return words.view(np.int32)


def pack_tensor(codes: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., C/2]` from uint8 `[..., C]`; viewed as int32, words with code j at bit 4j."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous()


def unpack_tensor(stored: torch.Tensor) -> torch.Tensor:
    """int32 codes `[..., 8n]` from int32 words `[..., n]`, or `[..., 2n]` from bytes."""
    import torch

    octets = stored.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), -1).flatten(-2).int()
