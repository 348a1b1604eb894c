"""Every way a converted repo can be wrong is caught: as it lies there, and even where the sha256 were recorded again
(as a converter that wrote it wrongly would have), with the source and without it.

The table in docs/verify.md is what happens here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support.injected_faults as inject
from support.checkpoints import FIXTURES

from xpuquant.conversion.options import Options
from xpuquant.conversion.runs.local import convert_checkpoint
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.verify.run import select, verify
from xpuquant.conversion.verify.verdict import Verdict
from xpuquant.formats.layouts import layouts_by_name

DOCS = Path(__file__).parents[2] / "docs" / "verify.md"

CASES = {
    "linear": "gptqmodel-qwen3-w4g32",
    "asymmetric": "gptqmodel-qwen3-w4g32-asym-v1",
    "act-order": "gptqmodel-qwen3-w4g32-actorder",
    "8 bits": "llmcompressor-llama-w8a8",
    "experts": "gptqmodel-qwen3moe-w4g32",
    "asymmetric experts": "llmcompressor-qwen3moe-w4a16-asym",
    "experts of 8 bits": "gptqmodel-qwen3moe-w8g32-asym",
    "fp8 block": "llmcompressor-llama-fp8-block",
    "fp8 static": "llmcompressor-llama-fp8-static",
    "fp8 experts": "llmcompressor-qwen3moe-fp8-block",
    "fp8 experts per channel": "llmcompressor-qwen3moe-fp8-dynamic",
    "mxfp8": "llmcompressor-llama-mxfp8",
    "mxfp8 experts": "llmcompressor-qwen3moe-mxfp8",
    "mxfp4": "llmcompressor-llama-mxfp4",
    "mxfp4 experts": "llmcompressor-qwen3moe-mxfp4",
    "nvfp4": "llmcompressor-llama-nvfp4a16",
    "nvfp4 experts": "llmcompressor-qwen3moe-nvfp4a16",
    "nvfp4 experts in one tensor": "modelopt-llama4-nvfp4",
    "gpt-oss": "handpacked-gptoss-mxfp4",
}

TABLE = inject.Table()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case, converted once, in several shards."""
    folder = tmp_path_factory.mktemp("converted")
    for name, fixture in CASES.items():
        options = Options(max_shard_size=40_000, on_unsupported="dequantize")
        convert_checkpoint(open_source(str(FIXTURES / fixture)), folder / name, options, jobs=1)
    return {name: folder / name for name in CASES}


def test_every_layout_is_damaged(converted: dict[str, Path]) -> None:
    configs = [json.loads((folder / "config.json").read_text()) for folder in converted.values()]
    stored = {scheme["layout"] for config in configs for scheme in config["quantization_config"]["schemes"]}
    assert stored == set(layouts_by_name("xpu"))


def check(folder: Path, source: str | None, backends: tuple[str, ...] = ("reference",)) -> Verdict:
    opened = None if source is None else open_source(str(FIXTURES / source))
    return verify(folder, opened, select(backends))


def caught(verdict: Verdict) -> set[str]:
    return {finding.check for finding in verdict.failing}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_found_in_a_sound_repo(case: str, converted: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    inject.copy(converted[case], folder)
    (folder / "README.md").write_text("An edited card.\n")
    for source in (CASES[case], None):
        verdict = check(folder, source, ("reference", "onednn"))
        assert verdict.failures == []
        assert verdict.exact and verdict.basis and verdict.files > 3
    inject.reseal(folder)  # the harness itself adds no fault
    assert check(folder, None).failures == []


@pytest.mark.parametrize("fault", inject.FAULTS)
def test_fault_is_caught(fault: str, converted: dict[str, Path], tmp_path: Path) -> None:
    for case, source in CASES.items():
        repo = inject.copy(converted[case], tmp_path / case)
        if not inject.FAULTS[fault](repo):
            continue  # nothing of the kind in this checkpoint
        plain = caught(check(repo.folder, None))
        assert "integrity" in plain, case
        inject.reseal(repo.folder)
        with_source = caught(check(repo.folder, source))
        without = caught(check(repo.folder, None))
        assert with_source and without, case
        TABLE.add(fault, [plain & {"integrity"}, with_source, without])
    assert fault in TABLE.rows, "no checkpoint has what this fault damages"


@pytest.mark.parametrize("fault", inject.UNSEALABLE)
def test_a_changed_file_is_caught(fault: str, converted: dict[str, Path], tmp_path: Path) -> None:
    repo = inject.copy(converted["linear"], tmp_path / "repo")
    assert inject.UNSEALABLE[fault](repo)
    verdict = check(repo.folder, None)
    assert "integrity" in caught(verdict)
    file = fault.rpartition(" ")[2] if "." in fault else "tokenizer.json"
    assert any(file in finding.where for finding in verdict.failing)


@pytest.mark.parametrize("name", ["xpuquant.json", "config.json", "verify.json", "*.safetensors"])
def test_any_bit_of_any_file_counts(name: str, converted: dict[str, Path], tmp_path: Path) -> None:
    repo = inject.copy(converted["linear"], tmp_path / "repo")
    path = sorted(repo.folder.glob(name))[0]
    original = path.read_bytes()
    for position in range(0, len(original), max(1, len(original) // 40)):
        content = bytearray(original)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        assert not check(repo.folder, None).passed, f"byte {position}"


def test_the_wrong_source_is_noticed(converted: dict[str, Path]) -> None:
    verdict = check(converted["linear"], CASES["asymmetric"])
    assert "exactness" in caught(verdict)


def test_the_table_in_the_docs_is_what_happens(request: pytest.FixtureRequest) -> None:
    if set(TABLE.rows) != set(inject.FAULTS):
        pytest.skip("only when every fault has been injected in this process")
    rows = "\n".join(TABLE.markdown())
    assert rows in DOCS.read_text(), f"docs/verify.md should have:\n{rows}"
