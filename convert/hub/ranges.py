"""Byte ranges of files on the Hub.

The Hub answers a request for a large file with a redirect to storage. The address there is good for about an hour, so
it is kept and asked directly: thousands of small reads cost the Hub, with its rate limits, one request per file.
huggingface_hub's HfFileSystem asks the Hub for each read; once it keeps addresses, this module can go.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi


_TIMEOUT_SECONDS = 30.0
"""The client itself waits for ever."""


class Ranges:
    """Range reads of one repository at one commit. Thread-safe."""

    def __init__(self, api: HfApi, repo_id: str, commit: str) -> None:
        self._api = api
        self._repo_id = repo_id
        self._commit = commit
        self._lock = threading.Lock()
        self._addresses: dict[str, str] = {}

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes `begin:end` of a file.

        Raises:
            ConnectionError: fewer bytes came. Otherwise as the client.
        """
        from huggingface_hub import hf_hub_url

        with self._lock:
            known = self._addresses.get(name)
        if known is not None:
            data = self._get(name, known, begin, end, signed=True)
            if data is not None:
                return data
            with self._lock:
                self._addresses.pop(name, None)
        url = hf_hub_url(self._repo_id, name, revision=self._commit, endpoint=self._api.endpoint)
        data = self._get(name, url, begin, end, signed=False)
        assert data is not None  # refusals of the Hub itself raise
        return data

    def _get(self, name: str, url: str, begin: int, end: int, signed: bool) -> bytes | None:
        """The bytes; None where a kept address is no longer good."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in __all__
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        # A signed address carries its own permission, and refuses a token beside it.
        token = False if signed else self._api.token
        headers = build_hf_headers(token=token, library_name="xpuquant")
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_SECONDS
        ) as response:
            if signed and 400 <= response.status_code < 500:
                return None
            if response.status_code >= 400:
                response.read()  # the error's text is in the body
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else begin  # a server may send the whole file instead
            data = bytearray()
            for received in response.iter_bytes():
                data += received
                if len(data) >= skip + end - begin:
                    break
            if not signed and str(response.url) != url:
                with self._lock:
                    self._addresses[name] = str(response.url)
        wanted = bytes(data[skip : skip + end - begin])
        if len(wanted) != end - begin:
            raise ConnectionError(f"{name}: {len(wanted)} of {end - begin} bytes came")
        return wanted
