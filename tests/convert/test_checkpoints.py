"""Every real checkpoint converts exactly, or is refused with its reason, as a user would meet it.

Three witnesses: the conversion's own verification, the producer's library (digests of its dequantization in
oracles.json, compared with what the *output* decodes to), and the byte equality of what was passed through.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import SPOILT, all_checkpoints, oracles, refused

from xpuquant.conversion.cli.app import run
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.repo.converted import Repo, open_repo
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.verify import run as _verification  # noqa: F401  (its modules are looked for below)
from xpuquant.errors import DamagedError
from xpuquant.formats import guard
from xpuquant.formats.checkpoint import whole
from xpuquant.formats.layouts.base import Matrix
from xpuquant.formats.weights.parts import source_matrices

NAMES = sorted(all_checkpoints())


@pytest.fixture(autouse=True)
def nothing_is_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reading and verifying turn into a finding about a damaged input is a mistake of ours here: let it out."""
    monkeypatch.setattr(guard, "UNFORESEEN", ())
    for name, module in list(sys.modules.items()):
        if name.startswith("xpuquant.conversion.verify.") and hasattr(module, "CONTRADICTIONS"):
            monkeypatch.setattr(module, "CONTRADICTIONS", (DamagedError,))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in refused().keys() | SPOILT.keys()])
def test_converts_exactly(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = all_checkpoints()[name], tmp_path / "out"
    assert run(["convert", str(source), str(out), "--jobs", "2"]) == 0, capsys.readouterr().err
    assert json.loads((out / "verify.json").read_text())["passed"] is True
    opened = open_source(str(source))
    plan = make_plan(opened.checkpoint, Options())
    repo = open_repo(out)
    for tensor in plan.passed:
        held = repo.reader.read(whole(repo.tensors[tensor.name]))
        assert (repo.tensors[tensor.name].dtype, held.shape) == (tensor.dtype, tensor.shape or (1,))
        part = whole(tensor)
        original = np.empty(part.nbytes, np.uint8)
        opened.read_into(part, original)
        assert held.tobytes() == original.tobytes(), tensor.name
    agrees_with_oracle(name, plan, repo)


@pytest.mark.parametrize("name", [name for name in NAMES if name in refused()])
def test_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = all_checkpoints()[name], tmp_path / "out"
    assert run(["convert", str(source), str(out)]) == 2
    error = capsys.readouterr().err
    assert refused()[name].lower() in error.lower()
    assert error.count("\n") == 1, "one line"
    assert "--on-unsupported dequantize" in error
    assert not out.exists(), "refused before any work"


@pytest.mark.parametrize("name", [name for name in NAMES if name in refused()])
def test_refused_ones_can_be_dequantized(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["convert", str(all_checkpoints()[name]), str(out), "--on-unsupported", "dequantize"]) == 0
    assert "bf16 (dequantized)" in capsys.readouterr().out
    assert json.loads((out / "verify.json").read_text())["passed"] is True
    plan = make_plan(open_source(str(all_checkpoints()[name])).checkpoint, Options(on_unsupported="dequantize"))
    agrees_with_oracle(name, plan, open_repo(out))


@pytest.mark.parametrize("name", sorted(SPOILT))
@pytest.mark.parametrize("option", ["refuse", "dequantize"])
def test_spoilt_ones_are_refused(name: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(all_checkpoints()[name]), str(tmp_path / "out"), "--on-unsupported", option]) == 2
    assert SPOILT[name] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def agrees_with_oracle(name: str, plan: Plan, repo: Repo) -> None:
    """Decode every converted matrix of the output, and compare with the producer's library."""
    wanted = dict(oracles().get(name, {}))
    if not wanted:
        pytest.skip("no producer's library was asked about this checkpoint")
    stacks: dict[str, list[np.ndarray]] = {}  # what the library gave one digest for, expert by expert
    for planned in plan.modules:
        stored = repo.modules.get(planned.conversion.name)
        if stored is None:
            for _, _, weight in planned.weights:
                wanted.pop(weight.name, None)  # rounded to bf16, which the oracle is not
            continue
        layout = repo.layout(stored)
        matrices = {(m.role, m.expert): m for m in layout.matrices(stored)}
        for role, expert, weight in planned.weights:
            matrix = matrices.get((role, expert)) or Matrix(role, weight.N, weight.K, expert)
            bottom = 0
            for part in source_matrices(weight):
                top, bottom = bottom, bottom + part.N
                stack = f"{planned.conversion.name}.{part.name.rpartition('.')[2]}"
                if part.name not in wanted and stack not in wanted:
                    continue
                decoded = layout.decode(stored, matrix, top, bottom)
                # One rounding of the exact product, and no minus zero, as the digests are defined; of NVFP4 two.
                values = decoded.values().astype("<f4") + np.float32(0)
                if decoded.number == "2e2m1":
                    values = decoded.codes * decoded.scale.astype("<f4")[decoded.row][:, decoded.col] + np.float32(0)
                if part.name not in wanted:
                    stacks.setdefault(stack, []).append(values)
                    continue
                entry = wanted.pop(part.name)
                assert entry["shape"] == [part.N, part.K]
                if "ints_sha256" in entry:
                    assert sha256(decoded.codes.astype("<i2")) == entry["ints_sha256"], part.name
                assert sha256(values) == entry["values_sha256"], part.name
        wanted.pop(planned.conversion.name, None)
    for stack, experts in stacks.items():
        assert sha256(np.stack(experts)) == wanted.pop(stack)["values_sha256"], stack
    assert not wanted, "modules the producer's library decodes and the conversion does not"


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
