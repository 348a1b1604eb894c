"""One case of hostile places: a source, an output or an unfinished output in which a path is not what it seems, through
a command; and what must hold afterwards, whatever it was.

The oracle is its own. Canaries lie outside: their bytes and times must stay, and their content may be in no output. And
what `verify` says is compared with what was done to the output: it may pass only where every file that was written is
there as it was written, and must where nothing was touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from support import injected_faults as inject
from support.checkpoints import FIXTURES
from support.fuzz.case import command
from xpuquant.conversion.hub.publish import hash_files, local_files
from xpuquant.conversion.repo.staging import Staging
from xpuquant.conversion.tree import Tree
from xpuquant.errors import XpuquantError

FIXTURE = FIXTURES / "gptqmodel-qwen3-w4g32"
SECONDS = 20
"""For one case, by the clock: a command that waits for a pipe waits for ever."""

SECRET = b"a token that nobody may publish"
SECRET_SHA256 = hashlib.sha256(SECRET).hexdigest()
RECORDS = ("xpuquant.json", "verify.json", "config.json", ".xpuquant/journal.jsonl")
NAMES = (
    *(
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
        "quantize_config.json",
    ),
    *("xpuquant.json", "verify.json", "verify.md", "model-00001-of-00003.safetensors", "notes.txt", "sub/x.txt", "sub"),
    *(".xpuquant", ".xpuquant/files", ".xpuquant/files/model-00001-of-00003.safetensors", ".xpuquant/lock"),
    *(".xpuquant/journal.jsonl", ".xpuquant/files/config.json", ".xpuquant/README.earlier.md", ".cache/x", ".git/x"),
    *(".xpuquant/config.json.new", ".xpuquant/part-00001-of-00002.jsonl", "model.safetensors.index.json", "x.py"),
)


class Hanging(BaseException):
    """A command took too long."""


def to_canary(rng: random.Random, path: Path, outside: Path) -> str:
    target = rng.choice(
        [outside / "canary", Path(os.path.relpath(outside / "canary", path.parent)), outside / "folder"]
    )
    path.symlink_to(target)
    return f"-> {target.name}"


def to_tool(rng: random.Random, path: Path, outside: Path) -> str:
    root = next(parent for parent in path.parents if parent.parent == outside.parent)
    (root / ".git").mkdir(exist_ok=True)
    (root / ".git" / "config").write_bytes(SECRET)
    path.symlink_to(os.path.relpath(root / ".git" / "config", path.parent))
    return "-> .git/config"


def to_device(rng: random.Random, path: Path, outside: Path) -> str:
    target = rng.choice(["/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "/dev/random"])
    path.symlink_to(target)
    return f"-> {target}"


def to_self(rng: random.Random, path: Path, outside: Path) -> str:
    path.symlink_to(rng.choice([path.name, ".", "..", "nowhere", "config.json"]))
    return "-> around"


def pipe(rng: random.Random, path: Path, outside: Path) -> str:
    os.mkfifo(path)
    return "a pipe"


def unix_socket(rng: random.Random, path: Path, outside: Path) -> str:
    here = Path.cwd()
    os.chdir(path.parent)  # such names are short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)
    return "a socket"


def folder(rng: random.Random, path: Path, outside: Path) -> str:
    path.mkdir()
    (path / "x").write_bytes(b"x")
    return "a folder"


def sparse(rng: random.Random, path: Path, outside: Path) -> str:
    with path.open("wb") as file:
        file.write(b"{")
        file.truncate(1 << 40)
    return "a sparse terabyte"


def second_name(rng: random.Random, path: Path, outside: Path) -> str:
    os.link(outside / "canary", path)
    return "a second name of the canary"


def noise(rng: random.Random, path: Path, outside: Path) -> str:
    path.write_bytes(rng.choice([b"", b"[]", b"{}", b"7", b"\0" * 100, b"\xff" * 50, b"[" * 5000, b'{"a":' * 200]))
    return "noise"


Act = Callable[[random.Random, Path, Path], str]
ACTS: tuple[Act, ...] = (
    to_canary,
    to_canary,
    to_tool,
    to_device,
    to_self,
    pipe,
    unix_socket,
    folder,
    sparse,
    second_name,
    noise,
)

ODD: tuple[Any, ...] = (
    None,
    7,
    "x",
    [],
    {},
    [[]],
    {"sha256": 7},
    {"a": {}},
    -1,
    1e300,
    True,
    {"../x": "0" * 64},
    {"\0": ""},
)
KEYS = ("shards", "files", "modules", "source", "options", "unquantized", "tensors_sha256", "sha256", "format_version")
LISTED = (
    ".git/config",
    "notes.txt",
    ".cache/x",
    "../outside/canary",
    "/etc/passwd",
    "a\0b",
    "x" * 300,
    "\ud800",
    "..",
    "",
)


def forge(rng: random.Random, path: Path) -> str:
    """A record whose entries are odd, sealed again: anybody can."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return "nothing to forge"
    if not isinstance(record, dict):
        return "nothing to forge"
    if rng.random() < 0.5 and isinstance(record.get("files"), dict):
        name = rng.choice(LISTED)
        record["files"][name] = rng.choice(["", "0" * 64, hashlib.sha256(SECRET).hexdigest(), 7])
        what = f"lists {name[:20]!a}"
    else:
        key = rng.choice(KEYS)
        record[key] = rng.choice(ODD)
        what = f"{key}: {record[key]!a}"
    path.write_bytes(json.dumps(record).encode("utf-8", "surrogatepass"))
    with suppress(Exception):
        inject.reseal(path.parent)
    return f"record {what}"


