"""Loaders of vLLM that reorder rows of weights: followed, or refused."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import PACK, SCHEMES

from xpuquant import layers
from xpuquant.errors import UnsupportedError
from xpuquant.served_families import REORDERING
from xpuquant.vllm.reordered import follow_or_refuse

HEADS = {"q_proj": 4, "k_proj": 2}
PATH = "model.layers.0.self_attn"

REVIEWED = {
    "bagel.py": "a convolution of the vision tower",
    "bloom.py": "followed",
    "bert_with_rope.py": "halves of up_gate_proj, experts, adapters: other shapes than the parameters', an error",
    "dbrx.py": "experts of its own, whose parts are not taken",
    "gpt_oss.py": "experts, which do not come through the loader",
    "k2_horizon.py": "refused",
    "llama4.py": "followed; experts, which do not come through the loader",
    "longcat_flash_ngram.py": "embeddings",
    "mistral.py": "names of Mistral's own files, which are not converted",
    "mllama4.py": "q, k and v of the vision tower, joined where it is data parallel",
    "molmo.py": "embeddings",
    "molmo2.py": "embeddings",
    "telechat2.py": "refused",
}
"""Files of vLLM 0.32 with a loader that reorders or joins, and what of it concerns a stored layout."""


def llama4() -> Any:
    """vLLM's class with nothing in it but what its method reads."""
    from vllm.model_executor.models.llama4 import Llama4ForCausalLM

    model = Llama4ForCausalLM.__new__(Llama4ForCausalLM)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(num_attention_heads=HEADS["q_proj"], num_key_value_heads=HEADS["k_proj"])
    return model


@pytest.mark.parametrize("member", HEADS)
@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.granularity != "block"])
def test_llama_4_s_order_of_rows(name: str, member: str) -> None:
    scheme, N, K = SCHEMES[name], HEADS[member] * 64, 256
    if scheme.group_size < 0:
        scheme = replace(scheme, group_size=K)
    tensors, _ = PACK[scheme.layout](torch.randn(N, K, generator=torch.Generator().manual_seed(1)), scheme)
    module = f"{PATH}.{member}"
    model = llama4()
    _, wanted = model.permute_qk_weight_for_rotary(
        f"{module}.weight", layers.dequantize(scheme, tensors, torch.float32)
    )
    follow_or_refuse(model, {module: scheme})
    loaded = {s: model.permute_qk_weight_for_rotary(f"{module}.{s}", tensor)[1] for s, tensor in tensors.items()}
    assert all((t.shape, t.dtype) == (tensors[s].shape, tensors[s].dtype) for s, t in loaded.items())
    actual = layers.dequantize(scheme, loaded, torch.float32)
    assert torch.equal(actual, wanted)
    assert not torch.equal(actual, layers.dequantize(scheme, tensors, torch.float32))


def test_other_linears_and_unquantized_ones_are_left_to_vllm() -> None:
    model = llama4()
    theirs = model.permute_qk_weight_for_rotary
    follow_or_refuse(model, {})
    for name in (f"{PATH}.v_proj.qweight", f"{PATH}.q_proj.weight", f"{PATH}.k_proj.bias"):
        tensor = torch.randn(256, 32) if not name.endswith("bias") else torch.randn(256)
        assert torch.equal(model.permute_qk_weight_for_rotary(name, tensor)[1], theirs(name, tensor)[1])


def test_rows_that_share_a_scale_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=rf"{PATH}.q_proj: vLLM's Llama4ForCausalLM reorders.*128 share a scale"):
        follow_or_refuse(llama4(), {f"{PATH}.q_proj": SCHEMES["fp8-block"]})
    follow_or_refuse(llama4(), {f"{PATH}.o_proj": SCHEMES["fp8-block"]})


@pytest.mark.parametrize("kind", REORDERING)
def test_loaders_that_nothing_follows_are_refused(kind: str) -> None:
    """That each is a class of a supported release is checked without vLLM (`tests/serving/test_vllm_models.py`)."""
    model = type(kind, (torch.nn.Module,), {})()
    for member in REORDERING[kind]:
        with pytest.raises(UnsupportedError, match=f"{PATH}.{member}: vLLM's {kind} reorders.*serve the source repo"):
            follow_or_refuse(model, {f"{PATH}.{member}": SCHEMES["int4"]})
    follow_or_refuse(model, {f"{PATH}.o_proj": SCHEMES["int4"]})


def test_every_loader_that_reorders_has_been_read() -> None:
    """Calls that reorder, in functions that load; what is new in another vLLM must be looked at."""
    import vllm

    found = set()
    for path in sorted((Path(vllm.__file__).parent / "model_executor" / "models").glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            loads = isinstance(function, ast.FunctionDef) and any(word in function.name for word in _LOADS)
            if loads and any(_reorders(node) for node in ast.walk(function)):
                found.add(path.name)
    assert found == set(REVIEWED)


_LOADS = ("load", "weight", "permute_qk", "repack", "remap", "split_key_value", "split_qkv_weight")
_REORDERING = ("permute", "transpose", "t", "flip", "roll", "index_select", "cat", "stack")


def _reorders(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript):
        return "perm" in ast.unparse(node.slice)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _REORDERING):
        return False
    return any(word in ast.unparse(node) for word in ("weight", "tensor", "w.", "starts", "embedding"))
