"""Repositories, commits and blobs, as files below one folder.

- repos/OWNER/NAME/repo.json: visibility, refs (name → commit), pull requests
- repos/OWNER/NAME/commits/ID.json: parent, title, date, and the whole tree: path → entry
- blobs/git/SHA1: small files, by git blob id
- blobs/lfs/SHA256: large files
- cas/: the xet store
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support.hub.xet import XetStore

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
LFS_BYTES = 10 << 20  # any file above this goes to LFS, as on the Hub


class HubError(Exception):
    """What the client gets: a status, the `X-Error-Code` header, a message."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True)
class Entry:
    """A file in a tree. `oid` is the git blob id: of the content, or of the pointer to an LFS object."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def pointer(self) -> bytes:
        version = "https://git-lfs.github.com/spec/v1"
        return f"version {version}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @classmethod
    def lfs(cls, sha256: str, size: int) -> "Entry":
        return cls(git_blob_id(cls("", size, sha256).pointer), size, sha256)


@dataclass
class Commit:
    parent: str | None
    title: str
    date: str
    author: str
    files: dict[str, Entry]


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    created: str = field(default_factory=now)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{threading.get_ident()}")
    scratch.write_bytes(content)
    scratch.replace(path)


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.xet = XetStore(root / "cas")

    # Repositories and refs

    def _folder(self, repo_id: str) -> Path:
        return self.root / "repos" / repo_id

    def repo(self, repo_id: str) -> Repo:
        path = self._folder(repo_id) / "repo.json"
        if not path.exists():
            raise HubError(404, "Repository not found", "RepoNotFound")
        return Repo(**json.loads(path.read_bytes()))

    def save(self, repo: Repo) -> None:
        _write(self._folder(repo.id) / "repo.json", json.dumps(vars(repo), indent=1).encode())

    def create(self, repo_id: str, private: bool, author: str) -> Repo:
        if (self._folder(repo_id) / "repo.json").exists():
            raise HubError(409, "You already created this model repo")
        repo = Repo(repo_id, private)
        # As on the Hub, a new repository has a first commit with a .gitattributes.
        attributes = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_SUFFIXES).encode()
        files = {".gitattributes": self.add_regular(attributes)}
        repo.refs["main"] = self.add_commit(repo, Commit(None, "initial commit", now(), author, files))
        self.save(repo)
        return repo

    def resolve(self, repo: Repo, revision: str) -> str:
        """A branch, `refs/pr/N`, `refs/heads/NAME` or a commit id → the commit id."""
        name = revision.removeprefix("refs/heads/")
        if name in repo.refs:
            return repo.refs[name]
        if (self._folder(repo.id) / "commits" / f"{revision}.json").exists():
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    # Commits

    def commit(self, repo: Repo, oid: str) -> Commit:
        data = json.loads((self._folder(repo.id) / "commits" / f"{oid}.json").read_bytes())
        return Commit(**{**data, "files": {path: Entry(**entry) for path, entry in data["files"].items()}})

    def add_commit(self, repo: Repo, commit: Commit) -> str:
        data = {**vars(commit), "files": {path: vars(entry) for path, entry in commit.files.items()}}
        content = json.dumps(data, indent=1).encode()
        oid = hashlib.sha1(content).hexdigest()
        _write(self._folder(repo.id) / "commits" / f"{oid}.json", content)
        return oid

    def apply(self, repo_id: str, revision: str, author: str, lines: list[dict[str, Any]]) -> str:
        """The `commit` endpoint: all of the operations become one new commit, or none does."""
        with self.lock:
            repo = self.repo(repo_id)
            name = revision.removeprefix("refs/heads/")
            if name not in repo.refs:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            parent = repo.refs[name]
            files = dict(self.commit(repo, parent).files)
            title = ""
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit", parent) != parent:
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                elif key == "deletedFile":
                    if value["path"] not in files:
                        message = f"A file with this name doesn't exist: {value['path']}"
                        raise HubError(404, message, "EntryNotFound")
                    del files[value["path"]]
                elif key == "deletedFolder":
                    inside = value["path"].rstrip("/") + "/"
                    files = {path: entry for path, entry in files.items() if not path.startswith(inside)}
                else:
                    files[value["path"]] = self._entry(key, value)
            repo.refs[name] = self.add_commit(repo, Commit(parent, title, now(), author, files))
            self.save(repo)
            return repo.refs[name]

    def _entry(self, key: str, value: dict[str, Any]) -> Entry:
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) > LFS_BYTES:
                raise HubError(413, f"{value['path']} is too large to be a regular file")
            return self.add_regular(content)
        if key == "lfsFile":
            size = self.lfs_size(value["oid"], value.get("size"))
            if size is None:
                raise HubError(400, f"LFS pointer points to a file that does not exist: {value['path']}")
            return Entry.lfs(value["oid"], size)
        raise HubError(400, f"unknown operation {key}")

    # Blobs

    def add_regular(self, content: bytes) -> Entry:
        oid = git_blob_id(content)
        _write(self.root / "blobs/git" / oid, content)
        return Entry(oid, len(content))

    def add_lfs(self, source: Path) -> str:
        """Moves a received file to its place. Returns its sha256."""
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        target = self.lfs_path(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        return sha256

    def lfs_path(self, sha256: str) -> Path:
        return self.root / "blobs/lfs" / sha256

    def lfs_size(self, sha256: str, claimed: int | None) -> int | None:
        """The size of an object that was uploaded, by either path; None when there is none."""
        path = self.lfs_path(sha256)
        if path.exists():
            return path.stat().st_size
        if self.xet.find(sha256) is None:
            return None
        if claimed is None:  # a copy within the repository carries no size; a commit before it does
            return next((e.size for e in self._all_entries() if e.sha256 == sha256), None)
        return claimed

    def _all_entries(self) -> list[Entry]:
        commits = self.root.glob("repos/*/*/commits/*.json")
        return [Entry(**e) for c in commits for e in json.loads(c.read_bytes())["files"].values()]

    def content(self, entry: Entry) -> Path:
        """Where the bytes of a file lie, rebuilt from the xet store first if need be."""
        if entry.sha256 is None:
            return self.root / "blobs/git" / entry.oid
        path = self.lfs_path(entry.sha256)
        with self.lock:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                scratch = path.with_suffix(".rebuilding")
                self.xet.rebuild(entry.sha256, entry.size, scratch)
                scratch.replace(path)
        return path
