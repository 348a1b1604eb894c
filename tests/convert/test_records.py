"""xpuquant.json sealed again by who can write it: `verify --source` passes no record that lacks something, or says
something else than the conversion of that source would; and `push` asks for none that shows no verification."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import support.injected_faults as inject
from support.checkpoints import FIXTURES
from support.fuzz.case import command
from support.fuzz.tally import count

import xpuquant
from xpuquant.conversion.hub.publish import never_verified
from xpuquant.conversion.tree import Tree
from xpuquant.errors import DamagedError

KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "exact": ("gptqmodel-qwen3moe-w4g32", ("--max-shard-size", "60kB")),
    "rounded": ("gptqmodel-qwen3-w4g32", ("--scale-dtype", "bfloat16")),
    "dequantized": ("llmcompressor-llama-fp8-block-ragged", ("--on-unsupported", "dequantize")),
    "portable": ("autoround-qwen3-w4g32-asym", ("--layout", "compressed-tensors")),
}
EVERY = int(os.environ.get("XPUQUANT_TRUST_ROUNDS", "3")) > 3
"""Every field of every module; otherwise those of one module of a kind."""

Path_ = tuple[str | int, ...]
EMPTY: dict[type, Any] = {dict: {}, list: [], str: "", int: 0, float: 0.0, bool: False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    for name, (fixture, options) in KINDS.items():
        code, _, error = command("convert", str(FIXTURES / fixture), str(folder / name), "--jobs", "1", *options)
        assert code == 0, error
    return {name: folder / name for name in KINDS}


def seal(path: Path, value: dict[str, Any]) -> None:
    """As anybody can: the sha256 of the file with zeros in the place of it. Without the field, without a seal."""
    if "sha256" in value:
        value["sha256"] = "0" * 64
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))


def places(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Every field and every member of every list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*at, key)
            yield from places(inner, (*at, key))


def kinds_of(found: Iterator[Path_]) -> Iterator[Path_]:
    """One of each kind: names of modules, tensors and files are one kind, so are the members of a list."""
    seen = set()
    for at in found:
        kind = tuple("*" if isinstance(key, int) or "." in key else key for key in at)
        if EVERY or (kind[:2] != ("source", "quantization_config") and kind not in seen):
            seen.add(kind)
            yield at


def spoil(record: dict[str, Any], at: Path_, how: str) -> bool:
    """Drop a field, empty it, or put something else there; False where that changes nothing."""
    table: Any = record
    for key in at[:-1]:
        table = table[key]
    before = table[at[-1]]
    if how == "dropped":
        del table[at[-1]]
    elif how == "emptied":
        table[at[-1]] = EMPTY.get(type(before))
    else:
        table[at[-1]] = "other" if isinstance(before, str) else 7 if type(before) is int else ["other"]
    return how == "dropped" or table[at[-1]] != before


def may_differ(at: Path_, how: str) -> bool:
    """What the source cannot tell: under which name it was given, and by which commit of a Hub."""
    return how == "other" and at in (("source", "name"), ("source", "revision"))


@pytest.mark.parametrize("how", ["dropped", "emptied", "other"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_record_passes_that_is_not_the_source_s(kind: str, how: str, made: dict[str, Path]) -> None:
    repo, source = made[kind], FIXTURES / KINDS[kind][0]
    path = repo / "xpuquant.json"
    kept = path.read_bytes()
    record = json.loads(kept)
    tried = 0
    try:
        for at in kinds_of(places(record)):
            spoiled = copy.deepcopy(record)
            if not spoil(spoiled, at, how) or may_differ(at, how):
                continue
            seal(path, spoiled)
            verdict = xpuquant.verify(repo, source=source, backends=["reference"], jobs=1)
            if at == ("sha256",) and how != "dropped":
                assert verdict.passed, "sealed again, it is the record that it was"
                continue
            assert not verdict.passed, f"{at} {how}, and it passes"
            named = [line for line in verdict.failures if any(key in line for key in at if type(key) is str)]
            # Other options are those of another plan, and what they give differs in many places.
            assert named or at == ("sha256",) or at[0] == "options", (at, verdict.failures)
            tried += 1
    finally:
        path.write_bytes(kept)
    assert tried >= 20
    count("records: fields dropped, emptied or changed and sealed again, all found with the source", tried)
    assert xpuquant.verify(repo, source=source, backends=["reference"], jobs=1).passed


def test_an_empty_source_is_said_by_name(made: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(made["exact"], tmp_path / "out"))
    record = json.loads((out / "xpuquant.json").read_text())
    record["source"] = {}
    seal(out / "xpuquant.json", record)
    for more in (["--source", str(FIXTURES / KINDS["exact"][0])], []):
        code, said, error = command("verify", str(out), "--backend", "reference", *more)
        assert code in (1, 3) and "lacks the field 'source.name', which every conversion writes" in said + error


def test_without_any_digest_it_is_a_conversion_that_was_not_verified(made: dict[str, Path], tmp_path: Path) -> None:
    """All of them dropped: that is what `--no-verify` records. The report beside it tells otherwise, and fails."""
    out = Path(shutil.copytree(made["rounded"], tmp_path / "out"))
    record = json.loads((out / "xpuquant.json").read_text())
    record["tensors_sha256"] = {}
    for entry in record["modules"].values():
        for key in ("roles", "rows_xxh3", "rounding"):
            del entry[key]
    seal(out / "xpuquant.json", record)
    assert never_verified(out)
    source = FIXTURES / KINDS["rounded"][0]
    verdict = xpuquant.verify(out, source=source, backends=["reference"], jobs=1)
    assert not verdict.passed and any("verify.json" in line and "has no digest" in line for line in verdict.failures)
    for path in out.glob("verify.*"):
        path.unlink()
    verdict = xpuquant.verify(out, source=source, backends=["reference"], jobs=1)
    assert verdict.passed and any("without the source nothing can be verified" in one.what for one in verdict.warnings)
    assert str(xpuquant.verify(out, backends=["reference"], jobs=1).outcome) == "not verified"


def exactly(report: dict[str, Any]) -> None:
    report["sentence"] = report["sentence"].replace("with scales rounded", "exactly, with scales rounded")


LIES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "sentence": ("sentence", exactly),
    "count": ("matrices", lambda r: r["exact"].update(matrices=1000)),
    "claims": ("matrices_by_claim", lambda r: r["exact"].update(matrices_by_claim={"exact": 7})),
    "verdict": ("verdict", lambda r: r.pop("verdict")),
    "failed": ("passed", lambda r: r.update(passed=False)),
    "no comparison": ("exact", lambda r: r.pop("exact")),
    "producer": ("its producer is 'xpuquant 0.0.9'", lambda r: r.update(producer="xpuquant 0.0.9")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_report_that_says_something_else_fails(lie: str, made: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(made["rounded"], tmp_path / "out"))
    report = json.loads((out / "verify.json").read_text())
    named, tell = LIES[lie]
    tell(report)
    seal(out / "verify.json", report)
    verdict = xpuquant.verify(out, source=FIXTURES / KINDS["rounded"][0], backends=["reference"], jobs=1)
    assert not verdict.passed and any("verify.json" in line and named in line for line in verdict.failures)


def without(record: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: EMPTY[type(value)] if key in keys else value for key, value in record.items()}


@pytest.mark.parametrize("keys", [("modules", "unquantized"), ("modules", "unquantized", "tensors_sha256")])
def test_a_record_of_nothing_is_not_taken_for_a_verified_one(
    keys: Sequence[str], made: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(made["exact"], tmp_path / "out"))
    record = json.loads((out / "xpuquant.json").read_text())
    seal(out / "xpuquant.json", without(record, keys))
    assert never_verified(out)
    seal(out / "xpuquant.json", {"sha256": ""})
    with pytest.raises(DamagedError, match=r"xpuquant\.json: has format_version None"):
        never_verified(out)


def test_weights_that_the_record_does_not_list_are_not_pushed(made: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(made["exact"], tmp_path / "out"))
    record = json.loads((out / "xpuquant.json").read_text())
    name = sorted(record["shards"])[0]
    del record["shards"][name]
    seal(out / "xpuquant.json", record)
    code, _, error = command("push", str(out), "me/x", "--unverified")
    assert code == 3 and f"{name} was not written by the conversion" in error and error.count("\n") == 1


NOT_PUSHED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed tokenizer": (lambda out: (out / "tokenizer.json").write_text("{}"), "is not what the conversion wrote"),
    "a changed config": (lambda out: (out / "config.json").write_text("{}"), "is not what the conversion wrote"),
    "code": (lambda out: (out / "modeling_x.py").write_text(""), "it is code that may be run"),
    "code below": (lambda out: Tree(out).write("sub/x.so", b""), "it is code that may"),
    "a pickle": (lambda out: (out / "x.pkl").write_bytes(b""), "a loader may unpickle it"),
    "a template": (lambda out: (out / "extra.jinja").write_text(""), "a loader may read it"),
    "no tokenizer": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no weights": (lambda out: next(out.glob("model*.safetensors")).unlink(), "is missing, and the conversion wrote"),
    "an edited record": (
        lambda out: (out / "xpuquant.json").write_text((out / "xpuquant.json").read_text().replace(": ", ":  ", 5)),
        "is not as it was written: its own sha256 differs",
    ),
}


@pytest.mark.parametrize("case", NOT_PUSHED)
def test_what_is_not_as_recorded_is_not_pushed(case: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Whatever was changed, added or taken away since the conversion; a note of people may lie there."""
    out = Path(shutil.copytree(made["exact"], tmp_path / "out"))
    (out / "notes.txt").write_text("mine")
    spoil, said = NOT_PUSHED[case]
    spoil(out)
    code, _, error = command("push", str(out), "me/x")
    assert code == 3 and said in error and error.count("\n") == 1
    assert command("verify", str(out), "--backend", "reference")[0] == 1


