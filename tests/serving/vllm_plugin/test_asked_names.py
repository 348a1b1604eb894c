"""vLLM asks for a layer by a prefix, which in some models is neither the path of the module nor a name of the file."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.families.catalogue import FAMILIES
from support.families.models import write
from support.models import SCHEMES

import xpuquant
from xpuquant.formats.architecture import ALIASES
from xpuquant.vllm.config import XpuquantConfig


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pair", ALIASES)
def test_either_name_of_a_stack_finds_the_other(pair: tuple[str, str], turned: bool) -> None:
    stored, asked = pair[::-1] if turned else pair
    config = XpuquantConfig({f"model.layers.3{stored}experts": SCHEMES["int4"]})
    assert config.stack_of(f"model.layers.3{asked}experts") == f"model.layers.3{stored}experts"
    assert config.stack_of(f"model.layers.3{asked}shared_experts") is None
    assert config.stack_of("model.layers.3.self_attn.experts") is None


def test_a_name_that_is_there_is_not_replaced() -> None:
    names = [f"model.layers.0{name}experts" for pair in ALIASES for name in pair]
    config = XpuquantConfig(dict.fromkeys(names, SCHEMES["int4"]))
    assert [config.stack_of(name) for name in names] == names


@pytest.mark.parametrize("attribute", ["block_sparse_moe"])
def test_what_language_models_of_vllm_ask_for_is_an_alias(attribute: str) -> None:
    """Read out of vLLM's models: `self.block_sparse_moe = MiniMaxM2MoE(..., prefix=f"{prefix}.mlp")`."""
    import vllm

    asked = set()
    for path in (Path(vllm.__file__).parent / "model_executor" / "models").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"self.{attribute}"):
                continue
            asked |= set(re.findall(r"prefix=f'\{prefix\}\.(\w+)'", ast.unparse(node.value)))
    assert asked - {attribute}, "none differs any more"
    aliases = {name.strip(".") for pair in ALIASES if f".{attribute}." in pair for name in pair}
    assert asked <= aliases


BY_PATH = ("falcon_h1", "zamba2")
"""Models in which most linears are asked for by other names than their paths; Zamba 2's adapters have another in the
file, too, and some of its layers are shared."""


@pytest.fixture(scope="module")
def by_path(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in BY_PATH:
        folders[name] = tmp_path_factory.mktemp(name)
        write(folders[name], next(family for family in FAMILIES if family.name == name))
        xpuquant.convert(folders[name] / "source", folders[name] / "converted")
    return folders


def test_linears_go_by_their_path(by_path: dict[str, Path], generate: Callable[..., Any]) -> None:
    pairs = [(folder / "plain", folder / "converted") for folder in by_path.values()]
    said = generate([model for pair in pairs for model in pair], dtype="float32")
    for plain, converted in pairs:
        assert said[str(converted)]["tokens"] == said[str(plain)]["tokens"]
        for ours, theirs in zip(said[str(converted)]["logprobs"], said[str(plain)]["logprobs"], strict=True):
            assert ours == pytest.approx(theirs, abs=2e-3)


def test_a_group_of_states_that_gpus_share_is_refused(by_path: dict[str, Path], generate: Callable[..., Any]) -> None:
    """vLLM would cut the rows of `in_proj` in even parts: other tokens, and no error."""
    (report,) = generate([by_path["falcon_h1"] / "converted"], dtype="float32", tp=2).values()
    assert "mamba.in_proj: 2 GPUs share a group of this layer's states" in report["error"] + report["log"]


REFUSED = {
    "jamba": "model.layers.0.mamba.in_proj: vLLM's JambaForCausalLM builds this layer so that it cannot be quantized",
    "deepseek_v4": "model.layers.0.attn.wo_a: vLLM's DeepseekV4ForCausalLM reads this layer's weight itself",
}


def test_linears_that_no_method_computes_are_refused(tmp_path: Path, generate: Callable[..., Any]) -> None:
    for name in REFUSED:
        twins = write(tmp_path / name, next(one for one in FAMILIES if one.name == name))
        xpuquant.convert(twins.source, tmp_path / name / "converted")
    said = generate([tmp_path / name / "converted" for name in REFUSED], dtype="float32")
    for name, why in REFUSED.items():
        assert said[str(tmp_path / name / "converted")]["error"].startswith(f"UnsupportedError: {why}")
