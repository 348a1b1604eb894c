"""A repository on the Hub to publish to: it is created, a branch or pull request opened, files listed and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.hub.blobs import Blob, checked_commit, listed_blob
from xpuquant.conversion.hub.client import retried, status_of
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.sources.repo_files import read_text
from xpuquant.conversion.tree import Tree
from xpuquant.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
CONFIG = "config.json"
PULL_REQUEST_TITLE = "Converted for Intel GPUs with xpuquant"


class Target:
    """Where a push goes. `create` and `open` are called first.

    repo_id   completed with the user's name by `create`
    revision  branch or `refs/pr/N`
    staging   branch that holds shards of an unfinished push, where there is one
    """

    def __init__(self, api: HfApi, repo_id: str) -> None:
        self.api = api
        self.repo_id = repo_id
        self.revision = MAIN
        self.staging: str | None = None
        self._pull_request: int | None = None

    @property
    def url(self) -> str:
        page = f"{self.api.endpoint}/{self.repo_id}"
        return page if self._pull_request is None else f"{page}/discussions/{self._pull_request}"

    def create(self, private: bool) -> None:
        """Create the repository unless it exists.

        Raises:
            UsageError: not a repo id. EnvironmentFault: not logged in, no right to write there, network.
        """
        try:
            made = self._retried(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
        except UsageError as error:
            # The Hub answers "not found" to those it does not know.
            if status_of(error) == 401:
                raise EnvironmentFault(
                    f"{self.repo_id}: not logged in to the Hub; run `hf auth login`, or set HF_TOKEN"
                ) from error
            raise
        self.repo_id = str(made.repo_id)

    def open(self, branch: str, pull_request: bool) -> None:
        """Open the branch (made from main), or our pull request (the one of an earlier push, or a new draft)."""
        if pull_request:
            self._pull_request = int(self._retried(self._find_or_open))
            self.revision = f"refs/pr/{self._pull_request}"
            return
        if branch != MAIN:
            self.make_branch(branch)
        self.revision = branch

    def make_branch(self, branch: str) -> None:
        """Make a branch from main, unless it exists."""
        self._retried(lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True))

    def head(self, revision: str | None = None) -> str:
        """Commit id of `revision`; None means the one to publish to."""
        info = self._retried(lambda: self.api.model_info(self.repo_id, revision=revision or self.revision))
        return checked_commit(info.sha)

    def files(self, revision: str) -> dict[str, Blob]:
        """Path → blob, of every file at a revision."""
        entries = self._retried(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)))
        return {
            entry.path: listed_blob(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in entries
            if hasattr(entry, "blob_id")
        }

    def text(self, path: str, revision: str) -> str:
        """The text of a small file."""
        file = self._retried(lambda: self.api.hf_hub_download(self.repo_id, path, revision=revision))
        text = read_text(Tree(Path(file).parents[path.count("/")]), path)
        if text is None:
            raise EnvironmentFault(f"{self.repo_id}: {path} there is too large to be read")
        return text

    def upload(self, operation: Any) -> None:
        """Upload a large file, for a commit that will name it. Raises what the client raises."""
        self.api.preupload_lfs_files(self.repo_id, [operation], revision=self.revision, free_memory=False)

    def open_staging(self, branch: str, shards: Mapping[str, int]) -> dict[str, Finished]:
        """Open the branch that finished shards of a streamed conversion go to.

        Args:
            shards: name → bytes of the shards that belong there.

        Returns:
            Those that are there already.
        """
        self.make_branch(branch)
        self.staging = branch
        there = self.files(self.head(branch))
        if CONFIG in there:
            return {}  # just made from main: what it holds is the older model's
        return {
            name: Finished(there[name].sha256 or "", nbytes)
            for name, nbytes in shards.items()
            if name in there and there[name].nbytes == nbytes
        }

    def stage(self, tree: Tree, name: str, shard: Finished) -> None:
        """Commit one shard to the staging branch. The first commit there removes what came with the branch, so that
        nobody can load a mixture from it."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def commit() -> None:
            there = self.files(self.head(self.staging))
            if CONFIG not in there and name in there and there[name].sha256 == shard.sha256:
                return  # committed by an attempt whose answer was lost
            tree.size(name)  # a file still: the client opens paths by itself
            operations: list[Any] = [CommitOperationAdd(name, tree.path / name)]
            if CONFIG in there:
                others = there.keys() - {name, ".gitattributes"}
                operations += [CommitOperationDelete(other, is_folder=False) for other in sorted(others)]
            self.api.create_commit(self.repo_id, operations, revision=self.staging, commit_message=f"Stage {name}")

        self._retried(commit)

    def finish(self) -> None:
        """After the last commit: a draft pull request asks for review, the staging branch goes."""
        if self._pull_request is not None:
            number = self._pull_request
            details = self._retried(lambda: self.api.get_discussion_details(self.repo_id, number))
            if details.status == "draft":
                self._retried(lambda: self.api.change_discussion_status(self.repo_id, number, new_status="open"))
        if self.staging is not None:
            self._drop_branch(self.staging)
            self.staging = None

    def _find_or_open(self) -> int:
        # Found first, also when retrying: a lost answer must not open a second one.
        author = self.api.whoami()["name"]
        opened = self.api.get_repo_discussions(
            self.repo_id, author=author, discussion_type="pull_request", discussion_status="open"
        )
        for request in opened:
            if request.title == PULL_REQUEST_TITLE:
                return request.num
        return self.api.create_pull_request(self.repo_id, PULL_REQUEST_TITLE).num

    def _drop_branch(self, branch: str) -> None:
        from huggingface_hub.errors import RevisionNotFoundError

        def drop() -> None:
            try:
                self.api.delete_branch(self.repo_id, branch=branch)
            except RevisionNotFoundError:
                return  # gone with an attempt whose answer was lost

        self._retried(drop)

    def _retried(self, action: Callable[[], Any]) -> Any:
        return retried(action, self.repo_id)