def rounding(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "scales": 1, "changed": 2, "largest": 0.0}


def test_a_report_of_another_version_is_said_to_be_not_compared(made: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(made["exact"], tmp_path / "out"))
    for name in ("xpuquant.json", "verify.json", "config.json"):
        text = (out / name).read_text().replace(f'"xpuquant {xpuquant.__version__}"', '"xpuquant 0.0.9"')
        (out / name).write_text(text)
    for name in ("xpuquant.json", "verify.json"):
        seal(out / name, json.loads((out / name).read_text()))
    inject.reseal(out)
    verdict = xpuquant.verify(out, source=FIXTURES / KINDS["exact"][0], backends=["reference"], jobs=1)
    assert any("is of xpuquant 0.0.9: what it says of the weights is not compared" in w.what for w in verdict.warnings)


@pytest.mark.parametrize(
    ("named", "edit"),
    [
        ("source.bytes", lambda r: r["source"].update(bytes=10**400)),
        ("source.bytes_by_dtype.F16", lambda r: r["source"]["bytes_by_dtype"].update(F16=-1)),
        ("producer", lambda r: r.update(producer="xpuquant 0.1.0\n# <b>")),
        ("rounding.dtype", lambda r: [one.update(rounding=rounding("F16")) for one in r["modules"].values()]),
        ("rounding.dtype", lambda r: [one.update(rounding=rounding("U8")) for one in r["modules"].values()]),
        (
            "rounding.changed",
            lambda r: (
                r["options"].update(scale_dtype="BF16"),
                [one.update(rounding=rounding("BF16")) for one in r["modules"].values()],
            ),
        ),
        ("stands for too many", lambda r: r.update(unquantized=["{0-9999}.{0-9999}"])),
    ],
)
def test_numbers_and_names_that_no_conversion_writes(
    named: str, edit: Callable[[dict[str, Any]], object], made: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(made["exact"], tmp_path / "out"))
    record = json.loads((out / "xpuquant.json").read_text())
    edit(record)
    seal(out / "xpuquant.json", record)
    for words in (["verify", str(out), "--backend", "reference"], ["push", str(out), "me/x"], ["inspect", str(out)]):
        code, said, error = command(*words)
        if words[0] == "inspect" and named.startswith("stands"):
            assert code == 0
            continue
        assert code in (1, 3) and named in said + error and "config.json: '" not in error and error.count("\n") == 1


