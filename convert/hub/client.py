"""What reading from and publishing to the Hub share: the client, retries, and one-line errors.

Everything goes through huggingface_hub, so that its cache, tokens, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` work
as everywhere. It is imported inside functions: converting a folder never pays for it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from xpuquant.errors import EnvironmentFault, UsageError, XpuquantError, shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

WAITS = (1.0, 4.0, 10.0)
"""Seconds before each retry. The client itself retries most requests for about 20 s. These are for what it does not
retry (commits over LFS, creating things), and for longer trouble; after the last, the user runs the command again."""

LONGEST_WAIT_SECONDS = 600
"""The client waits as long as the Hub's `Retry-After` or `RateLimit` says, and says so; beyond this it would look dead,
and the command is better run again. The Hub's windows are of 300 s (https://huggingface.co/docs/hub/rate-limits)."""

_RESET = re.compile(r"\br=0\s*;\s*t=([0-9]+)")
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_TRANSIENT_NAMES = frozenset({"TransportError", "RequestException"})
"""Base classes of connection faults in httpx, httpx2 and requests: the client's version decides which is used."""


def connect(token: str | bool | None = None, endpoint: str | None = None) -> HfApi:
    """The client's API object.

    Raises:
        EnvironmentFault: huggingface_hub cannot be imported.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise EnvironmentFault(f"huggingface_hub cannot be imported ({error}); pip install huggingface_hub") from None
    return HfApi(endpoint=endpoint, token=token, library_name="xpuquant")


def is_offline() -> bool:
    """Whether the client was told to stay off the network."""
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())


def asked_wait(headers: Mapping[str, str]) -> int:
    """Seconds that a server asks to wait before the next request, in either of the headers that the client obeys; 0
    where it does not say."""
    lower = {name.lower(): text for name, text in headers.items()}
    reset = _RESET.search(lower.get("ratelimit", ""))
    seconds = reset[1] if reset else lower.get("retry-after", "").strip()
    return int(seconds[:12]) if re.fullmatch("[0-9]+", seconds) else 0


class Patience:
    """Looks at every answer: raises where the server has asked to wait, all in all, longer than anybody should.

    Counted from the first refusal after an answer that was none. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None

    def __call__(self, response: Any) -> None:
        with self._lock:
            if response.status_code not in _TRANSIENT_STATUS:
                self._since = None
                return
            now = time.monotonic()
            self._since = self._since or now
            wait = asked_wait(response.headers)
            if wait and now + wait - self._since > LONGEST_WAIT_SECONDS:
                self._since = None
                raise EnvironmentFault(
                    f"{response.request.url.host} asks to wait {wait} s before the next request (HTTP "
                    f"{response.status_code}); run the same command again after that, it goes on where it stopped"
                )


def check_names(response: Any) -> None:
    """Looks at every answer to a HEAD: the client calls files of its cache by the `ETag` there, and joins it to a path
    as it stands. Tags may have slashes in them: those of the Hub's API are base64.

    Raises:
        EnvironmentFault: it would lead elsewhere.
    """
    for header in _ETAGS if response.request.method == "HEAD" else ():
        tag = str(response.headers.get(header, ""))
        parts = tag.removeprefix("W/").strip('"').split("/")
        if tag and (not parts[0] or ".." in parts):
            raise EnvironmentFault(
                f"{response.request.url.host} answers with an {header} that is the name of no file: {shown(tag)}"
            )


_ETAGS = ("ETag", "X-Linked-Etag")
_PATIENCE = Patience()
_WATCHERS = (_PATIENCE, check_names)


def _watch_answers() -> None:
    """Let `_WATCHERS` look at what the client is answered. Before each use: it makes new sessions after some faults."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented, but not in __all__

    hooks = get_session().event_hooks["response"]
    hooks.extend(watcher for watcher in _WATCHERS if watcher not in hooks)


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, looking through what it was raised from."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def has_no_answer(error: BaseException) -> bool:
    """Whether an error of ours is that the Hub could not be asked: no network, or offline and not in the cache."""
    return isinstance(error, EnvironmentFault) and error.__cause__ is not None and status_of(error) is None


def is_transient(error: BaseException) -> bool:
    """Whether trying again can help: server errors, rate limits, broken connections, failed transfers."""
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in _causes(error)):
        return False  # a ConnectionError by class, but asked for
    for cause in _causes(error):
        if isinstance(cause, ConnectionError | TimeoutError):
            return True
        if any(kind.__name__ in _TRANSIENT_NAMES for kind in type(cause).__mro__):
            return True
    # hf_xet reports every failed transfer as a plain RuntimeError.
    return type(error) is RuntimeError and error.__cause__ is None


def retried(action: Callable[[], T], about: str) -> T:
    """Run an action, again after transient faults.

    Args:
        about: repo id, for the message of an error.

    Raises:
        XpuquantError: one line with the fix.
    """
    for wait in (*WAITS, None):
        try:
            _watch_answers()
            return action()
        except XpuquantError:
            raise
        except Exception as error:
            if wait is None or not is_transient(error):
                raise explain(error, about) from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def explain(error: BaseException, repo_id: str) -> XpuquantError:
    """Any error of the client as one of ours: what happened, and what to do."""
    from huggingface_hub import errors

    # Subclasses first: a gated repo is also "not found", a missing local entry also "not found".
    for cause in _causes(error):
        if isinstance(cause, XpuquantError):
            return cause
    if isinstance(error, errors.GatedRepoError):
        return EnvironmentFault(
            f"{repo_id} is gated: ask for access on its page, then log in with `hf auth login` (or set HF_TOKEN)"
        )
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"'{repo_id}' is neither a folder here nor a repo id like owner/name")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{repo_id} has no such revision; its page lists branches and commits")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) and not is_transient(error):
        return EnvironmentFault(
            f"{repo_id} is not in the cache and the Hub cannot be asked; unset HF_HUB_OFFLINE, or download it first"
        )
    if isinstance(error, errors.EntryNotFoundError) and not is_transient(error):
        return UsageError(f"{repo_id}: a file is missing ({_first_line(error)})")
    status = status_of(error)
    server_says = str(getattr(error, "server_message", None) or "")
    if status == 401 and "credentials" in f"{error}{server_says}":
        return EnvironmentFault("the Hub does not know this token; log in again with `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"{repo_id}: no such model on the Hub, or it is private; check the name, or log in with `hf auth login`"
        )
    if status == 401:
        return EnvironmentFault(f"{repo_id}: not logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return EnvironmentFault(
            f"the Hub refuses to let this token do that in {repo_id}; log in (`hf auth login`) with a token that may"
        )
    if is_transient(error):
        what = f"HTTP {status}" if status is not None else f"{type(error).__name__}: {_first_line(error)}"
        return EnvironmentFault(f"{repo_id}: the Hub did not answer ({what}); run the same command again")
    if isinstance(error, OSError) and error.strerror:
        return EnvironmentFault(f"{error.filename or repo_id}: {error.strerror}")
    return EnvironmentFault(f"{repo_id}: {server_says or _first_line(error)}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
