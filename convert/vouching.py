"""What this user's own runs noted in a folder, told from what a stranger left there.

A staging folder may have come with a clone or an archive. Whatever it says is hashed or compared again before it is
believed, but for a verdict: not to compare again is what it was noted for. So a verdict bears a mark that only who
holds the user's key can make (HMAC-SHA256, RFC 2104). The key lies in the user's folder of state (XDG Base Directory
Specification), never in an output. Where none can be kept, nothing is vouched for: all is compared again.
"""

from __future__ import annotations

import fcntl
import hmac
import os
from contextlib import suppress
from pathlib import Path

from xpuquant.conversion.tree import Tree
from xpuquant.errors import XpuquantError

_KEY_BYTES = 32
_KEY = "key"


def mark_of(content: bytes) -> str | None:
    """The mark of a text, in hex; None where no key can be kept."""
    key = _key()
    return None if key is None else hmac.digest(key, content, "sha256").hex()


def is_ours(content: bytes, mark: object) -> bool:
    """Whether a text bears the mark that a run of this user gave it."""
    wanted = mark_of(content)
    return wanted is not None and isinstance(mark, str) and hmac.compare_digest(wanted, mark)


def _key() -> bytes | None:
    """The user's key, made where there is none yet."""
    home = os.environ.get("HOME", os.path.expanduser("~"))  # noqa: PTH111  # which takes an empty one for the root
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path(home, ".local", "state"))
    if not folder.is_absolute():
        return None
    tree = Tree(folder / "xpuquant")
    with suppress(OSError, XpuquantError):
        tree.make()
        with os.fdopen(tree.update(_KEY, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two first runs make one key
            key = file.read(_KEY_BYTES)
            if not key:
                os.fchmod(file.fileno(), 0o600)
                key = os.urandom(_KEY_BYTES)
                file.write(key)
            return key if len(key) == _KEY_BYTES else None
    return None
