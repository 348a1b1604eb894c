"""Going on with a shard where a run that was stopped had come to.

A run notes now and then how far each of its shards has come: so many bytes, and their sha256 (`Reached`, in the
journal). It waits for no disk meanwhile. The next run believes none of it: it reads the unfinished file from the front,
hashing, and goes on from the last noted place up to which every byte is as noted. What a kill leaves is in the system's
memory and loses what was made since the last note; what a power cut or a bad disk spoilt shows in the hash, and the
shard goes on from the place before. The sha256 of the whole goes on from the same state, so that a shard made in two
runs is vouched for as one made at once.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate

from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.repo.journal import Reached
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write.output_files import OutputFile
from xpuquant.errors import DamagedError, UsageError

NOTED_BYTES = 256 << 20
"""Between two notes of a shard: half a second of work on a fast disk, some seconds on a slow one, and 20 lines of the
journal in a shard of 5 GB."""

_READ_BYTES = 1 << 20


class Prefix:
    """The first bytes of a shard, hashed.

    nbytes  how many
    digest  sha256 of them, to go on with
    """

    def __init__(self, nbytes: int = 0, digest: hashlib._Hash | None = None) -> None:
        self.nbytes = nbytes
        self.digest = digest or hashlib.sha256()

    def update(self, data: memoryview) -> None:
        """More bytes, right after."""
        self.digest.update(data)
        self.nbytes += data.nbytes


def ends(shard: Shard) -> Iterator[int]:
    """Where each piece of a shard ends, in bytes of its file; the end of the header first. A shard can be gone on with
    there and nowhere else."""
    pieces = (piece.nbytes for tensor in shard.tensors for piece in tensor.pieces)
    return accumulate(pieces, initial=len(shard.header))


def kept_prefix(tree: Tree, shard: Shard, noted: Sequence[Reached]) -> Prefix:
    """What of an unfinished shard is as an earlier run noted it; nothing where there is no such file.

    Args:
        noted: what a journal says, which may be a stranger's.

    Raises:
        OSError: the file cannot be read.
    """
    kept = Prefix()
    wanted = {step.nbytes: step.sha256 for step in noted if step.nbytes <= shard.nbytes}
    wanted = {end: wanted[end] for end in ends(shard) if end in wanted}
    if not wanted or not tree.holds(shard.name):
        return kept
    try:
        file = os.fdopen(tree.update(shard.name, os.O_RDONLY), "rb", buffering=0)
    except (DamagedError, UsageError):
        return kept  # it became a link, or has a second name: it is made anew
    hashed = Prefix()
    with file:
        for end, sha256 in wanted.items():
            while hashed.nbytes < end and (data := file.read(min(_READ_BYTES, end - hashed.nbytes))):
                hashed.update(memoryview(data))
            if hashed.nbytes < end or hashed.digest.hexdigest() != sha256:
                break
            kept = Prefix(end, hashed.digest.copy())
    return kept


class Steps:
    """Which places of a shard that is being written are to be noted, and when: as soon as the system has the bytes
    before one."""

    def __init__(self, shard: Shard, begin: int) -> None:
        self._ends = ends(shard)
        self._end = 0
        self._last = begin
        self._waiting: deque[Reached] = deque()

    def passed(self, made: Prefix, file: OutputFile) -> Iterator[Reached]:
        """The places that can be noted now.

        Args:
            made: all bytes of the shard so far.
        """
        if made.nbytes - self._last >= NOTED_BYTES:
            while self._end < made.nbytes:
                self._end = next(self._ends)
            if self._end == made.nbytes:
                self._waiting.append(Reached(made.nbytes, made.digest.hexdigest()))
                self._last = made.nbytes
        while self._waiting and self._waiting[0].nbytes <= file.handed:
            yield self._waiting.popleft()
