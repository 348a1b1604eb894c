"""Routes that read trees and files.

Two traps of the real Hub that this server keeps: large files are answered by a redirect to *another
host* (`localhost` for a client that came to `127.0.0.1`, and the other way round), because a client
follows redirects within a host by itself and then misses the `X-Repo-Commit` header; and a tree
listing comes in pages.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from support.hub.handler import MODEL, REPO, REV, Handler, Response, answer, route
from support.hub.store import Entry, HubError, Store


def _record(store: Store, path: str, entry: Entry) -> dict[str, Any]:
    record: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.sha256:
        record["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
        if xet_hash := store.xet.find(entry.sha256):
            record["xetHash"] = xet_hash
    return record


@route("GET", rf"{MODEL}/tree/{REV}(?:/(?P<under>.*))?")
def tree(handler: Handler, repo: str, revision: str, under: str | None = None) -> Response:
    store, found = handler.server.store, handler.readable(repo)
    commit = store.commit(found, store.resolve(found, revision))
    prefix = f"{under}/" if under else ""
    deep = handler.query.get("recursive", "").lower() == "true"
    records: dict[str, dict[str, Any]] = {}
    for path, entry in commit.files.items():
        if not path.startswith(prefix):
            continue
        for parent in (str(parent) for parent in Path(path).parents):
            if parent in (".", under) or not parent.startswith(prefix):
                continue
            oid = hashlib.sha1(parent.encode()).hexdigest()
            records[parent] = {"type": "directory", "path": parent, "size": 0, "oid": oid}
        records[path] = _record(store, path, entry)
    if not deep:
        records = {path: record for path, record in records.items() if "/" not in path[len(prefix) :]}
    listed = [record for _, record in sorted(records.items())]
    start = int(handler.query.get("cursor", "0"))
    end = start + handler.server.tree_page
    headers: dict[str, Any] = {}
    if end < len(listed):
        query = f"recursive={deep}&expand=False&cursor={end}"
        headers["Link"] = f'<{handler.origin}{urlsplit(handler.path).path}?{query}>; rel="next"'
    return answer(listed[start:end], **headers)


@route("POST", rf"{MODEL}/paths-info/{REV}")
def paths_info(handler: Handler, repo: str, revision: str) -> Response:
    store, found = handler.server.store, handler.readable(repo)
    commit = store.commit(found, store.resolve(found, revision))
    body = handler.body()
    is_json = "json" in handler.headers.get("Content-Type", "")
    paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
    return answer([_record(store, path, commit.files[path]) for path in paths if path in commit.files])


@route("GET", rf"/{REPO}/(?:resolve|raw)/{REV}/(?P<path>.*)")
def resolve(handler: Handler, repo: str, revision: str, path: str) -> Response:
    store, found = handler.server.store, handler.readable(repo)
    user = handler.user()
    if found.gated and repo.split("/")[0] != user:
        message = f"Access to model {repo} is restricted and you are not in the authorized list."
        raise HubError(401 if user is None else 403, message, "GatedRepo")
    oid = store.resolve(found, revision)
    entry = store.commit(found, oid).files.get(path)
    if entry is None:
        response = answer({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
        response.headers["X-Repo-Commit"] = oid
        return response
    headers = {"X-Repo-Commit": oid, "ETag": f'"{entry.sha256 or entry.oid}"', "Accept-Ranges": "bytes"}
    if entry.sha256 is None:
        return _ranged(handler, store.content(entry), entry.size, headers)
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    query = f"size={entry.size}&key={handler.secret}"
    headers["Location"] = f"{handler.other_origin}/-/blob/{entry.sha256}?{query}"
    if xet_hash := store.xet.find(entry.sha256):
        token_url = f"{handler.origin}/api/models/{repo}/xet-read-token/{oid}"
        headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
    return Response(302, b"", headers)


@route("GET", r"/-/blob/(?P<sha256>\w+)")
def blob(handler: Handler, sha256: str) -> Response:
    if handler.query.get("key") != handler.secret or handler.headers.get("Authorization"):
        raise HubError(403, "a signed address is asked for without a token")
    size = int(handler.query["size"])
    path = handler.server.store.content(Entry("", size, sha256))
    return _ranged(handler, path, size, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


def _ranged(handler: Handler, path: Path, size: int, headers: dict[str, str]) -> Response:
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", handler.headers.get("Range", ""))
    if match is None:
        return Response(200, headers=headers, file=path, span=(0, size))
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    end = min(size, int(match[2]) + 1) if match[1] and match[2] else size
    if first >= size:
        return Response(416, b"", {"Content-Range": f"bytes */{size}"})
    headers = {**headers, "Content-Range": f"bytes {first}-{end - 1}/{size}"}
    return Response(206, headers=headers, file=path, span=(first, end))


@route("GET", rf"{MODEL}/xet-(?P<kind>read|write)-token/{REV}")
def xet_token(handler: Handler, repo: str, kind: str, revision: str) -> Response:
    if kind == "write":
        handler.writer(repo)
    handler.readable(repo)
    expires = int(time.time()) + 3600
    url = handler.server.store.xet.url
    headers: dict[str, Any] = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": "local",
        "X-Xet-Token-Expiration": str(expires),
    }
    return answer({"casUrl": url, "accessToken": "local", "exp": expires}, **headers)
