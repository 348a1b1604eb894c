"""One case of odd surroundings: a command of its own process under an environment, limits and streams that users, batch
systems and containers give it.

The oracle is its own. A command ends in time with an exit code of docs/cli.md and one line at most that is no
traceback; the source is as it was; what can be loaded is whole, byte for byte what an undisturbed run writes; and exit
code 0 means so.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from support.fuzz.places import Prepared, contents

SECONDS = 300
"""By the clock, on a busy machine. The usual case takes one."""


@dataclass
class Surroundings:
    """What a process is given.

    env     variables, None: taken away
    limits  resource → bytes or files, set in the process before it begins
    closed  descriptors of the standard streams that are closed
    stdout  a file that standard output goes to; None: it is read
    """

    env: dict[str, str | None] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    stdout: str | None = None
    said: list[str] = field(default_factory=list)


def words(rng: random.Random, around: Surroundings, room: Path) -> str:
    """Languages and encodings."""
    name = rng.choice(["LANG", "LC_ALL", "PYTHONIOENCODING", "PYTHONUTF8", "PYTHONCOERCECLOCALE", "TERM", "COLUMNS"])
    value = rng.choice(["C", "POSIX", "ascii", "latin-1", "tr_TR.UTF-8", "utf-16", "0", "1", "dumb", "nonsense", ""])
    if name in ("PYTHONIOENCODING", "PYTHONUTF8", "PYTHONCOERCECLOCALE"):  # others end Python itself
        value = {"PYTHONIOENCODING": rng.choice(["ascii", "latin-1", "utf-8:strict", "cp1252"])}.get(name, "0")
    around.env[name] = value
    return f"{name}={value}"


def one_of(rng: random.Random, around: Surroundings, choices: list[tuple[str, str]]) -> str:
    """One of these variables."""
    name, value = rng.choice(choices)
    around.env[name] = value
    return f"{name}={value!r}"


def no_home(rng: random.Random, around: Surroundings, room: Path) -> str:
    """No home, or one that is none."""
    value = rng.choice([None, "", "/nonexistent", "/dev/null", "relative"])
    around.env["HOME"] = value
    return f"HOME={value}"


def caches(rng: random.Random, around: Surroundings, room: Path) -> str:
    """Folders for caches and temporary files that are missing, files, or not to be written (/proc: by nobody)."""
    (room / "a-file").write_text("x")
    name = rng.choice(["TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "PYTHONPYCACHEPREFIX"])
    around.env[name] = rng.choice(["/proc/nowhere", str(room / "a-file"), str(room / "a-file" / "below"), ""])
    return f"{name}={around.env[name]}"


def of_the_hub(rng: random.Random, around: Surroundings, room: Path) -> str:
    """Variables of the Hub's client: a folder needs none of it."""
    return one_of(
        rng,
        around,
        [
            ("HF_ENDPOINT", "http://127.0.0.1:9"),
            ("HF_ENDPOINT", "nonsense"),
            ("HF_HUB_OFFLINE", "1"),
            ("HF_TOKEN", "x\ny"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
            ("HF_HUB_VERBOSITY", "nonsense"),
            ("HF_HUB_ENABLE_HF_TRANSFER", "1"),
            ("HTTPS_PROXY", "nonsense://"),
        ],
    )


def threads(rng: random.Random, around: Surroundings, room: Path) -> str:
    """Variables of the libraries that compute."""
    return one_of(
        rng,
        around,
        [
            ("NUMBA_NUM_THREADS", "1"),
            ("NUMBA_DISABLE_JIT", "0"),
            ("NUMBA_CPU_NAME", "generic"),
            ("OMP_NUM_THREADS", "nonsense"),
            ("OPENBLAS_NUM_THREADS", "1000"),
            ("PYTHONHASHSEED", "7"),
            ("PYTHONWARNINGS", "error"),
            ("PYTHONOPTIMIZE", "2"),
            ("MALLOC_ARENA_MAX", "1"),
        ],
    )


def few_files(rng: random.Random, around: Surroundings, room: Path) -> str:
    """Few open files: 24 are promised to be enough."""
    limit = rng.choice([24, 24, 32, 64])
    around.limits[resource.RLIMIT_NOFILE] = limit
    return f"{limit} open files"


def little_memory(rng: random.Random, around: Surroundings, room: Path) -> str:
    """A limit of the address space, from what an interpreter needs to what is enough."""
    limit = rng.choice([300, 500, 700, 900, 1200, 1600, 2400, 4000]) << 20
    around.limits[resource.RLIMIT_AS] = limit
    return f"{limit >> 20} MiB of address space"


def small_files(rng: random.Random, around: Surroundings, room: Path) -> str:
    """A limit of the size of a file that is written (`ulimit -f`)."""
    limit = rng.choice([0, 1000, 20_000, 50_000, 200_000])
    around.limits[resource.RLIMIT_FSIZE] = limit
    # Compiled code that does not fit is not kept, as Python does with its own.
    return f"files of {limit} bytes at most"


def closed_streams(rng: random.Random, around: Surroundings, room: Path) -> str:
    """Standard streams that are not there."""
    around.closed = set(rng.choice([(0,), (0,), (1,), (2,), (0, 1), (0, 1, 2)]))
    return f"closed {sorted(around.closed)}"


def full_stream(rng: random.Random, around: Surroundings, room: Path) -> str:
    """Standard output on a disk that is full."""
    around.stdout = "/dev/full"
    return "standard output full"


Change = Callable[[random.Random, Surroundings, Path], str]
CHANGES: tuple[Change, ...] = (
    *(words, no_home, caches, caches, of_the_hub, threads),
    *(few_files, little_memory, small_files, closed_streams, full_stream),
)


def play_surroundings(seed: int, prepared: Prepared, room: Path) -> tuple[str, int, str | None]:
    """Case `seed` in the empty folder `room`: (what was odd, exit code, how the promise was broken or None)."""
    rng = random.Random(seed)
    source, out = room / "source", room / "out"
    shutil.copytree(prepared.source, source)
    around = Surroundings()
    # The first cases take one change each, so that a few of them show every kind.
    chosen = [CHANGES[seed]] if seed < len(CHANGES) else rng.sample(CHANGES, rng.choice([1, 1, 2, 3]))
    around.said = [change(rng, around, room) for change in chosen]
    name = "convert" if seed < len(CHANGES) else rng.choice(["convert", "convert", "verify", "inspect", "doctor"])
    if name == "verify":
        shutil.copytree(prepared.out, out)
    command_line = {
        "convert": prepared.convert(source, out),
        "verify": ["verify", str(out), "--source", str(source), "--json"],
        "inspect": ["inspect", str(source)],
        "doctor": ["doctor"],
    }[name]
    said = f"{name}; {'; '.join(around.said)}"
    given, there = contents(source), contents(out) if out.exists() else {}
    try:
        try:
            code, text, error = _run(command_line, around, room)
        except subprocess.TimeoutExpired:
            return said, -1, "hung"
        problem = _problem(code, text, error, around)
        if problem is None and contents(source) != given:
            problem = "the source was changed"
        if problem is None and name == "convert":
            problem = _not_whole(code, prepared, out)
        if problem is None and name == "verify" and (contents(out) != there or code == 1):
            problem = "OUT was changed, or found wrong"
        return said, code, problem
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _run(words_: list[str], around: Surroundings, room: Path) -> tuple[int, str, str]:
    env: Mapping[str, str | None] = {**os.environ, **around.env}

    def begin() -> None:
        for number in around.closed:
            with suppress(OSError):
                os.close(number)
        for what, limit in around.limits.items():
            resource.setrlimit(what, (limit, limit))

    with open(around.stdout or os.devnull, "wb") as file:  # noqa: PTH123  # a device
        done = subprocess.run(
            [sys.executable, "-P", "-m", "xpuquant", *words_],
            env={name: value for name, value in env.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if around.stdout is None else file,
            stderr=subprocess.PIPE,
            preexec_fn=begin,
            cwd=room,
            timeout=SECONDS,
            check=False,
        )
    text = (done.stdout or b"").decode("utf-8", "replace")
    return done.returncode, text, done.stderr.decode("utf-8", "replace")


def _problem(code: int, text: str, error: str, around: Surroundings) -> str | None:
    if code not in (0, 2, 4, 5):
        return f"exit {code}: {error[-1500:]}"
    if "Traceback" in error + text or "internal error" in error or "Exception ignored" in error:
        return f"traceback: {error[-2000:]}"
    # What a library says of a variable of its own, is the library's.
    ours = [line for line in error.splitlines() if line and not line.startswith("libgomp: Invalid value")]
    if 2 not in around.closed and (len(ours) != (code != 0)) and "Warning" not in error:
        return f"not one line: {error[:800]!r}"
    return None


def _not_whole(code: int, prepared: Prepared, out: Path) -> str | None:
    held = contents(out) if out.exists() else {}
    is_loadable = "config.json" in held
    if code == 0 and not is_loadable:
        return "exit 0, and nothing that can be loaded"
    # Reports have figures of kernels, which the number of threads changes in the last digits.
    bound = {name for name in prepared.written if name != "README.md" and not name.startswith("verify.")}
    differ = sorted(name for name in bound if held.get(name) != prepared.written[name])
    return f"can be loaded, and {differ} differ" if is_loadable and differ else None
