"""What `scripts/lanes/show-hub` runs: a conversion by repo id under a disk quota, a push, stock downloads, faults."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from support.hub.process import Hub, contents
from support.hub.show_model import write_model

TOOLS = Path(sys.executable).parent
SOURCE, TARGET = "producer/model-GPTQ", "me/model-xpu"
SHARD = "1500kB"

FAULTS: list[tuple[str, str, dict[str, Any]]] = [
    ("create the repository", "both", {"method": "POST", "path": "/api/repos/create"}),
    ("list the files there", "both", {"method": "GET", "path": "/tree/"}),
    ("ask what to upload", "both", {"method": "POST", "path": "/preupload/"}),
    ("token for xet", "xet", {"method": "GET", "path": "/xet-write-token/"}),
    ("LFS batch", "LFS", {"method": "POST", "path": "/objects/batch"}),
    ("upload a part", "LFS", {"method": "PUT", "path": "/-/part/"}),
    ("put parts together", "LFS", {"method": "POST", "path": "/-/complete/"}),
    ("verify an object", "LFS", {"method": "POST", "path": "/objects/verify"}),
    ("commit", "both", {"method": "POST", "path": "/commit/"}),
]
HOW: dict[str, dict[str, Any]] = {
    "503": {"status": 503},
    "429": {"status": 429},
    "dropped": {"drop": "before"},
    "answer lost": {"drop": "after"},
}


class Show:
    """One run: a server, a client's home, a folder to work in."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.hub = Hub(place / "server", "--part-bytes", "400000")
        self.home = place / "home"
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        print(f"\n# {text}", flush=True)

    def run(self, *command: str, code: int = 0, quiet: bool = False, **environment: str) -> str:
        shown = shlex.join(Path(word).name if word.startswith(str(TOOLS)) else word for word in command)
        if not quiet:
            print(f"$ {shown}", flush=True)
        full = [str(TOOLS / command[0]), *command[1:]]
        settings = self.hub.environment(self.home, HF_XET_CLIENT_RETRY_BASE_DELAY="50ms", NO_COLOR="1", **environment)
        done = subprocess.run(
            full, cwd=self.place, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if not quiet:
            print((done.stdout + done.stderr).replace(str(self.place), "."), end="", flush=True)
        self.check(f"`{shown}` ends with {code}", done.returncode == code)
        return done.stdout + done.stderr

    def check(self, what: str, is_so: bool) -> None:
        if not is_so:
            self.failed.append(what)
            print(f"NOT SO: {what}", flush=True)

    def held(self) -> int:
        """Bytes of weights on this side of the network: shards, partial downloads, and what xet keeps."""
        total = 0
        folders = [self.home, *self.place.glob("*-xpu")]
        for path in (Path(top) / name for folder in folders for top, _, names in os.walk(folder) for name in names):
            with suppress(OSError):
                is_weights = (
                    ".safetensors" in path.name
                    or path.suffix == ".incomplete"
                    or ("xet" in path.parts and "logs" not in path.parts)
                )
                if is_weights and path.is_file() and not path.is_symlink():
                    total += path.stat().st_size
        return total

    @contextmanager
    def quota(self) -> Iterator[list[int]]:
        """Watches the disk; the list ends with the largest number of bytes seen."""
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], self.held())

        watcher = threading.Thread(target=watch)
        watcher.start()
        yield peak
        done.set()
        watcher.join()


def main() -> int:
    place = Path(tempfile.mkdtemp(prefix="show-hub-"))
    show = Show(place)
    try:
        stream(show)
        interrupted(show)
        for disable_xet in ("0", "1"):
            table(show, disable_xet)
    finally:
        show.hub.stop()
        shutil.rmtree(place)
    print(f"\n{len(show.failed)} things were not as said" if show.failed else "\nall of it was as said")
    return bool(show.failed)


