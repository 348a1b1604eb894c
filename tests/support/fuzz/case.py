"""One fuzz case: a spoiled checkpoint through the real command line, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors

from support.fuzz.folder import fixtures, load
from support.fuzz.mutations import mutate
from xpuquant.conversion.cli.app import run

SECONDS = 30.0
"""For one case, of processor time. The usual one takes hundredths of one."""

REFUSALS = {2: "refused", 3: "damaged", 4: "environment"}


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    code     exit code
    problem  None, or how the promise was broken
    message  the one line, where it was refused
    """

    seed: int
    name: str
    edits: tuple[str, ...]
    code: int
    problem: str | None
    message: str
    seconds: float


def play(seed: int, room: Path) -> Outcome:
    """Make case `seed` in the empty folder `room`, convert it, look at what came out, and clean up."""
    rng = random.Random(seed)
    folder = load(rng.choice(fixtures()))
    mutate(rng, folder, rng.choice([1, 1, 1, 2, 2, 3, 5]))
    source, out = room / "source", room / "out"
    try:
        folder.write(source)
        before = digests(source)
        options = rng.choice(
            [
                [],
                [],
                [],
                ["--on-unsupported", "dequantize"],
                ["--max-shard-size", "20kB"],
                ["--scale-dtype", "bfloat16"],
            ]
        )
        began = time.process_time()
        code, text, error = command("convert", str(source), str(out), "--jobs", "1", "--json", *options)
        seconds = time.process_time() - began
        problem = _problem(code, text, error, out)
        if problem is None and seconds > SECONDS:
            problem = f"took {seconds:.0f} s"
        if problem is None and digests(source) != before:
            problem = "the source was touched"
        if problem is None and code == 0:
            problem = _wrong_output(source, out)
        return Outcome(seed, folder.name, tuple(folder.edits), code, problem, error.strip(), seconds)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def command(*arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command line, in this process."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = run(arguments)
    return code, out.getvalue(), error.getvalue()


def _problem(code: int, text: str, error: str, out: Path) -> str | None:
    if code not in (0, *REFUSALS):
        return f"exit {code}: {error.strip()[:2000]}"
    if "Traceback" in error or "internal error" in error:
        return f"traceback: {error[:2000]}"
    if code == 0:
        return None if not error else f"noise on standard error: {error[:500]!r}"
    if error.count("\n") != 1 or not error.rstrip("\n").isprintable() or len(error) > 4200:
        return f"not one clean line: {error[:500]!r}"
    if text:
        return f"refused, but printed {text[:200]!r}"
    if (out / "config.json").exists():
        return f"exit {code}, but the output can be loaded"
    return None


def _wrong_output(source: Path, out: Path) -> str | None:
    """Checks of a finished output that share no code with the conversion: the reference library reads it, every tensor
    that is not part of a quantized module has kept its bytes, and the record says that all was verified."""
    report = json.loads((out / "verify.json").read_bytes())
    if report.get("passed") is not True:
        return "verify.json does not say that it passed"
    if not (out / "config.json").exists() or (out / ".xpuquant").exists():
        return "exit 0, but unfinished"
    held = {}
    for shard in out.glob("*.safetensors"):
        held |= dict(safetensors.deserialize(shard.read_bytes()))
    index = out / "model.safetensors.index.json"
    if index.exists() and set(json.loads(index.read_bytes())["weight_map"]) != set(held):
        return "the index is not of these shards"
    given = {}
    for shard in source.glob("*.safetensors"):
        with contextlib.suppress(safetensors.SafetensorError):  # one that the index does not list
            given |= dict(safetensors.deserialize(shard.read_bytes()))
    for name in given.keys() & held.keys():
        mine, theirs = held[name], given[name]
        same = (mine["dtype"], mine["shape"]) == (theirs["dtype"], theirs["shape"])
        if same and name.endswith("norm.weight") and bytes(mine["data"]) != bytes(theirs["data"]):
            return f"{name} changed"
    record = json.loads((out / "xpuquant.json").read_bytes())
    for name, entry in record["shards"].items():
        if hashlib.sha256((out / name).read_bytes()).hexdigest() != entry["sha256"]:
            return f"{name} is not what was recorded"
    return None


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
