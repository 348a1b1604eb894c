"""Downloads in background threads. They are daemons: an interrupt ends the program at once, without waiting for the
files under way. huggingface_hub keeps what has come of them, and the next run carries on from there.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from xpuquant.conversion.tree import Tree


class FileProgress:
    """Progress of one file. The client counts bytes that it retries again, and bytes that it resumes not at all; here
    every byte counts once."""

    def __init__(self, nbytes: int, report: Callable[[int], None]) -> None:
        self._left = nbytes
        self._report = report

    def add(self, nbytes: int) -> None:
        """Count bytes that the client reports."""
        counted = max(0, min(nbytes, self._left))
        self._left -= counted
        self._report(counted)

    def finish(self) -> None:
        """The file is complete: count what is missing of its size."""
        self.add(self._left)

    def bar(self) -> type[Any]:
        """A progress bar class to give to the client: it draws nothing, and counts here."""
        from tqdm import tqdm  # type: ignore[import-untyped]  # huggingface_hub brings it

        count = self.add

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                options.pop("name", None)
                super().__init__(*arguments, **{**options, "disable": True})

            def update(self, n: float | None = 1) -> None:
                count(int(n or 0))

            def update_transfer(self, n: float) -> None:
                """Bytes on the network, compressed: not what is counted."""

            def set_transfer_postfix_str(self, *arguments: Any, **options: Any) -> None:
                """Nothing is drawn."""

        return Bar


class Downloads:
    """Downloads files, a few at a time, in the order asked for."""

    def __init__(self, download: Callable[[str], Tree], at_once: int) -> None:
        self._download = download
        self._waiting: queue.SimpleQueue[tuple[str, Future[Tree]]] = queue.SimpleQueue()
        self._futures: dict[str, Future[Tree]] = {}
        self._lock = threading.Lock()
        for number in range(at_once):
            threading.Thread(target=self._work, name=f"download-{number}", daemon=True).start()

    def start(self, name: str) -> Future[Tree]:
        """Begin to download a file; where it lies, once it is here. A download that failed is begun again."""
        with self._lock:
            known = self._futures.get(name)
            if known is not None and not (known.done() and known.exception() is not None):
                return known
            future: Future[Tree] = Future()
            self._futures[name] = future
        self._waiting.put((name, future))
        return future

    def forget(self, name: str) -> None:
        """Note that the file was deleted: `start` downloads it again."""
        with self._lock:
            self._futures.pop(name, None)

    def _work(self) -> None:
        while True:
            name, future = self._waiting.get()
            try:
                future.set_result(self._download(name))
            except BaseException as error:
                future.set_exception(error)
