"""What users write, in Python and on the command line: what is taken, what is refused, and how the refusal is spelt."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import FIXTURES

import xpuquant
from xpuquant.arguments import KINDS
from xpuquant.conversion.cli.app import built, explain, run
from xpuquant.conversion.cli.spelling import Spelling
from xpuquant.conversion.options import LAYOUT_FAMILIES, Options
from xpuquant.conversion.runs.request import EXCLUDES
from xpuquant.errors import Argument, UsageError, XpuquantError

SOURCE = FIXTURES / "gptqmodel-qwen3-w4g32-asym-v1"
REFUSED = FIXTURES / "llmcompressor-llama-fp8-block-ragged"
NOT_PORTABLE = FIXTURES / "llmcompressor-llama-w8a8"
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(xpuquant, name)
    for name in xpuquant.__all__
    if name.islower() and not name.startswith("_") and callable(getattr(xpuquant, name))
}
ARGUMENTS = [
    (name, argument) for name, function in FUNCTIONS.items() for argument in inspect.signature(function).parameters
]
REQUIRED = {
    "source": SOURCE,
    "out": "out",
    "part": "1/2",
    "a": SOURCE,
    "b": SOURCE,
    "repo_id": "me/x",
    "module": "model.layers.0.mlp.down_proj",
}


class Odd:
    """Of no type that any argument takes."""

    def __repr__(self) -> str:
        return "Odd()"


WRONG: dict[str, list[object]] = {
    argument: [Odd(), b"x", 3.5, [Odd()], {"a": 1}, float("nan"), (1, 2.5), "", " ", "a\0b", "\ud800", -1, "x\n"]
    for argument in KINDS
}
WRONG["jobs"] += ["2", 257, True, 10**30, (1,)]
WRONG["tensor_parallel"] += [2, [0], [True], ["2"], "2", [2, -2], None]
for _name in ("backends", "require_backends"):
    WRONG[_name] += ["reference", [""], [3], {"reference": 1}, ["no such library"]]
WRONG["context"] += [0, "8192", True]
WRONG["part"] += ["3/2", "0/1", (1, 2), "1", 1, None]
for _name in (
    "verify",
    "force",
    "stream",
    "private",
    "pr",
    "every",
    "values",
    "decode",
    "fold_act_order",
    "unverified",
):
    WRONG[_name] += ["no", 0, 1, "True"]
WRONG["options"] += [{"layout": "xpu"}, "xpu", Options]
WRONG["scale_dtype"] += [3, "int3", np.float16, "U8"]
WRONG["max_shard_size"] += [
    0,
    True,
    "5 bananas",
    "5",
    "5000000000",
    "-5GB",
    2**63,
    "9" * 5000,
    "1e9e9",
    1e300,
    float("inf"),
]
WRONG["layout"] += ["marlin", 3, ["xpu"]]
WRONG["on_unsupported"] += ["pray", True]
WRONG["push_to"] += ["a/b/c", "not a repo", "noslash", "../x", 3]
WRONG["repo_id"] += ["a/b/c", "not a repo", "noslash", 3, None]
WRONG["endpoint"] += ["huggingface.co", 3]
WRONG["progress"] += ["yes", 3]
WRONG["source"] += [3, None, Path("/no/where")]
WRONG["token"] += [True, 3]
WRONG["base_model"] += ["noslash", "a/b/c", "a/b ", "../x", "a/b](https://evil)", "a/b\n- x", ["a/b"]]
WRONG["license"] += ["apache 2.0", "a: b", "[mit]", "x" * 200, ["mit"], True]
WRONG["language"] += ["en, zh", "en,", ",", "en;zh", "*x", ["en"], "en,zh\nlicense: mit"]
for _name in ("out", "a", "b", "report"):  # a path is whatever the system takes
    WRONG[_name] = [value for value in WRONG[_name] if value not in (" ", "x\n")]
for _name in ("revision", "branch", "ray", "token"):
    WRONG[_name] += [3, True, ["x"]]


def test_every_argument_of_every_function_is_known() -> None:
    assert len(FUNCTIONS) == 10
    assert {argument for _, argument in ARGUMENTS} == KINDS.keys()


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_wrong_value_is_one_line_that_names_the_argument(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function = FUNCTIONS[name]
    needed = {key: value for key, value in REQUIRED.items() if key in inspect.signature(function).parameters}
    if argument in ("private", "branch", "pr", "unverified") and "push_to" in inspect.signature(function).parameters:
        needed["push_to"] = "me/x"
    for value in WRONG[argument]:
        with pytest.raises(UsageError) as caught:
            function(**{**needed, argument: value})
        said = str(caught.value)
        assert said.isprintable() and len(said) < 500 and "--" not in said, said
        named = argument in said or (argument in ("source", "a", "b") and str(value) in said) or "repo id" in said
        assert named or said.startswith(repr(value)) or "no such folder" in said, f"{value!r}: {said}"
        assert list(tmp_path.iterdir()) == [], f"{value!r} left something behind"


def options_of(name: str, value: Any) -> Options:
    return Options(**{name: value})


def test_an_argument_that_is_none_is_what_python_says_it_is() -> None:
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'scale'"):
        xpuquant.plan(SOURCE, scale="float16")  # type: ignore[call-arg]


def test_what_keyword_arguments_take_the_dataclass_takes() -> None:
    same: dict[str, list[tuple[Any, Any]]] = {
        "layout": [(None, "xpu"), ("XPU", "xpu"), ("compressed_tensors", "compressed-tensors")],
        "scale_dtype": [
            *[(keep, None) for keep in (None, "keep", "auto", "Keep")],
            *[(name, "F16") for name in ("float16", "fp16", "F16", "f16", "half", "FLOAT16")],
            *[(name, "BF16") for name in ("bfloat16", "bf16", "BF16")],
            *[(name, "F32") for name in ("float32", "fp32", "F32", "float")],
        ],
        "on_unsupported": [(None, "refuse"), ("Dequantize", "dequantize")],
        "max_shard_size": [
            *[(five, 5 * 10**9) for five in (None, "5GB", "5 gb", "5000MB", 5 * 10**9, 5e9, np.int64(5 * 10**9))],
            ("512MiB", 2**29),
        ],
        "fold_act_order": [(None, False), (True, True)],
    }
    assert same.keys() == set(inspect.signature(Options).parameters)
    for name, pairs in same.items():
        for written, kept in pairs:
            options = options_of(name, written)
            assert getattr(options, name) == kept and type(getattr(options, name)) is type(kept), written
            assert options == options_of(name, kept) == Options.from_dict(json.loads(json.dumps(options.as_dict())))
            if written is not None:
                assert xpuquant.plan(SOURCE, **{name: written}).options == options
            (argument,) = options.asked() or [options.argument(name)]
            assert options_of(name, argument.value) == options, "what a message shows can be written again"


@pytest.mark.parametrize("name", inspect.signature(Options).parameters)
def test_the_dataclass_refuses_what_keyword_arguments_refuse(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(UsageError, match=f"^{name}="):
            options_of(name, value)


def parameters(command: str) -> dict[str, Any]:

    group: Any = built()
    return {parameter.name: parameter for parameter in group.commands[command].params}


def test_a_parameter_of_a_command_is_called_like_the_argument_of_its_function() -> None:
    """Or one is only for programs, the other only for the terminal."""
    only_python = {"options", "progress", "token", "endpoint"}
    only_terminal = {"as_json", "dry_run", "quiet", "verbose", "out_option", "sources_file"}
    for name, function in FUNCTIONS.items():
        if name in ("plan", "convert_part"):
            continue
        ours = set(inspect.signature(function).parameters) - only_python
        theirs = {key for key, parameter in parameters(name).items() if not getattr(parameter, "hidden", False)}
        part = {"part"} if name == "convert" else set()
        assert ours | part == theirs - only_terminal, name
    for name in ("plan", "convert_part"):
        assert set(inspect.signature(FUNCTIONS[name]).parameters) - only_python <= parameters("convert").keys()


def test_an_error_is_spelt_for_whoever_reads_it() -> None:
    error = UsageError("x; pass ", Argument("force", True), ", not ", Argument("max_shard_size", "5 GB"))
    assert str(error) == "x; pass force=True, not max_shard_size='5 GB'"
    assert explain(error, ["convert"]) == ("x; pass --force, not --max-shard-size '5 GB'", 2)
    spell = Spelling(built(), ["verify", "out"])
    assert [spell(Argument(name, value)) for name, value in (("source", ...), ("every", True), ("verify", False))] == [
        "--source",
        "--all",
        "--no-verify",
    ]
    assert Spelling(built(), ["convert"])(Argument("source")) == "SRC"
    assert spell(Argument("token")) == "token"


def errors(folder: Path) -> list[XpuquantError]:
    """Every error whose message names an argument and that takes a call to meet."""
    out = folder / "out"
    xpuquant.convert(SOURCE, out, verify=False)
    calls: list[Callable[[], object]] = [
        lambda: xpuquant.convert(SOURCE, out, layout="compressed-tensors"),
        lambda: xpuquant.convert(REFUSED, folder / "a"),
        lambda: xpuquant.convert(NOT_PORTABLE, folder / "a", layout="compressed-tensors"),
        lambda: xpuquant.convert(SOURCE, folder / "a", revision="main"),
        lambda: xpuquant.convert(SOURCE, folder / "a", stream=True),
        lambda: xpuquant.convert(SOURCE, folder / "a", stream=True, ray="local"),
        lambda: xpuquant.convert(SOURCE, folder / "a", branch="x"),
        lambda: xpuquant.convert(SOURCE, folder / "a", private=False),
        lambda: xpuquant.convert(SOURCE, folder / "a", push_to="a/b", branch="x", pr=True),
        lambda: xpuquant.convert(SOURCE, folder / "a", push_to=str(SOURCE)),
        lambda: xpuquant.convert_part(SOURCE, folder / "a", "3/2"),
        lambda: xpuquant.finish(SOURCE, folder / "a"),
        lambda: xpuquant.finish(SOURCE, out, pr=True),
        lambda: xpuquant.verify(out, revision="main"),
        lambda: xpuquant.verify(out, backends=["x"]),
        lambda: xpuquant.verify(out, report=out),
        lambda: xpuquant.push(out, "me/x", branch="x", pr=True),
        lambda: xpuquant.push(SOURCE, "me/x"),
    ]
    found = []
    for call in calls:
        with pytest.raises(XpuquantError) as caught:
            call()
        found.append(caught.value)
    return found


def test_no_error_of_a_function_speaks_the_command_line(tmp_path: Path) -> None:
    for error in errors(tmp_path):
        said = str(error).replace(str(SOURCE), "SOURCE")
        assert "--" not in said and "`xpuquant " not in said, said
        terminal = error.spelt(Spelling(built(), ["convert"]))
        assert not re.search(r"\w=(True|False|')", terminal), terminal


def test_no_message_is_written_for_the_command_line_alone() -> None:
    """Below the command line no error is made of a text with an option in it."""
    root = Path(__file__).parents[2]
    raised = re.compile(r"(?:Error|Fault|Refusal)\(\s*((?:f?\"[^\"\n]*\"\s*|f?'[^'\n]*'\s*)+)")
    found = []
    for folder in ("convert", "formats", "kernels", "xpuquant"):
        for path in (root / folder).rglob("*.py"):
            if path.parts[-2:-1] == ("cli",) or "vllm" in path.parts:
                continue  # vLLM's own options are spelt in one way
            found += [
                (path.name, text) for text in raised.findall(path.read_text()) if re.search(r"[\s\"'(`]--\w", text)
            ]
    assert found == []


# Options that exclude or need each other

GIVEN = {
    "part": ["--part", "1/2"],
    "stream": ["--stream"],
    "ray": ["--ray", "local"],
    "force": ["--force"],
    "verify": ["--no-verify"],
    "push_to": ["--push-to", "me/x"],
    "private": ["--public"],
    "branch": ["--branch", "x"],
    "pr": ["--pr"],
    "unverified": ["--unverified"],
    "dry_run": ["--dry-run"],
    "as_json": ["--json"],
    "quiet": ["--quiet"],
    "verbose": ["--verbose"],
    "jobs": ["--jobs", "1"],
    "revision": ["--revision", "main"],
    "layout": ["--layout", LAYOUT_FAMILIES[1]],
    "scale_dtype": ["--scale-dtype", "bf16"],
    "on_unsupported": ["--on-unsupported", "dequantize"],
    "max_shard_size": ["--max-shard-size", "1GB"],
    "fold_act_order": ["--fold-act-order"],
    "base_model": ["--base-model", "me/x"],
    "license": ["--license", "mit"],
    "language": ["--language", "en,zh"],
}
NEEDS = {("private", "push_to"), ("branch", "push_to"), ("pr", "push_to"), ("unverified", "push_to")}
PUBLISHING = {"push_to", "private", "branch", "pr", "unverified"}


def test_the_matrix_names_every_option_of_convert() -> None:
    assert GIVEN.keys() == parameters("convert").keys() - {"source", "out", "out_option", "sources_file"}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(GIVEN, 2)))
def test_two_options_work_together_or_say_that_they_do_not(
    one: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run refuses what the conversion refuses; a folder has no revision and is not streamed."""
    words = ["convert", str(SOURCE), str(tmp_path / "out"), *GIVEN[one], *GIVEN[other]]
    code = run([*words, "--dry-run"])
    error = capsys.readouterr().err
    excluded = {(one, other), (other, one)} & {*EXCLUDES, ("branch", "pr"), ("quiet", "verbose")}
    needing = [pair for pair in NEEDS if pair[0] in (one, other) and pair[1] not in (one, other)]
    of_the_hub = {"stream", "revision"} & {one, other}
    spelt = {name: words[0] for name, words in GIVEN.items()}
    if {one, other} == {"verify", "push_to"}:
        assert code == 2 and "nothing has checked: add --unverified" in error
    elif excluded and not needing:
        assert code == 2 and spelt[one] in error and spelt[other] in error
    elif needing or excluded:
        assert code == 2 and (any(spelt[pair[0]] in error for pair in needing) or "exclude" in error)
    elif of_the_hub:
        assert code == 2 and "is for repositories on the Hub" in error
    else:
        assert code == 0, error
    assert error.count("\n") == (code != 0) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "OUT", "--revision", "main"], "--revision is one of the source's: give --source too"),
        (["push", "OUT", "me/x", "--branch", "x", "--pr"], "--branch and --pr exclude each other"),
        (["finish", "SRC", "OUT", "--pr"], "--pr is about publishing: give --push-to too"),
        (["finish", "SRC", "OUT", "--public"], "--public is about publishing: give --push-to too"),
        (["finish", "SRC", "OUT", "--push-to", ""], "not a repo id"),
        (["convert", "SRC", "OUT", "--push-to", ""], "not a repo id"),
        (["convert", "SRC", "OUT", "--part", ""], "--part '': want i/n"),
        (["convert", "SRC", "OUT", "--ray", ""], "--ray '': want"),
        (["convert", "SRC", "OUT", "-o", "OUT"], "OUT is given twice"),
        (["convert", "SRC", "OUT", "--max-shard-size", "5"], "--max-shard-size 5: want a size with its unit"),
        (["push", "OUT", "noslash"], "names no owner; want owner/name, for example you/noslash"),
        (["inspect", "SRC", "--tp", "2,x"], "--tp x: want numbers of GPUs, like 2 or 2,4"),
        (["inspect", "SRC", "--layot", "xpu"], "No such option: --layot"),
        (["convert", "SRC", "OUT", "--layot", "xpu"], "Did you mean --layout?"),
        (["convrt", "SRC"], "Did you mean 'convert'?"),
        (["-q", "inspect", "SRC"], "-q before a command; it follows one, as in xpuquant convert -q"),
        (["--tp", "2", "inspect", "SRC"], "--tp before a command; it follows one, as in xpuquant inspect --tp"),
        (["inspect", "SRC", "-q", "-v"], "--quiet and --verbose exclude each other"),
    ],
)
def test_other_commands_say_so_too(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty text is a variable that was not set: it does not mean that nothing was asked for."""
    places = {"SRC": str(SOURCE), "OUT": str(tmp_path / "out")}
    assert run([places.get(word, word) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
