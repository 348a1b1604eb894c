"""pytest fixtures: a Hub per test, the client library pointed at it, and folders to publish."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.hub.process import TOKEN, Hub, MakeFolder, contents
from xpuquant.conversion.repo.checksums import UNSEALED, seal
from xpuquant.formats.safetensors import Tensor, build_header, parse_header


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    yield server
    server.stop()


@pytest.fixture(params=["xet", "lfs"])
def client(request: pytest.FixtureRequest, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The client library of this process, logged in to the local Hub. Returns how large files travel.

    It reads its environment when it is imported, hence the constants; what talks to the server is untouched.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, disable_progress_bars

    from xpuquant.conversion.hub import client as client_library
    from xpuquant.conversion.hub import publish

    disable_progress_bars()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    home = constants.HUGGINGFACE_CO_URL_HOME.rstrip("/")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(home, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", str(int(request.param == "lfs")))  # for processes a test starts
    # The client waits 1 to 8 s between its retries, hf_xet 3 to 24 s: right, and too long for hundreds of tests.
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "20ms")
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 50)))
    waits = (0.05, 0.1, 0.2)
    monkeypatch.setattr(client_library, "WAITS", waits)
    monkeypatch.setattr(publish, "WAITS", waits)
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """Makes a folder that looks like a finished conversion: `folder("name", shards=3)`."""

    def make(name: str = "out", shards: int = 3, nbytes: int = 1_500_000, seed: str = "") -> Path:
        made = tmp_path / name
        made.mkdir()
        names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
        records = {}
        for shard in names if shards > 1 else ["model.safetensors"]:
            content = hashlib.sha256(seed.encode()).digest() + os.urandom(nbytes)
            (made / shard).write_bytes(content)
            records[shard] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        if shards > 1:
            weight_map = {f"t{i}": shard for i, shard in enumerate(names)}
            (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (made / "config.json").write_text(json.dumps({"model_type": "llama", "conversion": name}))
        (made / "tokenizer").mkdir()
        (made / "tokenizer/vocab.txt").write_text("a\nb\n")
        (made / "xpuquant.json").write_bytes(record_of(made, records))
        (made / "README.md").write_text(f"---\nlicense: mit\n---\n# {name}\n")
        return made

    return make


def record_of(folder: Path, shards: dict[str, Any]) -> bytes:
    """xpuquant.json of a conversion that had nothing but these shards, with one unquantized tensor, verified, and wrote
    what else lies in a folder."""
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items()}
    record = {
        "sha256": UNSEALED,
        "producer": "xpuquant 0.1.0",
        "format_version": 1,
        "source": {
            "name": "theirs",
            "revision": None,
            "bytes": 0,
            "bytes_by_dtype": {},
            "quantization_config": {},
            "notes": [],
        },
        "options": {},
        "modules": {},
        "unquantized": ["t0"],
        "tensors_sha256": {"t0": "0" * 64},
        "left_files": {},
        "shards": shards,
        "files": {name: digest for name, digest in files.items() if name not in shards},
    }
    return seal(json.dumps(record).encode())


def split_shards(folder: Path, target: Path, count: int) -> Path:
    """A copy of a one-file checkpoint in `count` shards, as large models come."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = parse_header(data[8 : 8 + length], "model.safetensors", len(data))
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    shards: list[list[Tensor]] = [[] for _ in range(count)]
    for tensor in tensors.values():
        shards[min(count - 1, done * count // total)].append(tensor)
        done += tensor.nbytes
    weight_map = {}
    for number, members in enumerate(shards, 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        header = build_header(((t.name, t.dtype, t.shape, t.nbytes) for t in members), {"format": "pt"})
        (target / name).write_bytes(header + b"".join(data[t.begin : t.end] for t in members))
        weight_map |= {tensor.name: name for tensor in members}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def push_older(repo_id: str, scratch: Path) -> dict[str, bytes]:
    """Publishes a made-up older model; returns its files."""
    from xpuquant import push

    folder = scratch / "older"
    folder.mkdir()
    content = os.urandom(1000)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    records = {"model.safetensors": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    (folder / "xpuquant.json").write_bytes(record_of(folder, records))
    push(folder, repo_id)
    return contents(folder)
