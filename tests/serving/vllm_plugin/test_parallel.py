"""Two ranks say what one says: tensor parallel, and expert parallel with tensor-parallel attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import EXPERTS, SCHEMES, Pair, write

S, E = SCHEMES, EXPERTS
# Name → family, linear schemes, expert schemes, other schemes by the name of a linear, changes of the config.
# A layer each: see test_models.py.
CASES: dict[str, tuple[str, Any, Any, dict[str, Any], dict[str, Any]]] = {
    "linears": (
        "llama",
        [
            *(S["int4-asym"], S["int4-channel"], S["int4-act-order-asym"], S["int8-asym"], S["int8-act-order"]),
            *(S["int8"], S["fp8-tensor"], S["fp8-channel"], replace(S["fp8-block"], block_n=64)),
            *(S["mxfp4"], S["mxfp8"], S["nvfp4"], S["nvfp4-factor"]),
        ],
        None,
        {},
        {},
    ),
    "experts": (
        "qwen3_moe",
        [S["int4"], S["int4-asym"], S["int8"], S["fp8-tensor"], S["fp8-channel"], S["nvfp4"], S["nvfp4-factor"]],
        [E["int4"], E["uint4"], E["int8"], E["fp8-tensor"], E["fp8-channel"], E["nvfp4"], E["nvfp4-factor"]],
        {},
        {},
    ),
    "wide experts": (
        "mixtral",
        [S["int4"], S["fp8-channel"], S["int4"], S["mxfp4"]],
        [E["int8-asym"], E["mxfp8"], E["fp8-group"], E["fp8-block"]],
        {},
        {},
    ),
    "gpt_oss": ("gpt_oss", S["mxfp4"], E["mxfp4"], {}, {}),
    "members of other schemes": (
        "qwen2",
        [S["int4-asym"], S["int4"]],
        None,
        {"k_proj": S["mxfp8"], "up_proj": S["int4-act-order"], "q_proj": None},
        {},
    ),
    # 496 rows are padded to 512: 256 on the first rank, 240 on the second.
    "head": ("llama", S["int4"], None, {"lm_head": S["int4-asym"]}, {"vocab_size": 496}),
}
EXPERT = ("experts", "wide experts", "gpt_oss")
DEEPSEEK = {"deepseek_v2": False, "deepseek_v3": True}
"""Family → whether its experts are parallel."""
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, asked: set[str]) -> dict[str, Pair]:
    made = {}
    for name in asked:
        family, schemes, experts, others, changes = CASES[name]
        made[name] = write(tmp_path_factory.mktemp("model"), family, schemes, experts, others, **changes)
    return made


@pytest.fixture(scope="module")
def plain(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    return generate([pair.plain for pair in pairs.values()], dtype="float32")


@pytest.fixture(scope="module")
def tensor(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    return generate([pair.converted for pair in pairs.values()], dtype="float32", tp=2)


@pytest.fixture(scope="module")
def expert(pairs: dict[str, Pair], generate: Callable[..., Any]) -> Any:
    models = [pair.converted for name, pair in pairs.items() if name in EXPERT]
    return generate(models, dtype="float32", tp=2, expert_parallel=[str(model) for model in models])


def check(pair: Pair, plain: Any, said: Any) -> None:
    wanted, got = plain[str(pair.plain)], said[str(pair.converted)]
    assert "error" not in wanted, wanted["error"]
    assert "error" not in got, f"{got['error']}\n{got['log'][-3000:]}"
    assert got["tokens"] == wanted["tokens"]
    for ours, theirs in zip(got["logprobs"], wanted["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_tensor_parallel(name: str, pairs: dict[str, Pair], plain: Any, tensor: Any) -> None:
    check(pairs[name], plain, tensor)


@pytest.mark.parametrize("name", EXPERT)
def test_expert_parallel(name: str, pairs: dict[str, Pair], plain: Any, expert: Any) -> None:
    check(pairs[name], plain, expert)


def test_deepseek(tmp_path: Path, generate: Callable[..., Any]) -> None:
    """On two CPU ranks stock vLLM 0.32 answers a plain DeepSeek model in one of several ways, from start to start.

    So the dequantized model runs on two ranks too, and one of its answers must be the converted model's, exactly.
    """
    open_pairs, answers = {}, dict[Path, list[Any]]()
    for family in DEEPSEEK:
        (tmp_path / family).mkdir()
        open_pairs[family] = write(tmp_path / family, family, SCHEMES["int4"], EXPERTS["int4"])
    for _ in range(4):
        models = [model for pair in open_pairs.values() for model in (pair.plain, pair.converted)]
        # Stock vLLM has no expert parallelism on the CPU: the plain model runs tensor parallel.
        parallel = [str(pair.converted) for family, pair in open_pairs.items() if DEEPSEEK[family]]
        said = generate(models, dtype="float32", tp=2, expert_parallel=parallel)
        for model in models:
            assert "error" not in said[str(model)], said[str(model)]["log"][-3000:]
            answers.setdefault(model, []).append(said[str(model)]["tokens"])
        open_pairs = {
            family: pair
            for family, pair in open_pairs.items()
            if not any(answer in answers[pair.plain] for answer in answers[pair.converted])
        }
        if not open_pairs:
            return
    raise AssertionError({family: (answers[p.plain], answers[p.converted]) for family, p in open_pairs.items()})
