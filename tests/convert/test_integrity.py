"""After the fact: `xpuquant verify` finds any bit that is not as it was written, and no file breaks it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FIXTURES
from support.fuzz.case import command
from support.fuzz.folder import dumps
from support.fuzz.mutations import change_at, odd
from support.fuzz.tally import count

from xpuquant.conversion.repo.checksums import seal
from xpuquant.conversion.verify.foreign import UNPROTECTED

PLACES = int(os.environ.get("XPUQUANT_TRUST_PLACES", "60"))
"""Random bits; scripts/lanes/trust takes a thousand and more."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo in several shards, with files that are only copied."""
    source = tmp_path_factory.mktemp("source") / "moe"
    shutil.copytree(FIXTURES / "gptqmodel-qwen3moe-w4g32", source)
    (source / "templates").mkdir()
    (source / "templates" / "tool.jinja").write_text("x" * 1000)
    (source / "modeling_x.py").write_text("pass\n")
    out = tmp_path_factory.mktemp("out") / "moe"
    code, _, error = command("convert", str(source), str(out), "--max-shard-size", "60kB")
    assert code == 0, error
    return out


def verify(folder: Path) -> tuple[int, str, str]:
    return command("verify", str(folder), "--backend", "reference", "--jobs", "1", "--json")


def protected(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if name not in UNPROTECTED]


def flip(path: Path, bit: int) -> None:
    """Turn one bit over; again to turn it back."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_as_written_it_passes(converted: Path) -> None:
    code, text, error = verify(converted)
    assert (code, error) == (0, ""), text


def test_a_bit_in_each_file(converted: Path) -> None:
    """First, middle and last bit of every file but the card, which people edit."""
    for name in protected(converted):
        size = 8 * (converted / name).stat().st_size
        for bit in {0, size // 2, size - 1}:
            flip(converted / name, bit)
            code, text, error = verify(converted)
            flip(converted / name, bit)
            assert code in (1, 3), (name, bit, code, text, error)
            count("integrity: bits flipped and found")
            assert "internal error" not in error and "Traceback" not in error
    assert verify(converted)[0] == 0


def test_bits_at_random(converted: Path) -> None:
    """Any place in any file, each as likely as its bytes are many."""
    rng = random.Random(1000)
    names = protected(converted)
    sizes = [(converted / name).stat().st_size for name in names]
    for _ in range(PLACES):
        name = rng.choices(names, sizes)[0]
        bit = rng.randrange(8 * (converted / name).stat().st_size)
        flip(converted / name, bit)
        code, _, error = verify(converted)
        flip(converted / name, bit)
        assert code in (1, 3) and "internal error" not in error, (name, bit, code, error)
        count("integrity: bits flipped and found")
    assert verify(converted)[0] == 0


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "swapped", "zeros"])
def test_whole_files(damage: str, converted: Path, tmp_path: Path) -> None:
    for name in protected(converted):
        if damage == "gone" and name.startswith("verify."):
            continue  # a report that was deleted is no damage to the model
        out = Path(shutil.copytree(converted, tmp_path / name.replace("/", "_")))
        path = out / name
        if damage == "cut":
            os.truncate(path, path.stat().st_size - 1)
        elif damage == "longer":
            path.write_bytes(path.read_bytes() + b"\0")
        elif damage == "gone":
            path.unlink()
        elif damage == "zeros":
            path.write_bytes(bytes(path.stat().st_size))
        else:
            other = next(shard for shard in sorted(out.glob("*.safetensors")) if shard != path)
            path.write_bytes(other.read_bytes())
        code, text, error = verify(out)
        assert code in (1, 2, 3), (name, text, error)
        count("integrity: files cut, lengthened, swapped, emptied or removed, and found")
        assert "internal error" not in error
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["model-00009-of-00009.safetensors", "pytorch_model.bin", "modeling_y.py"])
def test_files_that_were_added(name: str, converted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    shutil.copy(next(out.glob("*.safetensors")), out / name)
    assert verify(out)[0] in (1, 3)


def test_records_made_to_break_it(converted: Path, tmp_path: Path) -> None:
    """A stranger can seal what he likes: values of any type in any JSON file end in a finding or a refusal."""
    rng = random.Random(7)
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    names = ["xpuquant.json", "config.json", "model.safetensors.index.json", "verify.json"]
    kept = {name: (out / name).read_bytes() for name in names}
    for i in range(PLACES * 2):
        name = names[i % len(names)]
        value: Any = json.loads(kept[name])
        changed = [change_at(rng, value) for _ in range(rng.choice([1, 2, 5]))]
        if rng.random() < 0.05:
            value = odd(rng)
        content = dumps(value)
        if name in ("xpuquant.json", "verify.json"):
            zeroed = re.sub(rb'"sha256": "[0-9a-f]{64}"', b'"sha256": "' + b"0" * 64 + b'"', content, count=1)
            content = seal(zeroed) if zeroed != content else content
        (out / name).write_bytes(content)
        code, _, error = verify(out)
        (out / name).write_bytes(kept[name])
        assert code in (0, 1, 2, 3, 5), (name, changed, code, error)
        assert "internal error" not in error and error.count("\n") <= 1, (name, changed, error)
        assert error.rstrip("\n").isprintable(), ascii(error)
        count("integrity: forged records survived")
    assert verify(out)[0] == 0
