"""One case of files that are exchanged while a command runs: at the n-th thing that it asks of the file system, a path
of the source or of the output becomes another one, as another program, a synchronised folder or an enemy would make it.

The moments are exact: Python tells an audit hook of every open, listing, move and removal before it happens. The oracle
is its own. Canaries lie outside: nothing may touch them, nor bring their content into OUT. What comes out with exit
code 0 is what the undisturbed run writes; or, where OUT itself was exchanged under a command's hands (who may
write there is trusted, see SECURITY.md), something that `verify` does not pass.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from support.fuzz.case import command
from support.fuzz.places import SECRET, Hanging, Prepared, contents, in_time, outside_state

MOMENTS = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
"""Audit events that are counted."""

MOST = 520
"""Counted things of a command, at most: an undisturbed conversion of the fixture has about 500, verification 300."""

_state: dict[str, Callable[[], None] | None] = {"hook": None}
_installed: list[bool] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    hook = _state["hook"]
    if hook is not None and event in MOMENTS:
        hook()


@contextmanager
def at_moments(acts: Mapping[int, Callable[[], None]]) -> Iterator[list[int]]:
    """Do something before the events of these numbers; yields the count of events, one member."""
    if not _installed:
        sys.addaudithook(_audit)
        _installed.append(True)
    counted = [0]

    def hook() -> None:
        counted[0] += 1
        if counted[0] in acts:
            _state["hook"] = None
            try:
                acts[counted[0]]()
            finally:
                _state["hook"] = hook

    _state["hook"] = hook
    try:
        yield counted
    finally:
        _state["hook"] = None


def other_bytes(path: Path) -> None:
    """A file is replaced by another one of its size and time: `mv` of a copy that kept its times."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, len(data)):
        data[at] ^= 0x11
    new = path.with_name("new-one")
    new.write_bytes(data)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(path)


def in_place(path: Path) -> None:
    """The same file gets other bytes, and its time back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-min(64, status.st_size), os.SEEK_END)
        file.write(b"\x5a" * min(64, status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def gone(path: Path) -> None:
    path.unlink()


def a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(outside_of(path) / "canary")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_to_link(path: Path) -> None:
    """A folder is moved away, and a link to one outside has its name."""
    path.rename(path.with_name("moved-away"))
    path.symlink_to(outside_of(path) / "folder")


def outside_of(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / "outside").is_dir()) / "outside"


FILES = (other_bytes, in_place, cut, gone, a_link, a_pipe)
OF_SOURCE = ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "sub/x.txt")
OF_OUT = (
    *("config.json", "xpuquant.json", "verify.json", "tokenizer.json", "model.safetensors.index.json", "sub/x.txt"),
    *("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"),
    *(f".xpuquant/files/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    *(".xpuquant/files/tokenizer.json", ".xpuquant/files/xpuquant.json", ".xpuquant/journal.jsonl", ".xpuquant/lock"),
)
FOLDERS = {"source": ("sub",), "out": ("sub", ".xpuquant", ".xpuquant/files")}


def play_swap(seed: int, prepared: Prepared, room: Path) -> tuple[str, int, str | None]:
    """Case `seed` in the empty folder `room`: (what was done, exit code, how the promise was broken or None)."""
    rng = random.Random(seed)
    source, out, outside = room / "source", room / "out", room / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "canary").write_bytes(SECRET)
    (outside / "folder" / "x.txt").write_bytes(SECRET)
    shutil.copytree(prepared.source, source)
    name = rng.choice(["convert", "convert", "convert", "convert --force", "verify", "verify --source", "finish"])
    state = rng.choice(["finished", "staged"] if name != "convert" else ["staged", "none", "none"])
    if name.startswith("verify"):
        state = "finished"
    if state == "finished":
        shutil.copytree(prepared.out, out)
    elif state == "staged":
        prepared.stage(source, out)
    side = rng.choice(["source", "out"])
    root = source if side == "source" else out
    is_folder = rng.random() < 0.25
    target = root / rng.choice(FOLDERS[side] if is_folder else OF_SOURCE if side == "source" else OF_OUT)
    act = folder_to_link if is_folder else rng.choice(FILES)
    done: list[str] = []

    def swap() -> None:
        with suppress(OSError, StopIteration):  # what is not there yet, or no more
            act(target)
            done.append("done")

    words = {
        "convert": prepared.convert(source, out),
        "convert --force": prepared.convert(source, out, "--force"),
        "verify": ["verify", str(out), "--backend", "reference"],
        "verify --source": ["verify", str(out), "--backend", "reference", "--source", str(source)],
        "finish": ["finish", str(source), str(out)],
    }[name]
    moment = rng.randrange(1, MOST)
    said = f"{state}; {name}; before {moment}: {side}/{target.relative_to(root)} {act.__name__}"
    canaries = outside_state(outside)
    try:
        try:
            with in_time(), at_moments({moment: swap}):
                code, text, error = command(*words)
        except Hanging:
            return said, -1, "hung"
        if outside_state(outside) != canaries:
            return said, code, "a file outside was changed"
        problem = _problem(code, text, error)
        if problem is None and code == 0 and done:
            problem = _untrue(name, side, f"{side}/{target.relative_to(root)}", prepared, source, out)
        return said if done else f"{said}, never", code, problem
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _problem(code: int, text: str, error: str) -> str | None:
    if code not in (0, 1, 2, 3, 4, 5):
        return f"exit {code}: {error[:1000]}"
    if "Traceback" in error + text or "internal error" in error:
        return f"traceback: {error[:2000]}"
    # That a run goes on from an earlier one is said as it begins.
    lines = [line for line in error.splitlines() if not line.startswith("resumed: ")]
    if (len(lines) != (code != 0) and code != 1) or not all(line.isprintable() for line in lines):
        return f"not one clean line: {error[:500]!r}"
    return None


def _untrue(name: str, side: str, said: str, prepared: Prepared, source: Path, out: Path) -> str | None:
    """How exit code 0 is not so.

    Args:
        said: what was exchanged, below the room.
    """
    held = contents(out)
    secret = hashlib.sha256(SECRET).hexdigest()
    if secret in held.values():
        return "a secret came into OUT"
    free = ("README.md",)
    differ = [file for file, what in prepared.written.items() if held.get(file) != what and file not in free]
    if not differ:
        return None
    if name.startswith("verify"):
        # What was exchanged after the last look at it is nobody's to notice: but then the next look does.
        differ = differ if command("verify", str(out), "--backend", "reference")[0] == 0 else []
        return f"passes, but {differ} differ" if differ else None
    if side == "source":
        # Exchanged before the first look, it is the source, all of it: an undisturbed run makes the same of it.
        fresh = source.parent / "again" / "out"
        if command(*prepared.convert(source, fresh))[0] == 0:
            wanted = contents(fresh)
            differ = sorted(file for file in {*wanted, *held} - {"README.md"} if wanted.get(file) != held.get(file))
        if not differ:
            return None
        return f"written from a source that was exchanged: {differ}"
    again = command("verify", str(out), "--backend", "reference")[0]
    if again == 0:
        return f"{differ} differ, and verify passes"
    # What lay in the staging folder is looked at until it is moved; what is published, until config.json is there.
    was_staged = [
        file for file in differ if f"out/.xpuquant/files/{file}" == said and not file.endswith(".safetensors")
    ]
    return f"published, though exchanged in the staging folder: {was_staged}" if was_staged else None
