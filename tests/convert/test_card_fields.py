"""`--base-model`, `--license`, `--language`: what the card of a conversion is told to say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import FIXTURES

from xpuquant.conversion.cli.app import run
from xpuquant.conversion.repo.card_merge import front_matter

SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32"
TOLD = ["--base-model", "Qwen/Qwen3-8B", "--license", "apache-2.0", "--language", "en,zh"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder whose name is nobody else's business."""
    return Path(shutil.copytree(SOURCE, tmp_path / "secret-place" / "my model"))


def convert(source: Path, out: Path, *options: str) -> int:
    return run(["convert", str(source), str(out), "--no-verify", *options])


def front(out: Path) -> dict[str, Any]:
    text = (out / "README.md").read_text()
    found = front_matter(text)
    assert found == yaml.safe_load(text.split("---\n")[1]), "any reader of YAML reads the same"
    return found


def test_they_stand_in_the_card(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "plain") == 0
    assert not front(tmp_path / "plain").keys() & {"base_model", "license", "language", "base_model_relation"}
    assert convert(source, tmp_path / "out", *TOLD) == 0
    said = front(tmp_path / "out")
    assert (said["base_model"], said["base_model_relation"]) == ("Qwen/Qwen3-8B", "quantized")
    assert (said["license"], said["language"]) == ("apache-2.0", ["en", "zh"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "[Qwen/Qwen3-8B](https://huggingface.co/Qwen/Qwen3-8B)" in text and "secret-place" not in text
    assert "--base-model Qwen/Qwen3-8B --license apache-2.0 --language en,zh" in text
    assert convert(source, tmp_path / "one", "--language", "no") == 0
    assert front(tmp_path / "one")["language"] == "no", "a code, not YAML's False"


def test_the_bytes_do_not_depend_on_them(source: Path, tmp_path: Path) -> None:
    """A conversion that was stopped is resumed by a command with others."""
    assert convert(source, tmp_path / "a") == 0 and convert(source, tmp_path / "b", *TOLD) == 0
    for name in ("model.safetensors", "config.json", "xpuquant.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_they_go_before_the_sources_own_card(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: other/base\ndatasets: [a/b]\n---\nText\n")
    assert convert(source, tmp_path / "kept") == 0
    assert (front(tmp_path / "kept")["license"], front(tmp_path / "kept")["base_model"]) == ("mit", "other/base")
    assert convert(source, tmp_path / "out", *TOLD) == 0
    said = front(tmp_path / "out")
    assert (said["license"], said["base_model"], said["datasets"]) == ("apache-2.0", "Qwen/Qwen3-8B", ["a/b"])


def test_a_finished_conversion_says_so_or_names_the_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(source, out, *TOLD) == 0
    assert convert(source, out, *TOLD) == 0
    card = (out / "README.md").read_text()
    capsys.readouterr()
    assert convert(source, out, "--license", "mit") == 2
    error = capsys.readouterr().err
    assert "its card does not say --license mit; write it into" in error and "README.md" in error
    assert error.count("\n") == 1 and (out / "README.md").read_text() == card


def test_what_people_wrote_is_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(source, out, *TOLD) == 0
    card = out / "README.md"
    text = card.read_text().replace("license: apache-2.0", "license: other\nlicense_name: mine")
    card.write_text(text.replace("<!-- xpuquant:begin", "Written by me.\n\n<!-- xpuquant:begin", 1))
    assert convert(source, out, *TOLD, "--force") == 0
    said = front(out)
    assert (said["license"], said["license_name"], said["base_model"]) == ("other", "mine", "Qwen/Qwen3-8B")
    assert "Written by me." in card.read_text()


def test_parts_leave_them_to_finish(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["convert", str(source), str(out), "--part", "1/1"]
    assert run([*words, "--license", "mit"]) == 2
    assert "`finish` writes the card" in capsys.readouterr().err
    assert run(words) == 0 and run(["finish", str(source), str(out), "--no-verify", *TOLD]) == 0
    assert front(out)["license"] == "apache-2.0"
    assert "--license apache-2.0" in (out / "README.md").read_text()