def flip(rng: random.Random, out: Path) -> str:
    """A bit of a shard, and everything that was recorded recorded again."""
    shards = sorted(filter(inject.is_readable, out.glob("model*.safetensors")))
    path = rng.choice(shards)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = rng.randrange(start, len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    inject.reseal(out)
    return f"bit of byte {at} of {path.name}, sealed again"


class Prepared:
    """A source, its finished output and one that was stopped before publishing, to copy from."""

    def __init__(self, room: Path) -> None:
        self.source, self.out, self.staged = room / "source", room / "out", room / "staged"
        shutil.copytree(FIXTURE, self.source)
        (self.source / "sub").mkdir()
        (self.source / "sub" / "x.txt").write_text("theirs")
        assert command(*self.convert(self.source, self.out))[0] == 0
        self.stage(self.source, self.staged)
        self.written = contents(self.out)

    def stage(self, source: Path, out: Path) -> None:
        """Convert, and stop before publishing. A run goes on with this source alone, by its inodes: not with a copy."""
        publish = Staging.publish
        try:
            Staging.publish = stopped  # type: ignore[assignment,method-assign]
            assert command(*self.convert(source, out))[0] == 4
        finally:
            Staging.publish = publish  # type: ignore[method-assign]

    @staticmethod
    def convert(source: Path, out: Path, *more: str) -> list[str]:
        size = ("--max-shard-size", "60kB")
        return ["convert", str(source), str(out), "--jobs", "1", "--json", *size, *more]


def stopped(self: Staging, *arguments: Any) -> None:
    raise OSError(5, "stopped here")


def contents(root: Path) -> dict[str, str]:
    """Path → digest of every regular file, or what else is there; nothing is followed."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"link {path.readlink()}"
        elif path.is_file():
            size = path.stat().st_size
            found[name] = f"{size} bytes" if size > 1 << 24 else hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_dir():
            found[name] = "odd"
    return found


def outside_state(outside: Path) -> list[tuple[str, bytes, int, int]]:
    return [
        (path.name, path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(outside.rglob("*"))
        if path.is_file()
    ]


@contextmanager
def in_time() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise Hanging

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def publishable(out: Path) -> tuple[int, str, str]:
    """What `push` does before it asks the network: list, look at and hash what it would send."""
    try:
        names = local_files(out)
        blobs = hash_files(Tree(out), names)
    except XpuquantError as error:
        return error.exit_code, "", f"error: {error}\n"
    # Under whatever name it came there: nobody has put it there as a file but who knows its sha256.
    listed = json.loads((out / "xpuquant.json").read_bytes())["files"]
    sent = sorted(name for name, blob in blobs.items() if SECRET_SHA256 == blob.sha256 != listed.get(name))
    return (70, "", f"error: internal error: would send {sent}\n") if sent else (0, "", "")


def play_place(seed: int, prepared: Prepared, room: Path) -> tuple[str, int, str | None]:
    """Case `seed` in the empty folder `room`: (what was done, exit code, how the promise was broken or None)."""
    rng = random.Random(seed)
    source, out, outside = room / "source", room / "out", room / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "canary").write_bytes(SECRET)
    (outside / "folder" / "file").write_bytes(SECRET)
    shutil.copytree(prepared.source, source)
    state = rng.choice(["finished", "finished", "finished", "staged", "none"])
    if state == "finished":
        shutil.copytree(prepared.out, out)
    elif state == "staged":
        prepared.stage(source, out)
    done: list[str] = [state]
    touched = out if state != "none" and rng.random() < 0.7 else source
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        with in_time():
            done.append(_act(rng, touched, outside, state))
    try:
        return _outcome(rng, prepared, room, state, touched is out, done)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _act(rng: random.Random, root: Path, outside: Path, state: str) -> str:
    how = rng.random()
    if how < 0.2 and inject.is_readable(root / "xpuquant.json"):
        return forge(rng, root / "xpuquant.json")
    if how < 0.3 and inject.is_readable(root / "xpuquant.json") and any(root.glob("model*.safetensors")):
        with suppress(Exception):  # what an earlier act left cannot be sealed
            return flip(rng, root)
        return "nothing to flip"
    name, act = rng.choice(NAMES), rng.choice(ACTS)
    path = root / name
    folders = [root / folder for folder in list(Path(name).parents)[:-1]]
    if any(folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()) for folder in folders):
        return "nothing"  # an earlier act was on the way
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return f"{root.name}/{name}: {act(rng, path, outside)}"


def _outcome(
    rng: random.Random, prepared: Prepared, room: Path, state: str, in_out: bool, done: list[str]
) -> tuple[str, int, str | None]:
    source, out, outside = room / "source", room / "out", room / "outside"
    canaries, given, there = outside_state(outside), contents(source), contents(out) if out.exists() else {}
    numbers = {file: (out / file).stat().st_ino for file, what in there.items() if what == SECRET_SHA256}
    verify = ["verify", str(out), "--backend", "reference"]
    commands: dict[str, Callable[[], tuple[int, str, str]]] = {
        "convert": lambda: command(*prepared.convert(source, out)),
        "convert --force": lambda: command(*prepared.convert(source, out, "--force")),
        "inspect": lambda: command("inspect", str(source)),
        "inspect out": lambda: command("inspect", str(out)),
        "diff": lambda: command("diff", str(source), str(out)),
        "verify": lambda: command(*verify),
        "verify --source": lambda: command(*verify, "--source", str(source)),
        "finish": lambda: command("finish", str(source), str(out)),
        "push": lambda: publishable(out),
    }
    name = rng.choice([*commands, "convert", "convert --force", "verify", "verify --source"])
    said = f"{'; '.join(done)}; {name}"
    began = time.monotonic()
    try:
        with in_time():
            code, text, error = commands[name]()
    except Hanging:
        return said, -1, f"hung for {time.monotonic() - began:.0f} s"
    if code not in (0, 1, 2, 3, 4, 5):
        return said, code, f"exit {code}: {error[:1000]}"
    if "Traceback" in error + text or "internal error" in error:
        return said, code, f"traceback: {error[:2000]}"
    if code > 1 and error and (error.count("\n") != 1 or not error[:-1].isprintable()):
        return said, code, f"not one clean line: {error[:500]!r}"
    if outside_state(outside) != canaries:
        return said, code, "a file outside was changed"
    if contents(source) != given:
        return said, code, "the source was changed"
    after = contents(out) if out.exists() else {}
    # A regular file of the source is the source's, whatever other names it has.
    theirs = {file for file, what in given.items() if what == SECRET_SHA256}
    holding = {file for file, what in after.items() if what == SECRET_SHA256} - theirs
    fresh = {file for file in holding if numbers.get(file) != (out / file).stat().st_ino}
    if fresh and name.startswith("convert"):
        return said, code, f"a secret came into OUT: {fresh}"
    if name.startswith(("convert", "finish")):
        lost = [file for file in (".git/config",) if file in there and there[file] != after.get(file)]
        if lost:
            return said, code, f"gone from OUT: {lost}"
        odd = {file for file, what in after.items() if what.startswith(("link", "odd"))}
        if code == 0 and name.startswith("convert") and odd & prepared.written.keys():
            return said, code, "OUT has a link or a pipe among its files"
    elif after != there:
        return said, code, "OUT was changed"
    if name.startswith("verify") and state == "finished":
        # A card is edited, and a record that is sealed again is taken at its word: SECURITY.md promises no more.
        free = ("README.md", "xpuquant.json")
        differ = [file for file, what in prepared.written.items() if after.get(file) != what and file not in free]
        if code == 0 and differ:
            return said, code, f"passes, but {differ} differ"
        if code != 0 and after == prepared.written and (given == contents(prepared.source) or name == "verify"):
            return said, code, f"nothing was touched, and it fails: {error or text[-500:]}"
    return said, code, None
