"""Two ranks say what one says: tensor parallel, and expert parallel with tensor-parallel attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import EXPERTS, SCHEMES, Pair, write

TENSOR = [
    ("llama", "int4-asym", None),
    ("llama", "int4-channel", None),
    ("llama", "int4-act-order-asym", None),
    ("llama", "int8-asym", None),
    ("llama", "int8-act-order", None),
    ("llama", "fp8-tensor", None),
    ("llama", "mxfp8", None),
    ("qwen3_moe", "int4", "int4"),
    ("qwen3_moe", "int4-asym", "uint4"),
    ("mixtral", "int4", "int8-asym"),
    ("qwen3_moe", "nvfp4", "nvfp4"),
    ("mixtral", "fp8-channel", "mxfp8"),
    ("qwen3_moe", "fp8-channel", "fp8-channel"),
    ("mixtral", "int4", "fp8-group"),
    ("mixtral", "mxfp4", "fp8-block"),
    ("gpt_oss", "mxfp4", "mxfp4"),
]
EXPERT = [
    ("qwen3_moe", "int4", "int4"),
    ("qwen3_moe", "int4-asym", "uint4"),
    ("mixtral", "int4", "int8-asym"),
    ("qwen3_moe", "fp8-channel", "fp8-channel"),
    ("qwen3_moe", "nvfp4", "nvfp4"),
    ("gpt_oss", "mxfp4", "mxfp4"),
]
TOLERANCE = 2e-3


def name(case: tuple[str, ...]) -> str:
    return "-".join(part for part in case if part)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for family, scheme, experts in dict.fromkeys([*TENSOR, *EXPERT]):
        case = name((family, scheme, experts))
        (folder / case).mkdir()
        made[case] = write(folder / case, family, SCHEMES[scheme], EXPERTS[experts] if experts else None)
    return made


@pytest.fixture(scope="module")
def plain(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    return generate([pair.plain for pair in pairs.values()], dtype="float32")


@pytest.fixture(scope="module")
def tensor(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    return generate([pairs[name(case)].converted for case in TENSOR], dtype="float32", tp=2)


@pytest.fixture(scope="module")
def expert(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    return generate([pairs[name(case)].converted for case in EXPERT], dtype="float32", tp=2, ep=True)


def check(pair: Pair, plain: Any, said: Any) -> None:
    wanted, got = plain[str(pair.plain)], said[str(pair.converted)]
    assert "error" not in wanted, wanted["error"]
    assert "error" not in got, f"{got['error']}\n{got['log'][-3000:]}"
    assert got["tokens"] == wanted["tokens"]
    for ours, theirs in zip(got["logprobs"], wanted["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("case", TENSOR, ids=name)
def test_tensor_parallel(case: tuple[str, ...], pairs: dict[str, Pair], plain: Any, tensor: Any) -> None:
    check(pairs[name(case)], plain, tensor)


@pytest.mark.parametrize("case", EXPERT, ids=name)
def test_expert_parallel(case: tuple[str, ...], pairs: dict[str, Pair], plain: Any, expert: Any) -> None:
    check(pairs[name(case)], plain, expert)


def test_a_quantized_head(tmp_path: Path, generate: Callable[..., Any]) -> None:
    """496 rows are padded to 512: 256 on the first rank, 240 on the second."""
    head = {"lm_head": SCHEMES["int4-asym"]}
    pair = write(tmp_path, "llama", SCHEMES["int4"], others=head, vocab_size=496)
    plain = generate([pair.plain], dtype="float32")
    check(pair, plain, generate([pair.converted], dtype="float32", tp=2))


@pytest.mark.parametrize(("family", "ep"), [("deepseek_v2", False), ("deepseek_v3", True)])
def test_deepseek(family: str, ep: bool, tmp_path: Path, generate: Callable[..., Any]) -> None:
    """On two CPU ranks stock vLLM 0.32 answers a plain DeepSeek model in one of several ways, from start to start.

    So the dequantized model runs on two ranks too, and one of its answers must be the converted model's, exactly.
    """
    pair = write(tmp_path, family, SCHEMES["int4"], EXPERTS["int4"])
    wanted, got = [], []
    for _ in range(4):
        # Stock vLLM has no expert parallelism on the CPU: the plain model runs tensor parallel.
        said = {
            **generate([pair.plain], dtype="float32", tp=2),
            **generate([pair.converted], dtype="float32", tp=2, ep=ep),
        }
        for folder, answers in ((pair.plain, wanted), (pair.converted, got)):
            assert "error" not in said[str(folder)], said[str(folder)]["log"][-3000:]
            answers.append(said[str(folder)]["tokens"])
        if any(answer in wanted for answer in got):
            return
    raise AssertionError(f"converted: {got}\nplain: {wanted}")
