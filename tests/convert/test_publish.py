"""Publishing: whatever fails on the way, the same command again makes remote bytes equal local bytes, and nobody can
ever load half of a model."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from support.cards import FACTS, NEWER
from support.hub.process import Hub, MakeFolder, contents

from xpuquant import push
from xpuquant.conversion.hub import publish
from xpuquant.conversion.hub.destination import Destination
from xpuquant.conversion.progress import Silent
from xpuquant.conversion.repo.card import render
from xpuquant.errors import DamagedError, EnvironmentFault, UsageError

pytest_plugins = "support.hub.fixtures"

REPO = "me/model"
MODEL = "/api/models/me/model"


def uploads(hub: Hub) -> int:
    """Bytes of weights that went over the wire since the log was cleared (LFS; xet bypasses the server)."""
    return sum(request.received for request in hub.requests() if request.method == "PUT")


def loadable(files: dict[str, bytes]) -> str | None:
    """Which model a loader would find: what config.json says, if all that it needs is there."""
    if "config.json" not in files:
        return None
    index = json.loads(files.get("model.safetensors.index.json", b'{"weight_map": {}}'))
    needed = set(index["weight_map"].values()) or {"model.safetensors"}
    assert needed <= files.keys(), "a config.json without its shards"
    return str(json.loads(files["config.json"])["conversion"])


def test_push_creates_a_private_repo_with_equal_bytes(hub: Hub, client: str, folder: MakeFolder) -> None:
    out = folder()
    pushed = push(out, REPO)
    assert hub.files(REPO) == contents(out)
    assert hub.store.repo(REPO).private
    assert pushed.url == f"{hub.endpoint}/{REPO}"
    assert set(pushed.uploaded) == set(contents(out))
    assert not pushed.unchanged
    assert pushed.nbytes == sum(len(content) for content in contents(out).values())


def test_public_when_asked(hub: Hub, client: str, folder: MakeFolder) -> None:
    pushed = push(folder(), REPO, private=False)
    assert pushed.repo_id == REPO
    assert not hub.store.repo(REPO).private


def test_pushing_again_uploads_and_commits_nothing(hub: Hub, client: str, folder: MakeFolder) -> None:
    out = folder()
    push(out, REPO)
    commits = hub.commits(REPO)
    hub.forget_requests()
    pushed = push(out, REPO)
    assert pushed.uploaded == ()
    assert set(pushed.unchanged) == set(contents(out))
    assert hub.commits(REPO) == commits
    assert not [r for r in hub.requests() if "/commit/" in r.path or r.method == "PUT"]


def test_everything_is_one_commit(hub: Hub, client: str, folder: MakeFolder) -> None:
    push(folder(shards=30, nbytes=1000), REPO)
    assert hub.commits(REPO) == ["Convert for Intel GPUs with xpuquant", "initial commit"]


def test_stale_shards_go_and_the_owners_files_stay(hub: Hub, client: str, folder: MakeFolder) -> None:
    from huggingface_hub import HfApi

    push(folder("old", shards=3), REPO)
    for name in ("adapter.safetensors", "eval.txt"):
        HfApi(endpoint=hub.endpoint).upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id=REPO)
    out = folder("new", shards=1)
    pushed = push(out, REPO)
    assert hub.files(REPO) == contents(out) | {"adapter.safetensors": b"mine", "eval.txt": b"mine"}
    assert len(pushed.removed) == 4  # three shards and the index


class Bytes(Silent):
    """What a push says of its progress, as it says it."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def phase(self, name: str, total: int, before: int = 0) -> None:
        self.total = total

    def advance(self, nbytes: int) -> None:
        self.done += nbytes


def test_progress_counts_every_byte_once(hub: Hub, client: str, folder: MakeFolder) -> None:
    out = folder()
    total = sum(len(content) for content in contents(out).values())
    for _ in range(2):
        told = Bytes()
        publish.push(out, Destination(REPO), told)
        assert (told.total, told.done) == (total, total)


