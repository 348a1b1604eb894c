"""Routes about accounts, repositories, refs and pull requests, and the tests' own controls."""

import hashlib
import json
import re
from typing import Any

import yaml

from support.hub.handler import MODEL, REV, TEAM, Handler, Response, answer, route
from support.hub.store import HubError, now

# Control, for tests


@route("POST", "/-/faults")
def arm_faults(handler: Handler) -> Response:
    handler.server.faults.arm(handler.json())
    return answer({})


@route("GET", "/-/settled")
def settled(handler: Handler) -> Response:
    return answer(handler.server.settle())


@route("GET", "/-/faults")
def faults_left(handler: Handler) -> Response:
    return answer(handler.server.faults.left())


# Account


@route("GET", "/api/whoami-v2")
def whoami(handler: Handler) -> Response:
    user = handler.user()
    if user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return answer({"type": "user", "name": user, "orgs": [{"type": "org", "name": TEAM}], "auth": token})


@route("POST", "/api/validate-yaml")
def validate_yaml(handler: Handler) -> Response:
    """What the Hub checks of a card's metadata, as far as its documentation says."""
    content = handler.json()["content"]
    errors = []
    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    metadata = yaml.safe_load(match.group(1)) if match else {}
    texts = {"license", "base_model_relation", "pipeline_tag", "library_name", "license_name", "license_link"}
    for key, value in (metadata or {}).items():
        if key in texts and not isinstance(value, str):
            errors.append({"message": f'"{key}" must be a string'})
        if key == "tags" and not (isinstance(value, list) and all(isinstance(tag, str) for tag in value)):
            errors.append({"message": '"tags" must be an array of strings'})
    relation = (metadata or {}).get("base_model_relation", "quantized")
    if relation not in ("quantized", "finetune", "adapter", "merge"):
        errors.append({"message": '"base_model_relation" must be one of quantized, finetune, adapter, merge'})
    return answer({"errors": errors, "warnings": []}, 400 if errors else 200)


# Repositories


@route("POST", "/api/repos/create")
def create_repo(handler: Handler) -> Response:
    wanted = handler.json()
    user = handler.user() or ""
    repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
    handler.writer(repo_id)
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    with handler.server.store.lock:
        try:
            handler.server.store.create(repo_id, private, user)
        except HubError as error:
            return answer({"error": str(error), "url": f"{handler.origin}/{repo_id}"}, error.status)
    return answer({"url": f"{handler.origin}/{repo_id}", "name": repo_id})


@route("GET", rf"{MODEL}(?:/revision/{REV})?")
def model_info(handler: Handler, repo: str, revision: str | None = None) -> Response:
    store, found = handler.server.store, handler.readable(repo)
    oid = store.resolve(found, revision or "main")
    commit = store.commit(found, oid)
    readme = commit.files.get("README.md")
    text = store.content(readme).read_text() if readme else ""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    card = (yaml.safe_load(match.group(1)) if match else None) or {}
    siblings = []
    for path, entry in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if "blobs" in handler.query:
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.sha256:
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size}
                sibling["lfs"]["pointerSize"] = len(entry.pointer)
        siblings.append(sibling)
    info = {
        "_id": hashlib.sha1(repo.encode()).hexdigest()[:24],
        "id": repo,
        "modelId": repo,
        "author": repo.split("/")[0],
        "sha": oid,
        "lastModified": commit.date,
        "createdAt": found.created,
        "private": found.private,
        "gated": "manual" if found.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags", []),
        "cardData": card,
        "siblings": siblings,
    }
    return answer(info)


@route("GET", rf"{MODEL}/refs")
def refs(handler: Handler, repo: str) -> Response:
    found = handler.readable(repo)
    pulls = {name: oid for name, oid in found.refs.items() if name.startswith("refs/pr/")}
    branches = {name: oid for name, oid in found.refs.items() if name not in pulls}
    listed = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in branches.items()]
    listed_pulls = [{"name": n.split("/")[-1], "ref": n, "targetCommit": oid} for n, oid in pulls.items()]
    return answer({"branches": listed, "tags": [], "converts": [], "pullRequests": listed_pulls})


@route("GET", rf"{MODEL}/commits/{REV}")
def commits(handler: Handler, repo: str, revision: str) -> Response:
    store, found = handler.server.store, handler.readable(repo)
    oid: str | None = store.resolve(found, revision)
    listed = []
    while oid:
        commit = store.commit(found, oid)
        authors = [{"user": commit.author, "avatar": ""}]
        about = {"id": oid, "title": commit.title, "message": "", "date": commit.date}
        listed.append({**about, "authors": authors})
        oid = commit.parent
    return answer(listed)


@route("POST", rf"{MODEL}/branch/{REV}")
def create_branch(handler: Handler, repo: str, revision: str) -> Response:
    handler.writer(repo)
    store = handler.server.store
    wanted = json.loads(handler.body() or b"{}")
    with store.lock:
        found = store.repo(repo)
        if revision in found.refs:
            raise HubError(409, f"Reference refs/heads/{revision} already exists")
        found.refs[revision] = store.resolve(found, wanted.get("startingPoint", "main"))
        store.save(found)
    return answer({})


@route("DELETE", rf"{MODEL}/branch/{REV}")
def delete_branch(handler: Handler, repo: str, revision: str) -> Response:
    handler.writer(repo)
    store = handler.server.store
    with store.lock:
        found = store.repo(repo)
        if found.refs.pop(revision, None) is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        store.save(found)
    return answer({})


# Pull requests


def _discussion(repo: str, pull: dict[str, Any]) -> dict[str, Any]:
    about = {"repo": {"name": repo, "type": "model"}, "isPullRequest": True, "events": [], "diff": ""}
    return {**pull, **about, "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}}


@route("GET", rf"{MODEL}/discussions")
def discussions(handler: Handler, repo: str) -> Response:
    wanted = handler.query.get("status")
    listed = []
    for pull in handler.readable(repo).pulls:
        state = "open" if pull["status"] in ("open", "draft") else "closed"
        author = handler.query.get("author", pull["author"]["name"])
        if wanted in (None, "all", state) and pull["author"]["name"] == author:
            listed.append(_discussion(repo, pull))
    return answer({"discussions": listed, "count": len(listed), "start": 0})


@route("POST", rf"{MODEL}/discussions")
def open_discussion(handler: Handler, repo: str) -> Response:
    store, wanted, user = handler.server.store, handler.json(), handler.user()
    handler.readable(repo)
    with store.lock:
        found = store.repo(repo)
        pull = {
            "num": len(found.pulls) + 1,
            "title": wanted["title"],
            "status": "draft",
            "author": {"name": user},
            "createdAt": now(),
        }
        found.pulls.append(pull)
        found.refs[f"refs/pr/{pull['num']}"] = found.refs["main"]
        store.save(found)
    return answer({"num": pull["num"]})


@route("GET", rf"{MODEL}/discussions/(?P<number>\d+)")
def discussion(handler: Handler, repo: str, number: str) -> Response:
    return answer(_discussion(repo, handler.readable(repo).pulls[int(number) - 1]))


@route("POST", rf"{MODEL}/discussions/(?P<number>\d+)/status")
def discussion_status(handler: Handler, repo: str, number: str) -> Response:
    store, wanted = handler.server.store, handler.json()
    with store.lock:
        found = handler.readable(repo)
        pull = found.pulls[int(number) - 1]
        pull["status"] = wanted["status"]
        store.save(found)
    event = {"id": "1", "type": "status-change", "createdAt": now(), "author": pull["author"]}
    return answer({"newStatus": {**event, "data": {"status": wanted["status"]}}})
