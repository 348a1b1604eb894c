"""HTTP: what is common to all routes: dispatch, faults, request bodies, answers, permissions.

A route is a function that takes the handler and the named parts of its pattern, unquoted, and
returns a `Response` or raises `HubError`.
"""

import json
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub.faults import Fault, Faults, Request, RequestLog
from support.hub.store import HubError, Repo, Store

# token → user; every user owns the namespace of their name, and all share the namespace "team".
USERS = {"hf_me": "me", "hf_other": "other"}
TEAM = "team"
PIECE = 1 << 20  # bytes copied at a time
CONTROLS = ("/-/faults", "/-/settled")  # the tests' own: neither spoilt nor logged

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
MODEL = rf"/api/models/{REPO}"
REV = r"(?P<revision>[^/]+)"


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    span: tuple[int, int] = (0, 0)  # of the file: first byte, one past the last


def answer(value: Any, status: int = 200, **headers: str) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


Route = tuple[str, re.Pattern[str], Callable[..., Response]]
ROUTES: list[Route] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    def register(function: Callable[..., Response]) -> Callable[..., Response]:
        ROUTES.append((method, re.compile(pattern + r"\Z"), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"
    secret: ClassVar[str] = secrets.token_hex(8)

    # Plumbing

    def dispatch(self) -> None:
        with self.server.under_way(is_control=urlsplit(self.path).path in CONTROLS):
            self._dispatch()

    def _dispatch(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.received = 0
        fault = None if parts.path in CONTROLS else self.server.faults.take(self.command, parts.path)
        response = None
        if fault is None or fault.lie is not None or fault.drop in ("after", "middle"):
            response = self._respond(parts.path)
            if fault is not None and fault.lie is not None:
                for pattern, other in fault.lie:
                    response.body = re.sub(pattern.encode(), other.encode(), response.body, flags=re.DOTALL)
                response.headers |= fault.headers
        elif fault.status is not None:
            self.body()
            response = answer({"error": "injected fault"}, fault.status, **fault.headers)
        sent = self._send(response, fault)
        if parts.path not in CONTROLS:
            said = "" if fault is None else fault.drop or str(fault.status)
            status = 0 if response is None else response.status
            request = Request(
                self.command,
                parts.path,
                parts.query,
                self.headers.get("Range", ""),
                self.headers.get("User-Agent", ""),
                status,
                self.received,
                sent,
                said,
            )
            self.server.log.add(request)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch  # noqa: N815

    def _respond(self, path: str) -> Response:
        try:
            for method, pattern, function in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := pattern.match(path)):
                    named = {key: unquote(text) for key, text in match.groupdict().items() if text}
                    response = function(self, **named)
                    break
            else:
                raise HubError(404, f"no such route: {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            response = answer({"error": str(error)}, error.status, **headers)
        self.body()  # what nobody read would be taken for the next request
        return response

    def _send(self, response: Response | None, fault: Fault | None) -> int:
        if response is None or (fault is not None and fault.drop == "after"):
            self._hang_up()
            return 0
        first, end = response.span if response.file else (0, len(response.body))
        self.send_response(response.status)
        for name, text in response.headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(end - first))
        self.send_header("X-Request-Id", secrets.token_hex(8))
        self.end_headers()
        if self.command == "HEAD":
            return 0
        if fault is not None and fault.drop == "middle":
            end = (first + end) // 2
        sent = 0
        with suppress(ConnectionError):  # a client may leave; that is its right
            for piece in self._pieces(response, first, end):
                self.wfile.write(piece)
                sent += len(piece)
        if fault is not None and fault.drop == "middle":
            self._hang_up()
        return sent

    def _pieces(self, response: Response, first: int, end: int) -> Iterator[bytes]:
        if response.file is None:
            yield response.body[first:end]
            return
        with response.file.open("rb") as file:
            file.seek(first)
            while first < end:
                piece = file.read(min(PIECE, end - first))
                first += len(piece)
                yield piece

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def read_pieces(self) -> Iterator[bytes]:
        """The request's body, in pieces, whether it has a length or comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            del self.headers["Transfer-Encoding"]
        left = int(self.headers.get("Content-Length", 0))
        del self.headers["Content-Length"]
        while left > 0:
            piece = self.rfile.read(min(PIECE, left))
            if not piece:
                raise ConnectionError("the client left")
            left -= len(piece)
            yield piece

    def body(self) -> bytes:
        content = b"".join(self.read_pieces())
        self.received += len(content)
        return content

    def json(self) -> Any:
        return json.loads(self.body())

    def log_message(self, *arguments: Any) -> None:
        """Silent: the request log has it."""

    # Permissions

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in USERS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def writer(self, repo_id: str) -> str:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if repo_id.split("/")[0] not in (user, TEAM):
            raise HubError(403, "You don't have the rights to create or change this repository")
        return user

    def readable(self, repo_id: str) -> Repo:
        user = self.user()
        try:
            repo = self.server.store.repo(repo_id)
            if repo.private and repo_id.split("/")[0] not in (user, TEAM):
                raise HubError(404, "Repository not found", "RepoNotFound")
        except HubError as error:
            # The Hub does not tell strangers whether a repository exists.
            error.status = 401 if user is None else 404
            raise
        return repo

    @property
    def origin(self) -> str:
        return f"http://{self.headers['Host']}"

    @property
    def other_origin(self) -> str:
        host, _, port = self.headers["Host"].partition(":")
        return f"http://{'localhost' if host == '127.0.0.1' else '127.0.0.1'}:{port}"


class Server(ThreadingHTTPServer):
    """State and settings that the routes share."""

    daemon_threads = True

    def __init__(self, root: Path, port: int, part_bytes: int, tree_page: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        root.mkdir(parents=True, exist_ok=True)
        self.store = Store(root.resolve())
        self.faults = Faults()
        self.log = RequestLog(root / "requests.jsonl")
        self.part_bytes = part_bytes
        self.tree_page = tree_page
        self._answering = 0
        self._answered = threading.Condition()

    @contextmanager
    def under_way(self, is_control: bool) -> Iterator[None]:
        """While a request is answered, and until it is in the log, which may be after its client has gone on."""
        with self._answered:
            self._answering += not is_control
        try:
            yield
        finally:
            with self._answered:
                self._answering -= not is_control
                self._answered.notify_all()

    def settle(self) -> bool:
        """Wait until every request that has been answered is in the log."""
        with self._answered:
            return self._answered.wait_for(lambda: not self._answering, timeout=10)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is not news; anything else is a bug of this server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
