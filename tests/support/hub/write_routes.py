"""Routes that upload: preupload, the LFS protocol in one piece or in parts, commits."""

import base64
import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

from support.hub.handler import MODEL, REPO, REV, Handler, Response, answer, route
from support.hub.store import LFS_BYTES, LFS_SUFFIXES, HubError


@route("POST", rf"{MODEL}/preupload/{REV}")
def preupload(handler: Handler, repo: str, revision: str) -> Response:
    handler.writer(repo)
    store, found = handler.server.store, handler.readable(repo)
    files = store.commit(found, store.resolve(found, revision)).files
    asked = handler.json()["files"]
    if len(asked) > 256:
        raise HubError(400, "at most 256 files")
    listed = []
    for file in asked:
        base64.b64decode(file["sample"], validate=True)
        large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
        known = files.get(file["path"])
        oid = (known.sha256 if large else known.oid) if known else None
        mode = "lfs" if large else "regular"
        listed.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return answer({"files": listed})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(handler: Handler, repo: str) -> Response:
    handler.writer(repo)
    wanted = handler.json()
    listed, part_bytes = [], handler.server.part_bytes
    multipart = "multipart" in wanted["transfers"]
    for item in wanted["objects"]:
        oid, size = item["oid"], item["size"]
        if handler.server.store.lfs_size(oid, size) is not None:
            listed.append({"oid": oid, "size": size})
            continue
        upload: dict[str, Any] = {"href": f"{handler.other_origin}/-/put/{oid}?key={handler.secret}"}
        if multipart and size > part_bytes:
            parts = range(1, -(-size // part_bytes) + 1)
            part_url = f"{handler.other_origin}/-/part/{oid}/%d?key={handler.secret}"
            urls = {f"{number:05d}": part_url % number for number in parts}
            upload = {"href": f"{handler.origin}/-/complete/{oid}?key={handler.secret}"}
            upload["header"] = {"chunk_size": str(part_bytes), **urls}
        verify = {"href": f"{handler.origin}/{repo}.git/info/lfs/objects/verify"}
        listed.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    return answer({"transfer": "multipart" if multipart else "basic", "objects": listed})


def _receive(handler: Handler, target: Path) -> str:
    """Writes the request's body to `target`; returns its MD5, which is what S3 uses for an ETag."""
    if handler.query.get("key") != handler.secret:
        raise HubError(403, "not a signed address")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{secrets.token_hex(4)}")
    digest = hashlib.md5()
    with scratch.open("wb") as file:
        for piece in handler.read_pieces():
            handler.received += len(piece)
            digest.update(piece)
            file.write(piece)
    scratch.replace(target)
    return digest.hexdigest()


def _keep(handler: Handler, received: Path, oid: str) -> None:
    if handler.server.store.add_lfs(received) != oid:
        raise HubError(400, "the content does not have the announced sha256")


@route("PUT", r"/-/put/(?P<oid>\w+)")
def lfs_put(handler: Handler, oid: str) -> Response:
    received = handler.server.store.root / "parts" / secrets.token_hex(8)
    etag = _receive(handler, received)
    _keep(handler, received, oid)
    return Response(200, headers={"ETag": f'"{etag}"'})


@route("PUT", r"/-/part/(?P<oid>\w+)/(?P<number>\d+)")
def lfs_part(handler: Handler, oid: str, number: str) -> Response:
    etag = _receive(handler, handler.server.store.root / "parts" / oid / number)
    return Response(200, headers={"ETag": f'"{etag}"'})


@route("POST", r"/-/complete/(?P<oid>\w+)")
def lfs_complete(handler: Handler, oid: str) -> Response:
    root = handler.server.store.root / "parts"
    whole = root / secrets.token_hex(8)
    with whole.open("wb") as file:
        for part in handler.json()["parts"]:
            piece = (root / oid / str(part["partNumber"])).read_bytes()
            if part["etag"].strip('"') != hashlib.md5(piece).hexdigest():
                raise HubError(400, "a part does not have the announced ETag")
            file.write(piece)
    _keep(handler, whole, oid)
    return answer({})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
def lfs_verify(handler: Handler, repo: str) -> Response:
    handler.writer(repo)
    wanted = handler.json()
    if handler.server.store.lfs_size(wanted["oid"], None) != wanted["size"]:
        raise HubError(422, "the object is not there")
    return answer({})


@route("POST", rf"{MODEL}/commit/{REV}")
def commit(handler: Handler, repo: str, revision: str) -> Response:
    user = handler.writer(repo)
    lines = [json.loads(line) for line in handler.body().splitlines()]
    oid = handler.server.store.apply(repo, revision, user, lines)
    return answer({"commitOid": oid, "commitUrl": f"{handler.origin}/{repo}/commit/{oid}"})
