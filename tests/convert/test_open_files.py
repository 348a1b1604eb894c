"""Files that stay open: those that were read last, and no more than a process can afford."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from xpuquant.conversion import open_files
from xpuquant.conversion.open_files import OpenFiles, most_kept


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[OpenFiles, list[str]]]:
    """Files a to h, of which so many are kept; and the names in the order in which they were opened."""
    for name in "abcdefgh":
        (tmp_path / name).write_text(name)

    def made(most: int) -> tuple[OpenFiles, list[str]]:
        monkeypatch.setattr(open_files, "most_kept", lambda: most)
        opened = list[str]()

        def opens(name: str) -> int:
            opened.append(name)
            return os.open(tmp_path / name, os.O_RDONLY)

        return OpenFiles(opens), opened

    return made


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def read(files: OpenFiles, name: str) -> int:
    fd = files.acquire(name)
    assert os.pread(fd, 9, 0) == name.encode()
    files.release(name)
    return fd


def test_those_that_were_read_last_stay_open(files: Callable[[int], tuple[OpenFiles, list[str]]]) -> None:
    kept, opened = files(2)
    a, b = read(kept, "a"), read(kept, "b")
    assert read(kept, "a") == a and is_open(b)
    read(kept, "c")
    assert is_open(a) and not is_open(b)
    for name in "ccaaca":
        read(kept, name)
    assert opened == ["a", "b", "c"]
    kept.close()
    assert not is_open(a)


def test_tensors_in_the_order_of_their_files_open_each_once(
    files: Callable[[int], tuple[OpenFiles, list[str]]],
) -> None:
    """However many there are, and also where a module lies in two of them."""
    kept, opened = files(2)
    for name in "aaabbabcccbddedefffefgghg":
        read(kept, name)
    assert opened == list("abcdefgh")


@pytest.mark.parametrize("most", [0, 1])
def test_nobody_s_file_is_closed_under_him(most: int, files: Callable[[int], tuple[OpenFiles, list[str]]]) -> None:
    kept, opened = files(most)
    first = kept.acquire("a")
    assert kept.acquire("a") == first
    for name in "bcd":
        read(kept, name)
    kept.release("a")
    assert is_open(first)
    kept.close()
    assert is_open(first) and os.pread(first, 1, 0) == b"a"
    kept.release("a")
    assert not is_open(first) and opened == list("abcd")


def test_what_is_not_open_is_not_opened_for_a_hint(files: Callable[[int], tuple[OpenFiles, list[str]]]) -> None:
    kept, opened = files(1)
    assert kept.acquire_if_open("a") is None
    fd = read(kept, "a")
    assert kept.acquire_if_open("a") == fd
    kept.release("a")
    assert opened == ["a"]


def test_a_file_that_cannot_be_opened(files: Callable[[int], tuple[OpenFiles, list[str]]], tmp_path: Path) -> None:
    kept, opened = files(2)
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        kept.acquire("a")
    (tmp_path / "elsewhere").rename(tmp_path / "a")
    read(kept, "a")
    assert opened == ["a", "a"]


@pytest.mark.parametrize("most", [0, 1, 3, 8])
def test_from_many_threads(most: int, files: Callable[[int], tuple[OpenFiles, list[str]]]) -> None:
    kept, _ = files(most)
    fds, wrong = set[int](), list[BaseException]()

    def reads(seed: int) -> None:
        try:
            for name in random.Random(seed).choices("abcdefgh", k=500):
                fds.add(read(kept, name))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=reads, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len({name for name in "abcdefgh" if (fd := kept.acquire_if_open(name)) is not None and is_open(fd)}) == most


def test_a_process_that_may_open_few_keeps_few(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, kept in ((1 << 20, 256), (1024, 252), (64, 12), (16, 0), (3, 0), (-1, 256)):
        monkeypatch.setattr(open_files.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert most_kept() == kept
