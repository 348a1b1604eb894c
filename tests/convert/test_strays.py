"""What is no file where a file should be: a pipe, a folder, a socket. It is called so by every command, never missing,
never waited for and never passed over."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command

import xpuquant
from xpuquant.conversion.sources.secret_names import secret_notes

SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32"
NAMES = (
    "config.json", "tokenizer.json", "model.safetensors", "xpuquant.json", "verify.json", "verify.md", "verify.html",
    "verify.svg", "README.md",
)  # fmt: skip


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path may have 107 bytes
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


STRAYS: dict[str, Callable[[Path], object]] = {"pipe": os.mkfifo, "folder": Path.mkdir, "socket": put_socket}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("strays") / "out"
    xpuquant.convert(SOURCE, out)
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", STRAYS)
def test_it_is_named_by_verify_and_push(kind: str, name: str, converted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    (out / name).unlink()
    STRAYS[kind](out / name)
    code, said, error = command("verify", str(out), "--backend", "reference", "-q")
    assert code in (1, 3) and f"{name}: is a {kind}, not a file" in said + error
    assert "missing" not in said + error and "more)" not in said + error, "it alone is wrong"
    code, _, error = command("push", str(out), "me/x")
    assert code == 3 and f"{out / name}: is a {kind}, not a file" in error and error.count("\n") == 1


def test_a_file_that_the_conversion_did_not_write_neither(converted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    (out / "notes").mkdir()
    os.mkfifo(out / "notes" / "day.txt")
    code, _, said = command("verify", str(out), "--backend", "reference", "-q")
    assert code == 1 and "notes/day.txt: is a pipe, not a file; move it away" in said
    (out / "notes" / "day.txt").unlink()
    (out / ".git").mkdir()
    os.mkfifo(out / ".git" / "fsmonitor--daemon.ipc")
    assert command("verify", str(out), "--backend", "reference", "-q")[0] == 0, "git's own"


def test_quietly_the_verdict_is_said_once(converted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    (out / "tokenizer.json").unlink()
    code, said, error = command("verify", str(out), "--backend", "reference", "-q")
    assert (code, said) == (1, "") and error.count("\n") == 1 and "tokenizer.json: is missing" in error
    code, said, error = command("verify", str(out), "--backend", "reference", "-q", "--json")
    assert code == 1 and '"verdict": "failed"' in said, "a program wants all of it"


def test_a_card_of_a_terabyte_fails(converted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    os.truncate(out / "README.md", 1 << 40)
    code, _, said = command("verify", str(out), "--backend", "reference", "-q")
    assert code == 1 and "README.md: has 1099511627776 bytes, more than any file beside the weights" in said


def test_reports_whose_list_is_gone_are_said_to_be_not_compared(converted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    (out / "verify.json").unlink()
    code, _, said = command("verify", str(out), "--backend", "reference", "-q")
    assert code == 1 and "verify.md: cannot be compared: verify.json, which holds its sha256, is missing" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "quantize_config.json"])
def test_a_source_is_not_read_without_it(name: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(SOURCE, tmp_path / "model"))
    (source / name).unlink()
    os.mkfifo(source / name)
    for words in (["inspect", str(source)], ["convert", str(source), str(tmp_path / "out")]):
        code, _, error = command(*words)
        assert code == 3 and f"{source / name}: is a pipe, not a file" in error and error.count("\n") == 1


def test_what_a_source_can_do_without_is_a_note_each(tmp_path: Path) -> None:
    source = Path(shutil.copytree(SOURCE, tmp_path / "model"))
    for name in ("extra.txt", "generation_x.json"):
        os.mkfifo(source / name)
    code, said, error = command("convert", str(source), str(tmp_path / "out"))
    assert code == 0, error
    assert "extra.txt is a pipe, not a file: not taken over" in said
    assert "generation_x.json is a pipe, not a file: not taken over" in said


# What else a source may hold that is not taken over, or should not have been


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("base_model: '<script>'", "base_model is not of the form that the Hub gives it ('<script>')"),
        ("tags: !!int x", "tags cannot be read"),
        ("tags: [fine, '<b>']", "tags has 1 item not of the form that the Hub gives it"),
        ("license: [unclosed", "license cannot be read"),
    ],
)
def test_a_field_of_the_source_s_card_that_is_not_kept_is_a_note(line: str, said: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(SOURCE, tmp_path / "model"))
    (source / "README.md").write_text(f"---\n{line}\n---\n# A model\n")
    code, _, error = command("convert", str(source), str(tmp_path / "out"), "--no-verify")
    assert code == 0 and error == f"README.md of the source: {said}: not taken over\n"
    code, _, error = command(
        "convert", str(source), str(tmp_path / "told"), "--no-verify", "--base-model", "a/b", "--license", "mit"
    )
    assert code == 0 and ("tags" in line) == bool(error), "what is told is not lost"


def test_a_card_that_is_kept_whole_makes_no_note(tmp_path: Path) -> None:
    source = Path(shutil.copytree(SOURCE, tmp_path / "model"))
    (source / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\nbase_model: a/b\nextra_gated_prompt: x\n---\n")
    assert command("convert", str(source), str(tmp_path / "out"), "--no-verify")[2] == ""


SECRETS = ("id_rsa", "token", "server.pem", "_netrc", "prod.env", "credentials.json", "below/hf_token.txt")


def test_files_that_are_called_like_secrets_are_said_each(tmp_path: Path) -> None:
    source = Path(shutil.copytree(SOURCE, tmp_path / "model"))
    (source / "below").mkdir()
    for name in (*SECRETS, "special_tokens_map.json", "added_tokens.json"):
        (source / name).write_text("{}")
    for words in (["inspect", str(source)], ["convert", str(source), str(tmp_path / "out")]):
        code, said, error = command(*words)
        assert code == 0, error
        for name in SECRETS:
            assert f"{name} is called like a secret, and is copied: move it away if it is one" in said
        assert said.count("like a secret") == len(SECRETS)


def test_so_they_are_before_a_push(tmp_path: Path) -> None:
    said = secret_notes(["config.json", "tokenizer.json", "id_rsa", "merges.txt"], "published")
    assert said == ["id_rsa is called like a secret, and is published: move it away if it is one"]
    many = secret_notes([f"{i}.pem" for i in range(25)], "copied")
    assert len(many) == 21 and many[-1] == "5 more are called like secrets"