class Notes(Silent):
    """What a push remarks before it begins."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_a_file_that_is_called_like_a_secret_is_said(hub: Hub, client: str, folder: MakeFolder) -> None:
    out, told = folder(), Notes()
    (out / "id_rsa").write_text("mine")
    publish.push(out, Destination(REPO), told)
    assert told.said == ["id_rsa is called like a secret, and is published: move it away if it is one"]


def test_branch(hub: Hub, client: str, folder: MakeFolder) -> None:
    out = folder()
    pushed = push(out, REPO, branch="int4/g128")
    assert pushed.revision == "int4/g128"
    assert hub.files(REPO, "int4/g128") == contents(out)
    assert hub.files(REPO) == {}


def test_pull_request_is_opened_once_and_then_added_to(hub: Hub, client: str, folder: MakeFolder) -> None:
    first = push(folder("old"), REPO, pr=True)
    out = folder("new", shards=2)
    second = push(out, REPO, pr=True)
    assert first.revision == second.revision == "refs/pr/1"
    assert first.url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.files(REPO, "refs/pr/1") == contents(out)
    assert hub.files(REPO) == {}
    assert [pull["status"] for pull in hub.store.repo(REPO).pulls] == ["open"]


# Faults: (method, path, how often); `mode` says which transport meets it, None for both.
FAULTS = [
    ("POST", "/api/repos/create", 2, None),
    ("GET", f"{MODEL}/revision/", 2, None),
    ("GET", f"{MODEL}/tree/", 2, None),
    ("POST", f"{MODEL}/preupload/", 2, None),
    ("POST", f"{MODEL}/commit/", 2, None),
    ("GET", f"{MODEL}/xet-write-token/", 2, "xet"),
    ("POST", r"\.git/info/lfs/objects/batch", 2, "lfs"),
    ("PUT", "/-/part/", 2, "lfs"),
    ("POST", "/-/complete/", 2, "lfs"),
    ("POST", r"/objects/verify", 2, "lfs"),
]
HOW = [{"status": 503}, {"status": 429}, {"drop": "before"}, {"drop": "after"}]


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[1].replace(MODEL, "").strip("/"))
def test_faults_are_retried(
    hub: Hub, client: str, folder: MakeFolder, fault: tuple[str, str, int, str | None], how: dict[str, object]
) -> None:
    method, path, times, mode = fault
    if mode not in (None, client):
        pytest.skip("the other transport's endpoint")
    out = folder(shards=2)
    hub.arm({"method": method, "path": path, "times": times if "status" in how else 1, **how})
    push(out, REPO)
    assert not hub.faults_left()
    assert hub.files(REPO) == contents(out)
    assert len(hub.commits(REPO)) == 2, "a commit whose answer was lost is not made twice"


@pytest.mark.parametrize("step", range(12))
def test_stopped_anywhere_never_half_new_and_finished_by_the_same_command(
    hub: Hub, client: str, folder: MakeFolder, step: int
) -> None:
    """The server goes away for good at the n-th request of a push over an older model."""
    old = folder("old", shards=3)
    push(old, REPO)
    out = folder("new", shards=2)
    hub.arm({"method": "", "path": "^/(api|me|-)", "skip": step, "times": 9999, "drop": "before"})
    with suppress(EnvironmentFault):
        push(out, REPO)
    hub.arm()
    # All of one or all of the other: the last requests come after the commit, and only compare.
    assert hub.files(REPO) in (contents(old), contents(out))
    push(out, REPO)
    assert hub.files(REPO) == contents(out)
    assert loadable(hub.files(REPO)) == "new"


def test_a_first_push_that_stops_is_not_loadable(hub: Hub, client: str, folder: MakeFolder) -> None:
    out = folder()
    hub.arm({"method": "POST", "path": "/commit/", "status": 503, "times": 999})
    with pytest.raises(EnvironmentFault, match=r"HTTP 503.*run the same command again"):
        push(out, REPO)
    assert loadable(hub.files(REPO)) is None
    hub.arm()
    hub.forget_requests()
    push(out, REPO)
    assert hub.files(REPO) == contents(out)
    assert uploads(hub) == 0, "the weights were there already"


def test_somebody_elses_commit_in_between_is_kept(hub: Hub, client: str, folder: MakeFolder) -> None:
    from huggingface_hub import HfApi

    push(folder("old"), REPO)
    out = folder("new")
    hub.arm({"method": "POST", "path": f"{MODEL}/commit/", "status": 412})
    push(out, REPO)
    HfApi(endpoint=hub.endpoint).upload_file(path_or_fileobj=b"x", path_in_repo="theirs.txt", repo_id=REPO)
    push(out, REPO)
    assert hub.files(REPO) == contents(out) | {"theirs.txt": b"x"}


def test_a_conflicting_parent_is_noticed(hub: Hub, client: str, folder: MakeFolder) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    push(folder("old"), REPO)
    parent = hub.store.repo(REPO).refs["main"]
    push(folder("new"), REPO)
    with pytest.raises(HfHubHTTPError):
        HfApi(endpoint=hub.endpoint).create_commit(
            REPO, [CommitOperationAdd("x", b"x")], commit_message="x", parent_commit=parent
        )


# The card


def test_the_cards_edits_survive_a_push(hub: Hub, client: str, folder: MakeFolder) -> None:
    from huggingface_hub import HfApi

    out = folder()
    (out / "README.md").write_text(render(FACTS))
    push(out, REPO)
    published = hub.files(REPO)["README.md"]
    assert f"vllm serve {REPO}".encode() in published
    edited = published.replace(b"<!-- xpuquant:begin", b"It is fast.\n<!-- xpuquant:begin")
    HfApi(endpoint=hub.endpoint).upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=REPO)
    (out / "README.md").write_text(render(NEWER))
    push(out, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert "It is fast." in card
    assert NEWER.command in card
    assert hub.files(REPO) == contents(out)
    assert not push(out, REPO).uploaded


def test_a_card_rewritten_on_the_hub_is_left_alone(hub: Hub, client: str, folder: MakeFolder) -> None:
    from huggingface_hub import HfApi

    out = folder()
    (out / "README.md").write_text(render(FACTS))
    push(out, REPO)
    HfApi(endpoint=hub.endpoint).upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id=REPO)
    pushed = push(out, REPO)
    assert hub.files(REPO)["README.md"] == b"# Mine"
    assert pushed.notes == ("README.md there was rewritten by hand: kept as it is",)


def test_the_hub_accepts_the_card(hub: Hub, client: str) -> None:
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import get_session

    text = render(FACTS)
    answer = get_session().post(f"{hub.endpoint}/api/validate-yaml", json={"repoType": "model", "content": text})
    assert answer.status_code == 200
    assert ModelCard(text).data.get("eval_results") is None


# What is refused


def test_a_changed_shard_is_not_published(hub: Hub, client: str, folder: MakeFolder) -> None:
    out = folder()
    with (out / "model-00002-of-00003.safetensors").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(DamagedError, match=r"model-00002-of-00003.*convert it again"):
        push(out, REPO)


@pytest.mark.parametrize("missing", ["config.json", "xpuquant.json"])
def test_only_conversions_are_published(hub: Hub, client: str, folder: MakeFolder, missing: str) -> None:
    out = folder()
    (out / missing).unlink()
    with pytest.raises(UsageError, match=missing):
        push(out, REPO)


def test_unfinished_conversions_are_not_published(client: str, folder: MakeFolder) -> None:
    out = folder()
    (out / ".xpuquant").mkdir()
    with pytest.raises(UsageError, match="unfinished"):
        push(out, REPO)


def test_no_such_folder(client: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        push(tmp_path / "nothing", REPO)


def test_branch_and_pr_exclude_each_other(client: str, folder: MakeFolder) -> None:
    with pytest.raises(UsageError, match="exclude"):
        push(folder(), REPO, branch="x", pr=True)


@pytest.mark.parametrize(
    ("repo_id", "token", "said"),
    [
        (REPO, False, "not logged in.*hf auth login"),
        (REPO, "hf_wrong", "does not know this token"),
        ("other/model", None, "refuses.*hf auth login"),
        ("a/b/c", None, "not a repo id like owner/name"),
    ],
)
def test_refusals_of_the_hub_are_one_line_with_the_fix(
    hub: Hub, client: str, folder: MakeFolder, repo_id: str, token: str | None, said: str
) -> None:
    with pytest.raises((EnvironmentFault, UsageError), match=said) as caught:
        push(folder(), repo_id, token=token)
    assert "\n" not in str(caught.value)


def test_unreachable_hub_is_one_line(client: str, folder: MakeFolder) -> None:
    with pytest.raises(EnvironmentFault, match="run the same command again"):
        push(folder(), REPO, endpoint="http://127.0.0.1:9")
