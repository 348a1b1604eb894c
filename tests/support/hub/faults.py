"""Which requests fail, and the log of all of them.

A fault matches requests by method (any, if empty) and path (a regular expression, searched in the path without its
query). It lets `skip` of them pass, spoils the next `times`, and is then spent. It spoils one by

- `status`: answering with that status (and `headers`), without doing the work;
- `drop="before"`: closing the connection without doing the work;
- `drop="after"`: doing the work, then closing the connection without a word;
- `drop="middle"`: sending the headers and half of the body, then closing the connection;
- `lie`: doing the work, then answering with other words: pairs of a regular expression and what is put in its place
  in the body, and `headers` in place of those of these names.
"""

import json
import re
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Fault:
    """One way to spoil some requests; see the module's docstring."""

    method: str
    path: str
    status: int | None = None
    drop: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    lie: list[tuple[str, str]] | None = None
    skip: int = 0
    times: int = 1

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in ("", method) and re.search(self.path, path) is not None


class Faults:
    """The armed faults, in order: the first that matches and has no more to skip is used up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[Fault] = []

    def arm(self, faults: list[dict[str, Any]]) -> None:
        with self._lock:
            self._armed = [Fault(**fault) for fault in faults]

    def left(self) -> list[dict[str, Any]]:
        """The faults that are not spent: a test that ends with some left has tested nothing."""
        with self._lock:
            return [asdict(fault) for fault in self._armed if fault.times > 0]

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._armed:
                if fault.matches(method, path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


@dataclass(frozen=True)
class Request:
    """One line of the log. Sizes are bodies, in bytes; `fault` says how it was spoiled, if it was."""

    method: str
    path: str
    query: str
    range: str
    agent: str
    status: int
    received: int
    sent: int
    fault: str


class RequestLog:
    """Appended as JSON lines, so that it can be read while the server runs and after it died."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path

    def add(self, request: Request) -> None:
        line = json.dumps(asdict(request)) + "\n"
        with self._lock, self._path.open("a") as log:
            log.write(line)


def read_log(path: Path) -> list[Request]:
    """The requests so far; a line that is just being written is left for the next time."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Request(**json.loads(line)) for line in lines if line.endswith("\n")]