def stream(show: Show) -> None:
    model = write_model(show.place / "server/model")
    show.hub.seed(SOURCE, model, xet=True)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    show.say(f"{SOURCE}: {size / 1e6:.1f} MB of weights in 8 shards. What is it? Headers only.")
    show.run("xpuquant", "inspect", SOURCE)
    show.say("Convert it from the Hub to the Hub, shard by shard, and watch the disk.")
    with show.quota() as peak:
        show.run("xpuquant", "convert", SOURCE, "--stream", "--push-to", TARGET, "--max-shard-size", SHARD)
    used = peak[0]
    print(f"weights on disk at the same time: at most {used / 1e6:.1f} MB")
    show.check("the disk never held the model", 0 < used < size * 2 / 3)
    show.say("The same conversion of a local copy, for comparison; and what a stock client downloads.")
    show.run("xpuquant", "convert", "server/model", "local", "--max-shard-size", SHARD)
    show.run("hf", "download", TARGET, "--local-dir", "downloaded")
    local, got = contents(show.place / "local"), contents(show.place / "downloaded")
    weights = [name for name in local if name.endswith(".safetensors")]
    same = all(got.get(name) == local[name] for name in weights)
    print(f"{len(weights)} shards byte-equal to the local conversion's: {same}")
    show.check("byte-equal", same)
    show.run("xpuquant", "verify", "downloaded", "--source", SOURCE)
    show.say("The Hub's own check of the card's metadata, by the stock client.")
    card = (
        "from huggingface_hub import ModelCard; import sys; "
        "card = ModelCard.load(sys.argv[1]); "
        "from huggingface_hub.utils import get_session; from huggingface_hub import constants; "
        "answer = get_session().post(constants.ENDPOINT + '/api/validate-yaml', "
        "json={'repoType': 'model', 'content': card.content}); "
        "print(answer.status_code, answer.json()); print(card.data)"
    )
    show.run(Path(sys.executable).name, "-c", card, TARGET)


def interrupted(show: Show) -> None:
    show.say("A push that stops: the Hub takes the weights, then refuses every commit. An older model is there.")
    config = show.hub.files(TARGET)["config.json"]
    show.run("xpuquant", "convert", SOURCE, "other", "--scale-dtype", "float32", "--max-shard-size", SHARD)
    old = show.hub.files(TARGET)
    show.hub.arm({"method": "POST", "path": "/commit/", "status": 503, "times": 9999})
    show.run("xpuquant", "push", "other", TARGET, code=4)
    show.check("what can be loaded is still the old model, whole", show.hub.files(TARGET) == old)
    print("the repository still is the older model, byte by byte")
    show.hub.arm()
    show.hub.forget_requests()
    show.run("xpuquant", "push", "other", TARGET)
    show.check("the new model is there", show.hub.files(TARGET) == contents(show.place / "other"))
    show.check("it is another one", show.hub.files(TARGET)["config.json"] != config)
    show.run("xpuquant", "push", "other", TARGET)


def table(show: Show, disable_xet: str) -> None:
    transport = "LFS" if disable_xet == "1" else "xet"
    show.say(f"Faults on the way, {transport}: what one push makes of each. `same` is: remote bytes equal local bytes.")
    print(f"{'':24}" + "".join(f"{how:16}" for how in HOW))
    number = 0
    for what, when, where in FAULTS:
        if when not in ("both", transport):
            continue
        cells = []
        for how in HOW.values():
            number += 1
            repo = f"me/faults-{transport.lower()}-{number}"
            show.hub.forget_objects()  # or nothing would have to be uploaded
            show.hub.arm({**where, **how, "times": 1})
            said = show.run("xpuquant", "push", "other", repo, quiet=True, HF_HUB_DISABLE_XET=disable_xet)
            show.check(f"{what}, {transport}: asked for", not show.hub.faults_left())
            same = show.hub.files(repo) == contents(show.place / "other")
            show.check(f"{what}, {transport}", same)
            cells.append("same" if same else re.sub(r"\s+", " ", said)[:15])
        print(f"{what:24}" + "".join(f"{cell:16}" for cell in cells), flush=True)
    show.hub.arm()


if __name__ == "__main__":
    sys.exit(main())
