"""`xpuquant doctor`: every backend is there, with its state, and nothing makes it fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xpuquant.ark_releases import ARK_PACKAGE
from xpuquant.conversion import doctor
from xpuquant.conversion.cli.app import run
from xpuquant.kernels import backends
from xpuquant.xpu_releases import PACKAGE


def test_every_backend_runs_or_says_why_not(capsys):
    assert run(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in said["backends"]} == set(backends())
    state = {one["name"]: one["problem"] for one in said["backends"]}
    assert state["reference"] is None
    assert all(problem is None or (problem and "\n" not in problem) for problem in state.values())
    assert said["versions"]["xpuquant"] and said["versions"]["numpy"]


def test_for_a_reader(capsys):
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "kernel backends" in out and "vllm_xpu" in out and "Intel GPUs:" in out


def test_a_backend_that_crashes_does_not_hide_the_others(monkeypatch):
    class Broken:
        name = "broken"

        def unavailable(self):
            raise OSError("libsycl.so.8: cannot open shared object file")

    monkeypatch.setattr(doctor, "backends", lambda: {"reference": backends()["reference"], "broken": Broken()})
    first, second = doctor.examine().backends
    assert first.problem is None and "libsycl.so.8" in (second.problem or "")


@pytest.mark.parametrize(("vendor", "expected"), [("0x8086", 1), ("0x1002", 0)])
def test_intel_gpus_are_found_by_their_driver_s_nodes(vendor, expected, tmp_path: Path):
    (tmp_path / "renderD128" / "device").mkdir(parents=True)
    (tmp_path / "renderD128" / "device" / "vendor").write_text(f"{vendor}\n")
    devices, _ = doctor._render_nodes(tmp_path)
    assert len(devices) == expected


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        (
            PACKAGE,
            "0.1.15.4",
            ["serves with", "fp8_gemm_w8a16 takes blocks for square", "gives rows without an expert"],
        ),
        (PACKAGE, "0.1.16.2", ["serves with"]),
        (PACKAGE, "0.1.14.1", ["too old"]),
        (PACKAGE, "0.1.17.1", ["newer than this xpuquant knows"]),
        (PACKAGE, None, []),
        (
            ARK_PACKAGE,
            "0.16.0",
            ["auto-round-lib 0.16.0 is one that xpuquant serves with", "its moe does not take rows", "NaN codes"],
        ),
        (ARK_PACKAGE, "0.15.0", ["auto-round-lib 0.15.0 is too old"]),
        (ARK_PACKAGE, None, []),
    ],
)
def test_it_says_what_is_known_of_the_installed_kernels(package, version, said):
    remarks = doctor._kernel_release(package, version)
    assert len(remarks) == len(said)
    assert all(words in remark for words, remark in zip(said, remarks, strict=True))
