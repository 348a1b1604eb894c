"""Files on their way here, in threads that nobody waits for: an interrupt ends the program, not the current download.

huggingface_hub keeps what a killed download had, and the next run carries on from there.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any


class FileProgress:
    """Progress of one file, as the client counts it. It counts again what it retries, and not what it resumes; here
    every byte counts once."""

    def __init__(self, nbytes: int, report: Callable[[int], None]) -> None:
        self._left = nbytes
        self._report = report

    def add(self, nbytes: int) -> None:
        counted = max(0, min(nbytes, self._left))
        self._left -= counted
        self._report(counted)

    def finish(self) -> None:
        """The file is here."""
        self.add(self._left)

    def bar(self) -> type[Any]:
        """A progress bar class for the client that draws nothing and counts here."""
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

    def __init__(self, download: Callable[[str], Path], at_once: int) -> None:
        self._download = download
        self._waiting: queue.SimpleQueue[tuple[str, Future[Path]]] = queue.SimpleQueue()
        self._futures: dict[str, Future[Path]] = {}
        self._lock = threading.Lock()
        for number in range(at_once):
            threading.Thread(target=self._work, name=f"download-{number}", daemon=True).start()

    def start(self, name: str) -> Future[Path]:
        """The file, now or later. A download that failed is started anew."""
        with self._lock:
            known = self._futures.get(name)
            if known is not None and not (known.done() and known.exception() is not None):
                return known
            future: Future[Path] = Future()
            self._futures[name] = future
        self._waiting.put((name, future))
        return future

    def forget(self, name: str) -> None:
        """The file is gone; asked for again, it is downloaded again."""
        with self._lock:
            self._futures.pop(name, None)

    def _work(self) -> None:
        while True:
            name, future = self._waiting.get()
            try:
                future.set_result(self._download(name))
            except BaseException as error:
                future.set_exception(error)
