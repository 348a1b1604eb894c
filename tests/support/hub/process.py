"""The Hub as a process: start, seed, arm faults, read the log."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.hub.faults import Request, read_log
from support.hub.handler import TEAM, USERS
from support.hub.store import LFS_SUFFIXES, Commit, Entry, Store, now

TOKEN = next(iter(USERS))
TESTS = Path(__file__).parent.parent.parent

MakeFolder = Callable[..., Path]

__all__ = ["TEAM", "TOKEN", "Hub", "MakeFolder", "contents"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, as `Hub.files` gives those of a repository."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Hub:
    """A server on a free port of 127.0.0.1, with its state below `root`."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.root = root
        command = [sys.executable, "-m", "support.hub", str(root), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(TESTS)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._process.stdout is not None
        self.endpoint = self._process.stdout.readline().strip()

    def stop(self) -> None:
        self._process.communicate(timeout=10)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a client process: this endpoint, a token, and nothing of the machine's own settings."""
        kept = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
        return {**kept, **ours, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}

    # Faults and the log

    def arm(self, *faults: dict[str, Any]) -> None:
        """Spoils requests to come; see `hub.faults.Fault` for the keys. Replaces what was armed."""
        request = urllib.request.Request(f"{self.endpoint}/-/faults", json.dumps(faults).encode())
        urllib.request.urlopen(request).close()

    def faults_left(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.endpoint}/-/faults") as response:
            left: list[dict[str, Any]] = json.load(response)
        return left

    def requests(self) -> list[Request]:
        with suppress(OSError):  # a server that was stopped has nothing under way
            urllib.request.urlopen(f"{self.endpoint}/-/settled").close()
        return read_log(self.root / "requests.jsonl")

    def forget_requests(self) -> None:
        (self.root / "requests.jsonl").unlink(missing_ok=True)

    def forget_objects(self) -> None:
        """Drops every large file: what is pushed next has to be uploaded."""
        for folder in ("blobs/lfs", "cas"):
            shutil.rmtree(self.root / folder, ignore_errors=True)

    # The state, without HTTP

    @property
    def store(self) -> Store:
        return Store(self.root.resolve())

    def seed(self, repo_id: str, folder: Path, *, private: bool = False, gated: bool = False, xet: bool = False) -> str:
        """Makes a repository of a folder's files; returns its commit.

        Args:
            xet: keep large files in the xet store, where clients that can will get them.
        """
        store = self.store
        repo = store.create(repo_id, private, "seed")
        repo.gated = gated
        files: dict[str, Entry] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if path.suffix in LFS_SUFFIXES and xet:
                files[name] = Entry.lfs(store.xet.add(path), path.stat().st_size)
            elif path.suffix in LFS_SUFFIXES:
                scratch = self.root / "seeding"
                scratch.write_bytes(path.read_bytes())
                files[name] = Entry.lfs(store.add_lfs(scratch), path.stat().st_size)
            else:
                files[name] = store.add_regular(path.read_bytes())
        parent = repo.refs["main"]
        files = store.commit(repo, parent).files | files
        repo.refs["main"] = store.add_commit(repo, Commit(parent, "seed", now(), "seed", files))
        store.save(repo)
        return repo.refs["main"]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision, as a reader would get it, but for the .gitattributes."""
        store = self.store
        repo = store.repo(repo_id)
        tree = store.commit(repo, store.resolve(repo, revision)).files
        del tree[".gitattributes"]
        return {path: store.content(entry).read_bytes() for path, entry in tree.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Titles, newest first."""
        store = self.store
        repo = store.repo(repo_id)
        oid: str | None = store.resolve(repo, revision)
        titles = []
        while oid:
            commit = store.commit(repo, oid)
            titles.append(commit.title)
            oid = commit.parent
        return titles
