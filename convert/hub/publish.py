"""From a converted folder to a repository on the Hub, such that nobody can ever load half of it.

What flows: every local file is hashed and compared with what the Hub lists; the large ones that differ are uploaded one
by one, which changes nothing that a reader can see; then one single commit names all new files, the index, config.json
and the removal of stale shards at once. Before that commit the repository is what it was (empty, or the complete older
model), after it the complete new one. Comparing again afterwards is the check of the checksums.

What survives a crash: uploaded bytes stay on the Hub (by sha256 over LFS, by chunk over xet), so the same command
uploads only what is missing. A commit whose answer was lost is found by the next comparison; so nothing here needs to
know how far an earlier attempt came.

A conversion that keeps no output (`--stream --push-to`) uploads each shard as soon as it is finished, to a staging
branch (`Target.stage`); the final commit copies them from there. A staging branch never holds a config.json.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xpuquant.conversion.hub.blobs import Blob, git_digest
from xpuquant.conversion.hub.client import WAITS, connect, explain, is_transient, status_of
from xpuquant.conversion.hub.destination import Destination
from xpuquant.conversion.hub.target import MAIN, Target
from xpuquant.conversion.progress import Progress, Reporter
from xpuquant.conversion.repo.card_merge import CARD, merge, read_card, rename
from xpuquant.conversion.repo.checksums import hash_file, limit_of, wrong_size
from xpuquant.conversion.repo.journal import PROVENANCE, Finished
from xpuquant.conversion.sources.repo_files import MAX_COPIED_BYTES, list_files
from xpuquant.conversion.sources.secret_names import secret_notes
from xpuquant.conversion.sources.unfinished import begun
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.verify.foreign import UNPROTECTED, loadable
from xpuquant.conversion.verify.integrity import REPORTS, VERDICT
from xpuquant.conversion.verify.record_form import lacks_digests, read_record
from xpuquant.errors import (
    Argument,
    DamagedError,
    EnvironmentFault,
    NotVerifiedError,
    UsageError,
    VerificationError,
    XpuquantError,
)
from xpuquant.values import frozen

COMMIT_MESSAGE = "Convert for Intel GPUs with xpuquant"

_WEIGHTS = ".safetensors"
_LARGE_BYTES = 10_000_000
"""Uploaded one by one ahead of the commit; smaller files travel in it."""

_STALE = re.compile(r"(.*-\d+-of-\d+|model)\.safetensors|model\.safetensors\.index\.json")
"""Names that conversions write. Other files of the repository are its owner's and stay."""

_CONFLICT = 412  # HTTP: somebody else has committed


@frozen(sealed=True)
class Pushed:
    """What a push did.

    revision   branch, or `refs/pr/N`
    commit     its id; the repository's files at this commit equal the local ones
    uploaded   files that were new or different
    unchanged  files that were there already
    removed    files of an older conversion, which the new one does not have
    nbytes     bytes of `uploaded`
    notes      remarks for the user
    """

    repo_id: str
    url: str
    revision: str
    commit: str
    uploaded: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...] = ()


def push(
    folder: Path, to: Destination, reporter: Reporter, *, token: str | bool | None = None, endpoint: str | None = None
) -> Pushed:
    """Upload a converted folder; run it again to finish or repeat it.

    Args:
        to: an existing repository keeps its visibility; a pull request is the one that an earlier push opened.
        token: of the Hub; None: the client's own login, False: none.
        endpoint: address of another Hub.

    Raises:
        UsageError: not a finished conversion, a bad repo id.
        NotVerifiedError: it was never verified, and `to` does not say to publish it all the same.
        DamagedError: a file is missing, or is not what the conversion wrote; one that it did not write may be run.
        EnvironmentFault: network, permissions.
        VerificationError: the Hub holds other bytes than were sent.
    """
    names = local_files(folder)
    if not to.unverified and never_verified(folder):
        raise NotVerifiedError(
            f"{folder} {NEVER_VERIFIED}; convert it with verification, or pass ", Argument("unverified", True)
        )
    tree = Tree(folder)
    _check_whole(tree, names)
    for remark in secret_notes(names, "published"):
        reporter.note(remark)
    reporter.phase("push", sum(tree.size(name) for name in names))
    blobs = hash_files(tree, names)
    target = Target(connect(token, endpoint), to.repo_id)
    target.create(to.private)
    target.open(to.branch or MAIN, to.pr)
    return publish_repo(target, tree, blobs, {}, reporter.advance)


