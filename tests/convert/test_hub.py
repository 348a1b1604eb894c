"""Reading from the Hub: little for a plan, everything for a conversion, one shard at a time with --stream; whatever
fails on the way, the same call again ends with the same bytes."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.checkpoints import FIXTURES
from support.hub.process import Hub, contents

from xpuquant import api
from xpuquant.conversion.hub import client as client_library
from xpuquant.conversion.hub.client import Patience, asked_wait
from xpuquant.conversion.hub.destination import Destination
from xpuquant.conversion.hub.publish import Pushed
from xpuquant.conversion.hub.ranges import Ranges
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import make_plan
from xpuquant.conversion.progress import Silent
from xpuquant.conversion.results import Converted
from xpuquant.conversion.runs.little_disk import convert_streaming, peak_disk, segments
from xpuquant.conversion.runs.local import convert_checkpoint
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.conversion.sources.hub import HubSource, open_hub
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.sources.streamed import StreamedSource
from xpuquant.errors import DamagedError, EnvironmentFault, UsageError

pytest_plugins = "support.hub.fixtures"

SOURCE = "producer/model"
REPO = "me/model-xpu"
OPTIONS = Options(max_shard_size=12_000)
PLANS = [
    "gptqmodel-qwen3-w4g32-actorder",
    "gptqmodel-qwen3-w4g32-asym-v1",
    "gptqmodel-qwen3moe-w4g32",
    "autoround-qwen3-w4g32",
    "handpacked-gptoss-mxfp4",
    "llmcompressor-llama-fp8-block",
]


@pytest.fixture
def model(hub: Hub, client: str, tmp_path: Path) -> Path:
    """An act-order checkpoint in eight shards, on the Hub as SOURCE; returns a local copy."""
    from support.hub.fixtures import split_shards

    folder = split_shards(FIXTURES / "gptqmodel-qwen3-w4g32-actorder", tmp_path / "model", 8)
    hub.seed(SOURCE, folder, xet=client == "xet")
    return folder


def weights(folder: Path | dict[str, bytes]) -> dict[str, bytes]:
    files = contents(folder) if isinstance(folder, Path) else folder
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


@pytest.fixture
def expected(model: Path, tmp_path: Path) -> dict[str, bytes]:
    """The weights that a conversion of the local copy gives."""
    convert_checkpoint(LocalSource(model), tmp_path / "expected", OPTIONS, jobs=1, verify=False)
    return weights(tmp_path / "expected")


# Headers


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_from_headers_is_the_plan_of_the_files(hub: Hub, client: str, name: str) -> None:
    hub.seed(SOURCE, FIXTURES / name)
    source = open_hub(SOURCE)
    local = LocalSource(FIXTURES / name)
    assert make_plan(source.checkpoint, OPTIONS).digest("") == make_plan(local.checkpoint, OPTIONS).digest("")
    assert (source.extra_files, source.nbytes) == (local.extra_files, local.nbytes)


def test_headers_are_all_that_is_read(hub: Hub, client: str, model: Path) -> None:
    open_hub(SOURCE)
    blobs = [request for request in hub.requests() if "/-/blob/" in request.path]
    assert len(blobs) == len(weights(model)), "one request per shard"
    assert all(request.range.startswith("bytes=0-") and request.sent <= 1 << 16 for request in blobs)


def test_a_long_header_takes_a_second_range(hub: Hub, client: str, tmp_path: Path) -> None:
    from xpuquant.formats.safetensors import build_header

    names = [f"model.layers.{i}.a_rather_long_name_of_a_norm.weight" for i in range(1500)]
    header = build_header(((name, "F32", (1,), 4) for name in names), {})
    assert len(header) > 1 << 16
    (tmp_path / "long").mkdir()
    (tmp_path / "long/model.safetensors").write_bytes(header + bytes(4 * len(names)))
    (tmp_path / "long/config.json").write_text("{}")
    hub.seed(SOURCE, tmp_path / "long")
    assert len(open_hub(SOURCE).checkpoint.tensors) == len(names)


def test_the_revision_is_pinned_to_the_commit_it_was(hub: Hub, client: str, model: Path, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    hub.seed("me/moving", model)
    source = open_hub("me/moving")
    commit = hub.store.repo("me/moving").refs["main"]
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="me/moving")
    assert isinstance(source, HubSource)
    fetched = source.fetch(lambda nbytes: None)
    assert source.revision == fetched.revision == commit
    assert fetched.checkpoint.config == source.checkpoint.config
    assert open_hub("me/moving", commit).revision == commit


# Downloads

READ_FAULTS = [
    ("GET", "/api/models/producer/model$"),
    ("HEAD", "/resolve/.*/config.json"),
    ("GET", "/resolve/.*/config.json"),
    ("GET", "/resolve/.*safetensors"),
    ("HEAD", "/resolve/.*safetensors"),
    ("GET", "/-/blob/"),
]
HOW = [{"status": 503}, {"status": 429}, {"drop": "before"}, {"drop": "middle"}]


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("fault", READ_FAULTS, ids="".join)
def test_faults_while_reading(
    hub: Hub, client: str, model: Path, fault: tuple[str, str], how: dict[str, object]
) -> None:
    method, path = fault
    hub.arm({"method": method, "path": path, "times": 1, **how})
    source = open_hub(SOURCE)
    assert isinstance(source, HubSource)
    fetched = source.fetch(lambda nbytes: None)
    assert not hub.faults_left()
    assert weights(fetched.folder) == weights(model)


@pytest.mark.parametrize("fault", READ_FAULTS, ids="".join)
def test_a_long_wait_is_an_error_that_names_it(hub: Hub, client: str, model: Path, fault: tuple[str, str]) -> None:
    method, path = fault
    hub.arm({"method": method, "path": path, "times": 1, "status": 429, "headers": {"Retry-After": "99999"}})
    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"asks to wait 99999 s .* \(HTTP 429\); run the same command again"):
        source = open_hub(SOURCE)
        assert isinstance(source, HubSource)
        source.fetch(lambda nbytes: None)
    assert not hub.faults_left() and time.monotonic() - began < 60


def test_a_short_wait_is_obeyed_and_said(hub: Hub, client: str, model: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    headers = {"Retry-After": "20"}
    hub.arm({"method": "GET", "path": "/resolve/.*/config.json", "times": 1, "status": 429, "headers": headers})
    try:
        open_hub(SOURCE)
    finally:
        logger.removeHandler(handler)
    assert not hub.faults_left()
    assert any("Waiting 21" in line for line in said), said
    assert logger.isEnabledFor(logging.WARNING) and logger.handlers, "the client writes that on standard error"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "120"}, 120),
        ({"retry-after": " 120 "}, 120),
        ({"Retry-After": "9" * 5000}, 999_999_999_999),
        ({"RateLimit": '"resolvers";r=0;t=55', "Retry-After": "1"}, 55),
        ({"RateLimit": '"resolvers";r=7;t=55'}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "-5"}, 0),
        ({"Retry-After": "\u0663"}, 0),
        ({}, 0),
    ],
)
def test_what_a_server_asks_for(headers: dict[str, str], seconds: int) -> None:
    assert asked_wait(headers) == seconds


def test_waits_add_up_until_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(client_library.time, "monotonic", lambda: now[0])
    patience = Patience()
    url = SimpleNamespace(host="hub")
    refusal = SimpleNamespace(status_code=503, headers={"Retry-After": "400"}, request=SimpleNamespace(url=url))
    patience(refusal)
    now[0] += 401
    with pytest.raises(EnvironmentFault, match="hub asks to wait 400 s"):
        patience(refusal)
    patience(refusal)
    now[0] += 401
    patience(SimpleNamespace(status_code=200))
    patience(refusal)


def test_progress_counts_every_shard_once(hub: Hub, client: str, model: Path) -> None:
    source = open_hub(SOURCE)
    assert isinstance(source, HubSource)
    seen: list[int] = []
    source.fetch(seen.append)
    assert sum(seen) == source.nbytes
    assert len(seen) >= len(weights(model))


def test_converts_to_what_the_folder_converts_to(
    hub: Hub, client: str, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    source = open_hub(SOURCE)
    assert isinstance(source, HubSource)
    out = tmp_path / "out"
    convert_checkpoint(source.fetch(lambda nbytes: None), out, OPTIONS, jobs=2)
    assert weights(out) == expected
    record = json.loads((out / "xpuquant.json").read_text())
    assert (record["source"]["name"], record["source"]["revision"]) == (SOURCE, source.revision)
    assert f"base_model: {SOURCE}" in (out / "README.md").read_text()


def test_offline_the_cache_is_enough(hub: Hub, client: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    source = open_hub(SOURCE)
    assert isinstance(source, HubSource)
    source.fetch(lambda nbytes: None)
    hub.forget_requests()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = open_hub(SOURCE)
    assert (offline.name, offline.revision) == (SOURCE, source.revision)
    assert weights(offline.folder) == weights(model)  # type: ignore[union-attr]
    assert hub.requests() == []


# Refusals


def test_refusals_are_one_line_with_the_fix(
    hub: Hub, client: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.seed("producer/gated", model, gated=True)
    hub.seed("producer/private", model, private=True)
    hub.seed("producer/empty", model / "nothing")
    cases: list[tuple[str, str | None, type[Exception], str]] = [
        ("producer/gated", None, EnvironmentFault, "gated: ask for access.*hf auth login"),
        ("producer/private", None, UsageError, "no such model on the Hub, or it is private.*hf auth login"),
        ("producer/missing", None, UsageError, "no such model"),
        ("producer/empty", None, UsageError, "no config.json"),
        (SOURCE, "nothing", UsageError, "no such revision"),
    ]
    for repo_id, revision, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            open_hub(repo_id, revision)
        assert "\n" not in str(caught.value)
        assert repo_id in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match=r"not in the cache.*unset HF_HUB_OFFLINE"):
        open_hub(SOURCE)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "a\\b", "a\x1b[2J", "x" * 300])
def test_a_server_cannot_name_files_elsewhere(hub: Hub, client: str, model: Path, name: str) -> None:
    store = hub.store
    repo = store.repo(SOURCE)
    commit = store.commit(repo, repo.refs["main"])
    commit.files[name] = store.add_regular(b"x")
    repo.refs["main"] = store.add_commit(repo, commit)
    store.save(repo)
    with pytest.raises(DamagedError, match="cannot be kept here"):
        open_hub(SOURCE)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nothing", {}, "no such folder here, and no repo id"),
        ("/no/where", {}, "no such folder"),
        ("../x/y", {}, "no such folder"),
        (str(FIXTURES), {"revision": "main"}, "revision is for"),
        (str(FIXTURES), {"stream": True}, "stream is for"),
        (str(FIXTURES / "README.md"), {}, "is a file"),
    ],
)
def test_names_that_are_no_repository(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_source(name, **options)  # type: ignore[arg-type]


# What comes is what the Hub says


LFS = pytest.mark.parametrize("client", ["lfs"], indirect=True)
"""What is spoilt is what goes over LFS."""


def spoil(hub: Hub, name: str) -> Path:
    """One flipped bit in what the server sends of a file; returns where its bytes lie."""
    commit = hub.store.commit(repo := hub.store.repo(SOURCE), repo.refs["main"])
    path = hub.store.content(commit.files[name])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


@LFS
@pytest.mark.parametrize("name", ["model-00003-of-00008.safetensors", "generation_config.json"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_flipped_bit_is_noticed(
    hub: Hub, client: str, model: Path, name: str, streamed: bool, tmp_path: Path
) -> None:
    spoil(hub, name)
    with pytest.raises(DamagedError, match=rf"{SOURCE}: {name} has (sha256|git sha1) \w+…, the Hub says \w+…"):
        api.convert(SOURCE, tmp_path / "out", stream=streamed)
    assert not (tmp_path / "out" / "config.json").exists()
    # What was wrong is not kept: the same command goes on.
    spoil(hub, name)
    api.convert(SOURCE, tmp_path / "out", stream=streamed)
    assert api.verify(tmp_path / "out", source=model).passed


@LFS
def test_a_wrong_answer_to_a_range_is_noticed(
    hub: Hub, client: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of a streamed conversion is made from ranges, which nothing vouches for until the shard is here."""
    real = Ranges.read

    def flipping(self: Ranges, name: str, begin: int, end: int) -> bytes:
        data = bytearray(real(self, name, begin, end))
        if begin > 0:  # a column order, not a header
            data[:4], data[4:8] = data[4:8], data[:4]
        return bytes(data)

    monkeypatch.setattr(Ranges, "read", flipping)
    with pytest.raises(DamagedError, match="came other than they are in the file"):
        api.convert(SOURCE, tmp_path / "out", stream=True)
    assert not (tmp_path / "out" / "config.json").exists()


