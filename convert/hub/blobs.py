"""What the Hub says a file is, and whether a file here is that.

The tree of a commit lists every file: with its size, and its sha256 where it is a large one (an LFS object), or git's
sha1 of it where it is not. The commit names the tree, and so the content: whatever a server, a proxy or a disk between
there and here did, shows as a difference. The client itself compares sizes.
"""

from __future__ import annotations

import hashlib
import re

from xpuquant.conversion.tree import Tree
from xpuquant.errors import DamagedError, EnvironmentFault, shown
from xpuquant.values import frozen

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@frozen
class Blob:
    """The identity of a file's content.

    sha256  None for a file on the Hub that is no LFS object
    git     git blob id (a sha1); None for local weights, which are LFS objects always
    """

    nbytes: int
    sha256: str | None
    git: str | None

    def is_same(self, remote: Blob) -> bool:
        """Whether a local file has the content of a remote one."""
        if remote.sha256 is not None:
            return self.sha256 == remote.sha256
        return self.git is not None and self.git == remote.git


def listed_blob(name: str, nbytes: object, sha256: object, git: object) -> Blob:
    """A file as a server lists it.

    Raises:
        DamagedError: the list says of it what can be said of no file.
    """
    # Sizes are of files below an exabyte: what is larger overflows where files are made.
    if type(nbytes) is not int or not 0 <= nbytes < 1 << 60:
        raise DamagedError(f"{shown(name)} has the size {shown(nbytes)} in the Hub's list")
    for digest, form in ((sha256, _SHA256), (git, _SHA1)):
        if digest is not None and not (isinstance(digest, str) and form.fullmatch(digest)):
            raise DamagedError(f"{shown(name)} has a digest in the Hub's list that is none: {shown(digest)}")
    return Blob(nbytes, sha256 if isinstance(sha256, str) else None, git if isinstance(git, str) else None)


def checked_commit(sha: object) -> str:
    """A commit's id, as a server gives it: the client makes files of that name.

    Raises:
        DamagedError: it is none.
    """
    if not isinstance(sha, str) or _SHA1.fullmatch(sha) is None:
        raise DamagedError(f"the Hub names a commit that is none: {shown(sha)}")
    return sha


def mismatch(tree: Tree, name: str, blob: Blob) -> str | None:
    """How a file here differs from what the Hub says that it is; None where it does not.

    Raises:
        EnvironmentFault: it cannot be read.
    """
    try:
        nbytes = tree.size(name)
        if nbytes != blob.nbytes:
            return f"has {nbytes} bytes, the Hub says {blob.nbytes}"
        kind, stated = ("sha256", blob.sha256) if blob.sha256 is not None else ("git sha1", blob.git)
        if stated is None:
            return "has no digest in the Hub's list: there is nothing to compare it with"
        found = _digest(tree, name, nbytes, kind)
    except OSError as error:
        raise EnvironmentFault(f"{tree.path / name}: cannot be read ({error.strerror})") from error
    return None if found == stated else f"has {kind} {found[:12]}…, the Hub says {stated[:12]}…"


def blob_named(name: str, nbytes: int) -> Blob | None:
    """What a file of the client's cache is by its name there, which is the Hub's digest of it; None by any other."""
    if _SHA256.fullmatch(name):
        return Blob(nbytes, name, None)
    return Blob(nbytes, None, name) if _SHA1.fullmatch(name) else None


def git_digest(tree: Tree, name: str) -> str:
    """git's sha1 of a file. Raises OSError."""
    return _digest(tree, name, tree.size(name), "git sha1")


def _digest(tree: Tree, name: str, nbytes: int, kind: str) -> str:
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % nbytes)
    for part in tree.chunks(name, nbytes):
        digest.update(part)
    return digest.hexdigest()