EARLIER = {
    ("gptqmodel-qwen3-w4g32", "xpu"): (
        "model.layers.0.self_attn.q_proj",
        "4eb0ec42a809e608ae8da873478647d0de0ca45c0e219f7cc62c9de2f1cc26ea",
    ),
    ("handpacked-gptoss-mxfp4", "xpu"): (
        "model.layers.0.mlp.experts",
        "52644d789eb987504de61c6adb0aa7910f3cc0b81a3f8860ca52381db59217e6",
    ),
    ("gptqmodel-qwen3-w4g32", "compressed-tensors"): (
        "model.layers.0.self_attn.q_proj",
        "ea288bea6c1003be6e50ca6e55a5f388a5c2ab276dedc35089456a582b7cfadb",
    ),
}
"""(fixture, layout) → a module, and its digest as the version that first wrote `rows_xxh3` recorded it."""


@pytest.mark.parametrize(("fixture", "layout"), EARLIER)
def test_digests_of_earlier_repos_stay_what_they_are(fixture: str, layout: str, tmp_path: Path) -> None:
    """A scheme that gets a field must not make of every repo one that decodes to something else than was converted."""
    module, digest = EARLIER[fixture, layout]
    xpuquant.convert(FIXTURES / fixture, tmp_path / "out", layout=layout, jobs=1)
    record = json.loads((tmp_path / "out" / "xpuquant.json").read_text())
    assert record["modules"][module]["rows_xxh3"] == digest


@pytest.mark.parametrize("name", [".gitattributes", ".env", "pytorch_model.bin"])
def test_a_file_that_no_conversion_takes_and_the_source_has_since(
    name: str, made: dict[str, Path], tmp_path: Path
) -> None:
    """A folder and the same model on the Hub differ in `.gitattributes`, which nothing loads: a warning."""
    source = Path(shutil.copytree(FIXTURES / KINDS["exact"][0], tmp_path / "source"))
    (source / name).write_text("{}")
    verdict = xpuquant.verify(made["exact"], source=source, backends=["reference"])
    assert verdict.passed == name.startswith(".")
    assert any(f"left_files.{name}" in one.line() for one in (*verdict.warnings, *verdict.failing))
