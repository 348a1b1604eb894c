"""For every test: threads, hypothesis, markers by folder, the wheel of this tree, and a table of what was skipped."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import skips

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# Workers run side by side; threads below them only spin.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# Reports say when they were made: with this, equal conversions write equal files, and tests compare all of them.
os.environ.setdefault("SOURCE_DATE_EPOCH", "1795780800")

# A run's own notes bear a mark of the user's key: not of whoever runs the tests.
os.environ.setdefault("XDG_STATE_HOME", str(ROOT / ".pytest_cache" / "state"))

with suppress(ImportError):  # the slow lanes' environments have no hypothesis
    from hypothesis import settings

    # No deadline: the first call of a compiled loop compiles it.
    settings.register_profile("compiled", deadline=None)
    settings.load_profile("compiled")

MARKERS = {
    "reliability/": "reliability",
    "serving/vllm_plugin/": "vllm",
    # Slow are those that run the whole program many times, take real sizes, or load other libraries' models.
    "reliability/test_faults.py": "slow",
    "reliability/test_fuzz.py": "slow",
    "reliability/test_injected_faults.py": "slow",
    "convert/test_scale.py": "slow",
    "convert/test_terminal.py::test_a_terminal_shows_what_a_pipe_does": "slow",
    "convert/test_full_size.py": "slow",
    "convert/test_convert.py::TestInterruption": "slow",
    "convert/test_hub.py::test_a_stream_that_stops_anywhere_goes_on": "slow",
    "convert/test_hub.py::test_faults_while_reading": "slow",
    "convert/test_integrity.py::test_a_bit_in_each_file": "slow",
    "convert/test_integrity.py::test_bits_at_random": "slow",
    "formats/test_patterns.py::test_exploding_patterns_end": "slow",
    "formats/test_portable_layouts.py::test_the_library_decodes_what_the_producer_meant": "slow",
    "formats/test_portable_layouts.py::test_converts_to_xpu_like_its_source": "slow",
    "formats/test_safetensors.py::test_a_million_tensors_take_seconds_and_no_more_memory_than_they_need": "slow",
    "kernels/test_onednn.py::test_lives_with_torch_in_one_process": "slow",
    "serving/test_transformers.py": "slow",
    "serving/vllm_plugin/test_checkpoints.py::test_expert_parallel": "slow",
    "serving/vllm_plugin/test_checkpoints.py::test_tensor_parallel": "slow",
    "serving/vllm_plugin/test_parallel.py": "slow",
    "serving/vllm_plugin/test_serve.py::test_the_real_model_answers": "slow",
    "serving/vllm_plugin/test_smollm2.py": "slow",
}
"""The beginning of a test's name, from below tests/ → the marker that it gets."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.path.relative_to(TESTS).as_posix() + "::" + item.nodeid.partition("::")[2]
        for start, marker in MARKERS.items():
            if name.startswith(start):
                item.add_marker(marker)
        callspec = getattr(item, "callspec", None)
        if callspec and callspec.params.get("backend") == "vllm_xpu":
            item.add_marker("gpu")


def _skipped(terminalreporter: Any) -> Counter[str]:
    """Reason → how many tests gave it."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        # (file, line, "Skipped: reason") of a skip; of an expected failure a text.
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[said.removeprefix("Skipped: ")] += 1
    return reasons


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a lane of CI, a skip that hides what the lane is there to run is a failure. See support/skips.py."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of pytest-xdist
        return
    skipped = _skipped(reporter)
    failed = sum(len(reporter.stats.get(kind, [])) for kind in ("failed", "error"))
    if not hasattr(session.config, "workerinput"):  # the process that started the workers has counted theirs
        skips.record(len(reporter.stats.get("passed", [])), failed, skipped)
    if skips.forbidden(skipped) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, counted by reason: a skip that nobody sees is a test that nobody has."""
    reasons = _skipped(terminalreporter)
    if reasons:
        terminalreporter.section("skipped, by reason")
        for reason, number in reasons.most_common():
            terminalreporter.write_line(f"{number:5}  {reason}")
    for reason in skips.forbidden(reasons):
        terminalreporter.write_line(
            f"ERROR: the lane {skips.LANE} must not skip this: {reason} (tests/support/skips.py)"
        )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built without network, once for all workers of a run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "wheel"
    with (shared / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(out.glob("*.whl")):
            _build_wheel(shared / "tree", out)
    return next(out.glob("*.whl"))


def _build_wheel(tree: Path, out: Path) -> None:
    """From a copy: setuptools leaves folders where it builds."""
    tree.mkdir(exist_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "xpuquant", "convert", "formats", "kernels"):
        subprocess.run(["cp", "-rL", "--", str(ROOT / name), str(tree)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*command, "-w", str(out), str(tree)],
        capture_output=True,
        text=True,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    if built.returncode:
        pytest.skip(f"no wheel can be built here: {built.stderr.strip().splitlines()[-1]}")
