"""The server's side of xet, through the client library's own `local://` store.

When a xet token names `local:///folder` as its storage, hf_xet chunks, deduplicates, uploads and
downloads against that folder with the very code that otherwise talks to the network. What remains
for the server is to know which objects are there: the store's shard files (`.mdb`) list, for every
file, its xet hash and its sha256.

Shard format (xet-core, mdb_shard): records of 48 bytes. A header, then per file: a header (hash 32,
flags u32, count u32, unused 8), `count` segments, `count` verification records if flag bit 31 is
set, and one record that begins with the sha256 if flag bit 30 is set; a hash of all ones ends it.
Hashes are four little-endian u64, each written as 16 hexadecimal digits.
"""

import struct
from pathlib import Path

_RECORD = 48
_WITH_VERIFICATION = 1 << 31
_WITH_SHA256 = 1 << 30
_END = b"\xff" * 32


def _hexadecimal(hash_bytes: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", hash_bytes))


def files_of_shard(shard: bytes) -> dict[str, str]:
    """sha256 → xet hash of the files that one `.mdb` shard describes."""
    files = {}
    at = _RECORD
    while shard[at : at + 32] != _END:
        xet_hash = shard[at : at + 32]
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += _RECORD * (1 + count * (2 if flags & _WITH_VERIFICATION else 1))
        if flags & _WITH_SHA256:
            files[_hexadecimal(shard[at : at + 32])] = _hexadecimal(xet_hash)
            at += _RECORD
    return files


class XetStore:
    """The folder that `local://` tokens point to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: set[Path] = set()
        self._files: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"local://{self.folder}"

    def find(self, sha256: str) -> str | None:
        """The xet hash of the object, or None when the store does not have it."""
        shards = set(self.folder.glob("xet/xorbs/shards/*.mdb"))
        if self._read - shards:  # a test has emptied the store
            self._read, self._files = set(), {}
        for shard in shards - self._read:
            self._files |= files_of_shard(shard.read_bytes())
            self._read.add(shard)
        return self._files.get(sha256)

    def add(self, path: Path) -> str:
        """Stores a file; returns its sha256."""
        import hf_xet

        with hf_xet.XetSession().new_upload_commit(
            endpoint=self.url, token="local", token_expiry_unix_secs=1 << 40
        ) as commit:
            handle = commit.start_upload_file(str(path), sha256=hf_xet.COMPUTE_SHA256)
        return str(handle.result().xet_info.sha256)

    def rebuild(self, sha256: str, size: int, target: Path) -> None:
        """Writes the object to `target`, for clients that ask for plain bytes."""
        import hf_xet

        xet_hash = self.find(sha256)
        assert xet_hash is not None
        with hf_xet.XetSession().new_file_download_group(
            endpoint=self.url, token="local", token_expiry_unix_secs=1 << 40
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))