@LFS
def test_a_bit_that_flipped_in_the_cache_is_noticed_offline(
    hub: Hub, client: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    fetched = open_hub(SOURCE)
    assert isinstance(fetched, HubSource)
    path = fetched.fetch(lambda nbytes: None).folder / "model-00002-of-00008.safetensors"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    open_hub(SOURCE)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(data)
    with pytest.raises(DamagedError, match=r"model-00002.* in the cache has sha256 \w+…, the Hub says"):
        open_hub(SOURCE)


@LFS
def test_a_config_beyond_the_limit_is_not_downloaded(hub: Hub, client: str, model: Path) -> None:
    (model / "config.json").write_bytes((model / "config.json").read_bytes() + b" " * (33 << 20))
    hub.seed("producer/large", model)
    with pytest.raises(DamagedError, match=r"config\.json is too large for a JSON config"):
        open_hub("producer/large")
    assert not any("config.json" in request.path for request in hub.requests())


# Streaming


def stream(out: Path, target: bool = True, verify: bool = True) -> tuple[Converted, Pushed | None]:
    source = open_hub(SOURCE, stream=True)
    assert isinstance(source, StreamedSource)
    result = convert_streaming(
        source,
        out,
        OPTIONS,
        jobs=2,
        verify=verify,
        force=False,
        reporter=Silent(),
        command="xpuquant convert",
        destination=Destination(REPO) if target else None,
    )
    return result, result.pushed


def test_streamed_bytes_are_those_of_a_plain_conversion(
    hub: Hub, client: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result, pushed = stream(out)
    assert pushed is not None
    files = hub.files(REPO)
    assert weights(files) == expected
    assert {
        "config.json",
        "model.safetensors.index.json",
        "README.md",
        "verify.json",
        "xpuquant.json",
    } <= files.keys()
    assert json.loads(files["verify.json"])["passed"]
    assert json.loads(files["verify.json"])["exact"]["modules"] == len(result.plan.modules)
    assert not out.exists()
    assert hub.store.repo(REPO).refs.keys() == {"main"}
    assert hub.commits(REPO) == ["Convert for Intel GPUs with xpuquant", "initial commit"]


def test_streamed_to_a_folder(hub: Hub, client: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    _, pushed = stream(tmp_path / "out", target=False)
    assert pushed is None
    assert weights(tmp_path / "out") == expected
    assert not (tmp_path / "out/.xpuquant").exists()


def test_disk_stays_below_what_was_said(hub: Hub, client: str, model: Path, tmp_path: Path) -> None:
    source = open_hub(SOURCE, stream=True)
    assert isinstance(source, StreamedSource)
    plan = make_plan(source.checkpoint, OPTIONS)
    said = peak_disk(plan, source, dropping=True)
    assert said < source.nbytes < source.nbytes + plan.write_bytes
    assert len(segments(plan)) > 3
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            held = 0
            for place in (tmp_path / "out", tmp_path / "cache"):
                for path in (Path(top) / name for top, _, names in os.walk(place) for name in names):
                    with suppress(OSError):
                        held += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
            peak = max(peak, held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stream(tmp_path / "out")
    done.set()
    watcher.join()
    small = sum(len(content) for name, content in hub.files(REPO).items() if not name.endswith(".safetensors"))
    assert 0 < peak <= said + 2 * small


@pytest.mark.parametrize("step", range(0, 60, 4))
def test_a_stream_that_stops_anywhere_goes_on(
    hub: Hub, client: str, expected: dict[str, bytes], tmp_path: Path, step: int
) -> None:
    """The Hub goes away for good at the n-th request, with an older model in the target repository."""
    from support.hub.fixtures import push_older

    older = push_older(REPO, tmp_path)
    hub.arm({"method": "", "path": "^/(api|me|producer|-)", "skip": step, "times": 99999, "drop": "before"})
    with suppress(EnvironmentFault):
        stream(tmp_path / "out")
    hub.arm()
    files = hub.files(REPO)
    assert files == older or weights(files) == expected
    for name in hub.store.repo(REPO).refs:
        if name != "main":
            staged = hub.files(REPO, name)
            assert staged == older or "config.json" not in staged
    hub.forget_requests()
    _, pushed = stream(tmp_path / "out")
    assert pushed is not None
    assert weights(hub.files(REPO)) == expected
    assert hub.store.repo(REPO).refs.keys() == {"main"}
    assert json.loads(hub.files(REPO)["verify.json"])["passed"]


def test_what_was_published_unverified_is_made_again_and_verified(
    hub: Hub, client: str, model: Path, tmp_path: Path
) -> None:
    stream(tmp_path / "out", verify=False)
    assert "verify.json" not in hub.files(REPO)
    assert not stream(tmp_path / "out", verify=False)[0].is_new, "nobody asked for more"
    result, _ = stream(tmp_path / "out")
    assert result.is_new and result.verdict is not None and result.verdict.passed
    assert json.loads(hub.files(REPO)["verify.json"])["passed"]
    assert not stream(tmp_path / "out")[0].is_new


def test_staged_shards_are_not_made_again(hub: Hub, client: str, model: Path, tmp_path: Path) -> None:
    hub.arm({"method": "POST", "path": "/commit/", "skip": 4, "times": 99999, "status": 503})
    with pytest.raises(EnvironmentFault):
        stream(tmp_path / "out")
    hub.arm()
    branch = next(name for name in hub.store.repo(REPO).refs if name != "main")
    assert len(weights(hub.files(REPO, branch))) == 4
    hub.forget_requests()
    stream(tmp_path / "out")
    commits = [request for request in hub.requests() if "/commit/" in request.path and request.method == "POST"]
    assert len(commits) == len(weights(hub.files(REPO))) - 4 + 1


# The command line, as a process with nothing of this one's settings


def xpuquant(hub: Hub, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xpuquant", *arguments]
    return subprocess.run(command, cwd=place, env=settings(hub, place), capture_output=True, text=True)


def settings(hub: Hub, place: Path) -> dict[str, str]:
    return hub.environment(
        place / "home",
        PYTHONSAFEPATH="1",
        HF_XET_CLIENT_RETRY_BASE_DELAY="20ms",
        HF_HUB_DISABLE_XET=os.environ["HF_HUB_DISABLE_XET"],
    )


STREAM = ("convert", SOURCE, "--stream", "--push-to", REPO, "--max-shard-size", "12kB")


def test_killed_and_run_again_and_again(hub: Hub, expected: dict[str, bytes], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xpuquant", *STREAM]
    with subprocess.Popen(command, cwd=tmp_path, env=settings(hub, tmp_path), stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            commits = [request for request in hub.requests() if "/commit/" in request.path]
            if len(commits) >= 2:
                running.kill()
            time.sleep(0.01)
    assert running.returncode == -signal.SIGKILL
    assert "config.json" not in hub.files(REPO)
    again = xpuquant(hub, tmp_path, *STREAM)
    assert again.returncode == 0, again.stderr
    assert "needs at most" in again.stderr
    assert f"vllm serve {REPO}" in again.stdout
    assert weights(hub.files(REPO)) == expected
    commits_made = hub.commits(REPO)
    once_more = xpuquant(hub, tmp_path, *STREAM, "--json")
    assert json.loads(once_more.stdout)["uploaded"] == []
    assert hub.commits(REPO) == commits_made


def test_convert_push_verify_by_repo_id(hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    convert = ("convert", SOURCE, "out", "--push-to", REPO, "--public", "--max-shard-size", "12kB", "--json")
    hub.arm({"method": "POST", "path": "/commit/", "status": 503, "times": 99})
    failed = xpuquant(hub, tmp_path, *convert)
    assert failed.returncode == 4
    assert failed.stderr == f"error: {REPO}: the Hub did not answer (HTTP 503); run the same command again\n"
    hub.arm()
    done = xpuquant(hub, tmp_path, *convert)
    assert done.returncode == 0, done.stderr
    assert hub.files(REPO) == contents(tmp_path / "out")
    assert weights(hub.files(REPO)) == expected
    assert not hub.store.repo(REPO).private
    assert xpuquant(hub, tmp_path, "verify", "out", "--source", SOURCE).returncode == 0
    pushed = xpuquant(hub, tmp_path, "push", "out", REPO, "--json")
    assert json.loads(pushed.stdout)["uploaded"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("convert", SOURCE, "--push-to", SOURCE), "would replace the source"),
        (("convert", SOURCE, "--push-to", REPO, "--pr", "--branch", "x"), "exclude each other"),
        (("convert", SOURCE, "--stream", "--shard", "1/2"), "--stream does not go with --part"),
        (("convert", "producer/missing"), "no such model on the Hub"),
    ],
)
def test_usage_errors(hub: Hub, model: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    refused = xpuquant(hub, tmp_path, *arguments)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1
