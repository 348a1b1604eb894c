"""vLLM asks for a layer by a prefix, which in some models is neither the path of the module nor a name of the file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.models import SCHEMES

from xpuquant.formats.architecture import ALIASES
from xpuquant.vllm.config import XpuquantConfig


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pair", ALIASES)
def test_either_name_finds_the_other(pair: tuple[str, str], turned: bool) -> None:
    stored, asked = pair[::-1] if turned else pair
    config = XpuquantConfig({f"model.layers.3{stored}in_proj": SCHEMES["int4"]})
    assert config.name_of(f"model.layers.3{asked}in_proj") == f"model.layers.3{stored}in_proj"
    assert config.name_of(f"model.layers.3{asked}out_proj") is None
    assert config.name_of("model.layers.3.self_attn.in_proj") is None


def test_a_name_that_is_there_is_not_replaced() -> None:
    names = [f"model.layers.0{name}experts" for pair in ALIASES for name in pair]
    config = XpuquantConfig(dict.fromkeys(names, SCHEMES["int4"]))
    assert [config.name_of(name) for name in names] == names


@pytest.mark.parametrize("attribute", ["mamba", "block_sparse_moe"])
def test_what_language_models_of_vllm_ask_for_is_an_alias(attribute: str) -> None:
    """Read out of vLLM's models: `self.mamba = MambaMixer2(..., prefix=f"{prefix}.mixer")`."""
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
