"""No path below a source or an output, made hostile in any way, makes a command read, write, wait or allocate beyond
its bounds. A few of the cases that scripts/lanes/trust plays by the thousand, and those that were found before."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command
from support.fuzz.deal import cases
from support.fuzz.places import SECRET, Prepared, contents, in_time, play_place, publishable
from support.fuzz.tally import count

pytest_plugins = "support.fuzz.fixtures"

GPTQ = FIXTURES / "gptqmodel-qwen3-w4g32"
CASES = cases("XPUQUANT_TRUST_PLACE_CASES", 80)
MEMORY = 1 << 31


@pytest.mark.parametrize("block", range(CASES.blocks))
def test_no_place_is_believed(block: int, prepared: Prepared) -> None:
    codes: set[int] = set()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in CASES.of(block):
        what, code, problem = play_place(seed, prepared, prepared.source.parent / f"case-{seed}")
        assert problem is None, f"case {seed}: {what}: {problem}"
        codes.add(code)
        count(f"places: exit {code}")
    assert len(codes) > 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY


@pytest.mark.parametrize("name", ["xpuquant.json", "verify.md", "README.md", "model.safetensors", "config.json"])
def test_a_folder_in_the_way_is_said_before_the_work(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GPTQ, source)
    if (source / name).exists():
        (source / name).unlink()
    (source / name).mkdir()
    (source / name / "x").write_text("x")
    code, _, error = command("convert", str(source), str(tmp_path / "out"))
    damaged = name in ("model.safetensors", "config.json")  # which the source needs; the others lie in the way
    assert code == (3 if damaged else 2) and "is a folder" in error, error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def in_the_way(out: Path, name: str, kind: str) -> Path:
    """Something of that kind in place of a file of OUT, or of a folder on the way to it."""
    place = out / name
    place.unlink(missing_ok=True)
    if kind == "folder":
        place.mkdir(parents=True)
        (place / "x").write_text("x")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place = place.parent
        shutil.rmtree(place, ignore_errors=True)
        place.write_text("x")
    return place


@pytest.mark.parametrize("kind", ["folder", "pipe", "file"])
def test_whatever_is_in_the_way_in_the_output_is_said_before_the_work(
    kind: str, prepared: Prepared, tmp_path: Path
) -> None:
    """For every file that a conversion writes, over an earlier one and over one that was stopped."""
    names = [path.relative_to(prepared.out).as_posix() for path in prepared.out.rglob("*") if path.is_file()]
    names = [name for name in names if ("/" in name) == (kind == "file") or ("/" in name and kind == "folder")]
    assert names
    for name in names:
        for number, (before, arguments) in enumerate([(prepared.out, ["--force"]), (prepared.staged, [])]):
            out = tmp_path / f"{name.replace('/', '_')}-{number}"
            shutil.copytree(before, out)
            place = in_the_way(out, name, kind)
            there = sorted(path.relative_to(out) for path in out.rglob("*"))
            code, _, error = command(*prepared.convert(prepared.source, out, *arguments))
            if name == "xpuquant.json" and number == 0:
                assert code == 2 and "was not written by xpuquant" in error
            else:
                assert code == 2 and f"error: {place}: is " in error and error.count("\n") == 1, error
            assert sorted(path.relative_to(out) for path in out.rglob("*")) == there


def left_as(what: str, path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    elif what == "a link":
        path.with_name("moved").write_bytes(content)
        path.symlink_to("moved")
    elif what != "missing":
        path.write_bytes(content + b" ")


@pytest.mark.parametrize("what", ["missing", "a pipe", "a folder", "a link", "not what the conversion wrote"])
def test_what_is_left_of_a_conversion_is_not_said_to_be_finished(what: str, prepared: Prepared, tmp_path: Path) -> None:
    """Every file of it. A card and reports may be edited, and removed."""
    for name in sorted(prepared.written.keys() - {"xpuquant.json"}):
        out = tmp_path / "out"
        shutil.copytree(prepared.out, out)
        left_as(what, out / name)
        code, text, error = command(*prepared.convert(prepared.source, out))
        if name.startswith(("verify.", "README")) and what in ("missing", "not what the conversion wrote"):
            assert code == 0 and json.loads(text)["proof"] is None  # nothing was done
        else:
            assert code == 3 and f"{out / name} is {what}" in error and "pass --force" in error, error
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["verify --source", "push", "convert", "convert --force"])
def test_no_file_is_read_further_than_it_may_go(name: str, prepared: Prepared, tmp_path: Path) -> None:
    """Every file of a finished output, and of one that was stopped, as a sparse terabyte: said by its size, or made
    anew, and not read for an hour."""
    before, out = prepared.staged if name == "convert" else prepared.out, tmp_path / "out"
    commands: dict[str, Callable[[], object]] = {
        "verify --source": lambda: command(
            *("verify", str(out), "--backend", "reference", "--source", str(prepared.source))
        ),
        "push": lambda: publishable(out),
        "convert": lambda: command(*prepared.convert(prepared.source, out)),
        "convert --force": lambda: command(*prepared.convert(prepared.source, out, "--force")),
    }
    for file in sorted(path.relative_to(before) for path in before.rglob("*") if path.is_file()):
        shutil.copytree(before, out)
        with (out / file).open("r+b") as sparse:
            sparse.truncate(1 << 40)
        with in_time():
            commands[name]()
        shutil.rmtree(out)


def test_a_card_that_is_somebody_else_s_file_goes_into_no_other(prepared: Prepared, tmp_path: Path) -> None:
    """Where it lies in OUT, and where an earlier run set it aside: said before the work, and nothing is lost."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    cards = ("README.md", ".xpuquant/README.earlier.md")
    for number, (before, name) in enumerate(itertools.product((prepared.out, prepared.staged), cards)):
        out = tmp_path / f"out-{number}"
        shutil.copytree(before, out)
        (out / "xpuquant.json").touch()  # a run that was stopped while it published left one
        (out / name).unlink(missing_ok=True)
        (out / name).parent.mkdir(exist_ok=True)
        os.link(secret, out / name)
        there = contents(out)
        code, _, error = command(*prepared.convert(prepared.source, out, "--force"))
        assert code == 2 and f"{out / name}: has a second name elsewhere" in error and error.count("\n") == 1, error
        assert contents(out).items() ^ there.items() <= {(".xpuquant/lock", hashlib.sha256().hexdigest())}
        (out / name).unlink()
        assert command(*prepared.convert(prepared.source, out, "--force"))[0] == 0