NEVER_VERIFIED = "was converted without verification: nothing has shown that it is what the source is"


def never_verified(folder: Path) -> bool:
    """Whether a conversion was put into a folder without having been compared with its source: some module or tensor in
    its record has no digest, which the comparison takes. False of a folder without a record.

    Raises:
        DamagedError: the record is none that a conversion writes. EnvironmentFault: it cannot be read.
    """
    tree = Tree(folder)
    return folder.is_dir() and tree.holds(PROVENANCE) and lacks_digests(read_record(tree))


def local_files(folder: Path) -> list[str]:
    """The files to publish, weights first.

    Raises:
        UsageError: not a finished conversion.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    tree = Tree(folder)
    if (left := begun(tree)) is not None:
        raise UsageError(f"{folder}: {left}")
    names = list_files(folder)
    _check_files(tree, ("config.json", PROVENANCE, CARD, VERDICT, *REPORTS))
    for needed in ("config.json", PROVENANCE):
        if needed not in names:
            raise UsageError(f"{folder}: has no {needed}; push wants a folder that a conversion wrote")
    return sorted(names, key=lambda name: (not name.endswith(_WEIGHTS), name == "config.json", name))


def _check_files(tree: Tree, expected: Iterable[str]) -> None:
    """Raises DamagedError for what is no file: a push that passed it over would publish another model."""
    for name, what in tree.strays(expected).items():
        raise DamagedError(f"{tree.path / name}: {what}; move it away")


def _check_whole(tree: Tree, names: Iterable[str]) -> None:
    record = read_record(tree)
    written = {*record["shards"], *record["files"]}
    _check_files(tree, written)
    missing = sorted(written - set(names))
    if missing:
        raise DamagedError(f"{tree.path / missing[0]} is missing, and the conversion wrote it; convert again")


def hash_files(tree: Tree, names: Iterable[str]) -> dict[str, Blob]:
    """Name → blob, of local files. What is not as the record has it is not published; what weights decode to is not
    looked at.

    Raises:
        DamagedError: one is not what the conversion wrote, or it wrote none such and a loader may run or read it; a
            record that is none.
        UsageError: one has a second name elsewhere, and the record does not know it by its sha256.
        EnvironmentFault: unreadable files.
    """
    record = read_record(tree)
    shards, blobs = record["shards"], dict[str, Blob]()
    written = {**{name: entry["sha256"] for name, entry in shards.items()}, **record["files"]}
    for name in names:
        danger = None if name in (*written, *UNPROTECTED) else loadable(name)
        if danger is not None:
            raise DamagedError(
                f"{tree.path / name} was not written by the conversion, and {danger}; move it away, or convert again"
            )
        nbytes = shards.get(name, {}).get("bytes")
        wrong = wrong_size(tree, name, nbytes)
        if wrong is not None:
            raise DamagedError(f"{tree.path / name} {wrong}; it is not what the conversion wrote; convert it again")
        if name in UNPROTECTED or name not in written:
            _check_ours(tree, name)
        blobs[name] = blob = _blob(tree, name, limit_of(nbytes))
        if name not in UNPROTECTED and written.get(name, blob.sha256) != blob.sha256:
            raise DamagedError(f"{tree.path / name} is not what the conversion wrote; convert it again")
    return blobs


def _check_ours(tree: Tree, name: str) -> None:
    """Raises UsageError for a file that nothing tells from somebody else's: the record has no sha256 of it, and it has
    a second name, which an archive or a program may have made of any file."""
    try:
        tree.check_sole(name)
    except UsageError:
        raise UsageError(
            f"{tree.path / name}: has a second name elsewhere (a hard link) and would be published; push a copy of the "
            "folder (cp -r), or move the file away"
        ) from None


def _blob(tree: Tree, name: str, limit: int = MAX_COPIED_BYTES) -> Blob:
    sha256 = hash_file(tree, name, limit)
    try:
        git = None if name.endswith(_WEIGHTS) else git_digest(tree, name)
        return Blob(tree.size(name), sha256, git)
    except OSError as error:
        raise EnvironmentFault(f"{tree.path / name}: cannot be read ({error.strerror})") from error


def publish_repo(
    target: Target, tree: Tree, wanted: dict[str, Blob], staged: Mapping[str, Finished], report: Progress
) -> Pushed:
    """Bring files of a folder, and shards from the staging branch, to the target's revision in one commit.

    Args:
        wanted: name → blob, of the folder's files.
        staged: name → shard, of those on `target.staging`.
        report: told bytes that are on the Hub; the size of every file, once.

    Raises: as `push`.
    """
    wanted = wanted | {name: Blob(shard.nbytes, shard.sha256, None) for name, shard in staged.items()}
    uploads = _Uploads(target, tree, set(staged), report)
    removed: set[str] = set()
    fault: Exception | None = None
    # Compare, change, compare again: the last comparison is the check, however the change before it ended.
    for wait in (0.0, *WAITS, None):
        head = target.head()
        remote = target.files(head)
        notes = _merge_card(target, tree, wanted, head if CARD in remote else None)
        missing = [name for name, blob in wanted.items() if name not in remote or not blob.is_same(remote[name])]
        stale = sorted(name for name in remote if _STALE.fullmatch(name) and name not in wanted)
        if not missing and not stale:
            unchanged = [name for name in wanted if name not in uploads.sent]
            report(sum(wanted[name].nbytes for name in wanted if name not in uploads.reported))
            target.finish()
            return Pushed(
                target.repo_id,
                target.url,
                target.revision,
                head,
                tuple(uploads.sent),
                tuple(unchanged),
                tuple(sorted(removed)),
                sum(uploads.sent.values()),
                notes,
            )
        if wait is None:
            break
        removed |= set(stale)
        time.sleep(wait)
        fault = uploads.attempt(head, {name: wanted[name].nbytes for name in missing}, stale)
    if fault is not None:
        raise explain(fault, target.repo_id) from fault
    message = f"{target.repo_id}: {[*missing, *stale][0]} there is not what was uploaded; push again"
    raise VerificationError(message, files=frozenset())  # here nothing is wrong


class _Uploads:
    """Uploads and commits. What one attempt has brought to the Hub, the next does not upload again.

    sent      name → bytes, of files that were new or different
    reported  names whose bytes were reported as progress
    """

    def __init__(self, target: Target, tree: Tree, staged: set[str], report: Progress) -> None:
        self.sent: dict[str, int] = {}
        self.reported: set[str] = set()
        self._target = target
        self._tree = tree
        self._staged = staged
        self._report = report
        self._uploaded: dict[str, Any] = {}

    def attempt(self, head: str, missing: Mapping[str, int], stale: Iterable[str]) -> Exception | None:
        """Upload and commit once. Returns a fault that another attempt may get over."""
        from huggingface_hub import CommitOperationDelete

        self.sent |= missing
        try:
            operations: list[Any] = [self._operation(name, nbytes) for name, nbytes in missing.items()]
            operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
            self._target.api.create_commit(
                self._target.repo_id,
                operations,
                commit_message=COMMIT_MESSAGE,
                revision=self._target.revision,
                parent_commit=head,
            )
        except XpuquantError:
            raise
        except Exception as error:
            # A conflict means that somebody else committed since the comparison: compare again.
            if status_of(error) != _CONFLICT and not is_transient(error):
                raise explain(error, self._target.repo_id) from error
            return error
        self._uploaded.clear()  # the client refuses to commit an operation twice
        return None

    def _operation(self, name: str, nbytes: int) -> Any:
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy

        if name in self._staged:
            return CommitOperationCopy(name, name, src_revision=self._target.staging)
        if nbytes < _LARGE_BYTES and not name.endswith(_WEIGHTS):
            return CommitOperationAdd(name, self._path(name))
        if name not in self._uploaded:
            operation = CommitOperationAdd(name, self._path(name))
            self._target.upload(operation)
            self._uploaded[name] = operation
            self.reported.add(name)
            self._report(nbytes)
        return self._uploaded[name]

    def _path(self, name: str) -> Path:
        """A file for the client, which opens paths by itself: looked at once more, and compared after the commit."""
        self._tree.size(name)
        return self._tree.path / name


def _merge_card(target: Target, tree: Tree, wanted: dict[str, Blob], remote: str | None) -> tuple[str, ...]:
    """Bring the folder's card in line with the one at commit `remote`, so that no edit is lost; returns remarks."""
    if CARD not in wanted:
        return ()
    ours = read_card(tree)
    theirs = None if remote is None else target.text(CARD, remote)
    text, remark = merge(rename(ours, target.repo_id), theirs)
    if remark is not None:
        del wanted[CARD]
        return (remark,)
    if text != ours:
        tree.write(CARD, text.encode())
        wanted[CARD] = _blob(tree, CARD)
    return ()
