"""sha256 of files, and the seal by which a JSON file of ours vouches for itself."""

from __future__ import annotations

import hashlib
import re

from xpuquant.conversion.progress import Progress
from xpuquant.conversion.sources.repo_files import MAX_COPIED_BYTES
from xpuquant.conversion.tree import Tree, Written
from xpuquant.errors import EnvironmentFault, shown

_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"')
UNSEALED = "0" * 64
"""What a JSON object holds as its first field, `sha256`, until it is sealed."""


def hashed(tree: Tree, name: str, limit: int, progress: Progress | None = None) -> Written:
    """sha256 of a file, and which file it was.

    Args:
        limit: bytes that it may have.
        progress: told the bytes of each part that was read.

    Raises:
        OSError: it cannot be read. DamagedError, UsageError: it is no file or too large, or changed meanwhile, see
            `Tree`.
    """
    digest, parts = hashlib.sha256(), tree.chunks(name, limit)
    while True:
        try:
            part = next(parts)
        except StopIteration as end:
            return Written(digest.hexdigest(), end.value)
        digest.update(part)
        if progress is not None:
            progress(len(part))


def hash_file(tree: Tree, name: str, limit: int, progress: Progress | None = None) -> str | None:
    """sha256 of a file, in hex; None where there is no such file.

    Args:
        limit, progress: as `hashed`.

    Raises:
        EnvironmentFault: it cannot be read. DamagedError, UsageError: as `hashed`.
    """
    try:
        return hashed(tree, name, limit, progress).sha256
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EnvironmentFault(f"{tree.path / name}: cannot be read ({error.strerror})") from error


def wrong_size(tree: Tree, name: str, nbytes: object) -> str | None:
    """How a file's size shows that it cannot be what was written; None where it does not. A sparse file of a terabyte
    costs its maker nothing: it is not read to be told apart.

    Args:
        nbytes: as recorded, of a shard; None of other files, which have a limit.

    Raises:
        EnvironmentFault: it cannot be looked at. DamagedError, UsageError: it is no file, see `Tree`.
    """
    try:
        size = tree.size(name)
    except OSError as error:
        raise EnvironmentFault(f"{tree.path / name}: cannot be read ({error.strerror})") from error
    if nbytes is None:
        return f"has {size} bytes, more than any file beside the weights" if size > MAX_COPIED_BYTES else None
    return f"has {size} bytes, {shown(nbytes)} were written" if size != nbytes else None


def limit_of(nbytes: object) -> int:
    """Bytes of a file that is read after `wrong_size` found nothing wrong.

    Args:
        nbytes: as there.
    """
    return nbytes if isinstance(nbytes, int) else MAX_COPIED_BYTES


def seal(content: bytes) -> bytes:
    """Put the sha256 of a JSON file into its first field, where `UNSEALED` stands: the sha256 of the bytes given."""
    hole = _SEAL.search(content)
    assert hole is not None and hole[1] == UNSEALED.encode(), "the first sha256 of the file is its own"
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[: hole.start(1)] + digest + content[hole.end(1) :]


def is_sealed(content: bytes) -> bool:
    """Whether a file still has the bytes that it was sealed with."""
    hole = _SEAL.search(content)
    if hole is None:
        return False
    unsealed = content[: hole.start(1)] + UNSEALED.encode() + content[hole.end(1) :]
    return hashlib.sha256(unsealed).hexdigest() == hole[1].decode()