def test_a_card_that_is_no_card_by_its_size_is_not_lost(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared.out, out)
    with (out / "README.md").open("ab") as card:
        card.write(b"people's words " * (1 << 19))
    there = contents(out)
    code, _, error = command(*prepared.convert(prepared.source, out, "--force"))
    assert code == 3 and "README.md: is too large for what it is (more than 4 MiB)" in error
    assert contents(out) == there


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_card_in_another_encoding_is_not_spoilt(encoding: str, prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared.out, out)
    card = out / "README.md"
    card.write_bytes((card.read_text() + "Ein Café\n").replace("→", "-").encode(encoding, "replace"))
    there = contents(out)
    code, _, error = command(*prepared.convert(prepared.source, out, "--force"))
    assert code == 2 and f"{card}: is not UTF-8" in error and contents(out) == there


def test_folders_a_thousand_deep_where_a_folder_is_removed(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".xpuquant" / "files").mkdir(parents=True)
    (out / "xpuquant.json").touch()
    fd = os.open(out / ".xpuquant" / "files", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("x", dir_fd=fd)
        inner = os.open("x", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    code, _, error = command(*prepared.convert(prepared.source, out, "--force"))
    assert code == 2 and "has folders in folders, too many; remove it" in error
    subprocess.run(["rm", "-rf", str(out)], check=True)


def test_what_is_somebody_else_s_file_is_not_published(prepared: Prepared, tmp_path: Path) -> None:
    """Every file that the record does not know by its sha256. Those that it knows may have as many names as they like:
    copies that share their bytes are made so."""
    record = json.loads((prepared.out / "xpuquant.json").read_bytes())
    known = {*record["shards"], *record["files"]}
    out = tmp_path / "out"
    shutil.copytree(prepared.out, out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} | {"notes.txt"}
    assert len(names - known) >= 5
    for name in sorted(names):
        (out / name).touch()
        other = tmp_path / "other"
        os.link(out / name, other)
        code, _, error = publishable(out)
        if name in known:
            assert code == 0, error
        else:
            assert code == 2 and f"{out / name}: has a second name elsewhere" in error
        other.unlink()
    assert publishable(out)[0] == 0


def test_a_secret_is_not_copied_under_another_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GPTQ, source)
    (source / ".git").mkdir()
    (source / ".git" / "config").write_bytes(SECRET)
    (source / ".env").write_bytes(SECRET)
    (source / "notes.txt").symlink_to(".git/config")
    code, _, error = command("convert", str(source), str(tmp_path / "out"))
    assert code == 2 and "notes.txt: is a link to .git/config, which is not copied" in error
    (source / "notes.txt").unlink()
    assert command("convert", str(source), str(tmp_path / "out"))[0] == 0
    assert not any(SECRET in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_a_staged_shard_that_became_a_link_is_made_anew(prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(prepared.staged, tmp_path / "out")
    victim = tmp_path / "victim"
    victim.write_bytes(SECRET)
    staged = sorted((tmp_path / "out" / ".xpuquant" / "files").glob("*.safetensors"))
    for path in staged:
        path.unlink()
        path.symlink_to(victim)
    assert command(*prepared.convert(prepared.source, tmp_path / "out"))[0] == 0
    assert victim.read_bytes() == SECRET and staged
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_force_through_a_folder_that_is_a_link(prepared: Prepared, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(prepared.out, out)
    elsewhere.mkdir()
    (elsewhere / "x.txt").write_bytes(SECRET)
    shutil.rmtree(out / "sub")
    (out / "sub").symlink_to(elsewhere)
    code, _, error = command(*prepared.convert(prepared.source, out, "--force"))
    assert code == 2 and "sub: is a link; remove it" in error
    assert (elsewhere / "x.txt").read_bytes() == SECRET


def test_few_descriptors(tmp_path: Path) -> None:
    """40 shards where 24 files may be open."""
    from support.hub.fixtures import split_shards

    source = split_shards(GPTQ, tmp_path / "source", 24)
    script = f'ulimit -n 24; exec {sys.executable} -P -m xpuquant convert "$0" "$1" --max-shard-size 4kB --jobs 2'
    done = subprocess.run(
        ["bash", "-c", script, str(source), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 10


@pytest.mark.parametrize("state", ["link", "file", "pipe"])
def test_a_staging_folder_that_is_none(state: str, prepared: Prepared, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    staging = out / ".xpuquant"
    if state == "link":
        staging.symlink_to(elsewhere)
    elif state == "file":
        staging.write_text("x")
    else:
        os.mkfifo(staging)
    code, _, error = command(*prepared.convert(prepared.source, out))
    assert code == 2 and "remove it" in error and error.count("\n") == 1, error
    assert not any(elsewhere.iterdir())
