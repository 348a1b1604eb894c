"""What the plan says of tensor parallelism before a download is what the plugin says at load: asked of both, over
layouts, sizes and numbers of GPUs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import EXPERTS, SCHEMES

from xpuquant.conversion.plan.tensor_parallel import split_problem
from xpuquant.errors import UnsupportedError
from xpuquant.formats.layouts.modules import ExpertStack, Linear
from xpuquant.formats.scheme import Scheme

RANKS = (2, 3, 4, 6, 8, 16)
SIZES = (48, 64, 96, 128, 192, 256, 512, 1536)
GROUPS = (16, 32, 64, 128, 256)


def of_sizes(scheme: Scheme, size: int) -> list[Scheme]:
    """The scheme with every size of group that it can have, those as long as the matrix among them."""
    if scheme.granularity != "group" or scheme.layout.startswith(("mx", "nvfp4")):
        return [replace(scheme, group_size=max(scheme.group_size, 0))]
    return [replace(scheme, group_size=group) for group in GROUPS if size % group == 0]


def planned(scheme: Scheme, name: str, weights: Any) -> str | None:
    module = object.__new__(ExpertStack if scheme.experts else Linear)
    for key, value in weights.items():
        object.__setattr__(module, key, value)
    conversion = SimpleNamespace(scheme=scheme, name=name)
    return split_problem(SimpleNamespace(source=module, conversion=conversion), ranks=weights["ranks"])  # type: ignore[arg-type]


def loads_experts(scheme: Scheme, I: int, ranks: int) -> bool:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from xpuquant.vllm.experts import XpuquantExpertsMethod

    method = XpuquantExpertsMethod.__new__(XpuquantExpertsMethod)
    method.scheme, method.prefix = scheme, "experts"
    method.moe = SimpleNamespace(experts_per_token=2, ep_size=1)
    layer: Any = torch.nn.Module()
    layer.activation, layer.swiglu_limit = MoEActivation("silu"), None
    layer.apply_router_weight_on_input = False
    try:
        method.create_weights(layer, 2, 128, I // ranks, torch.bfloat16)
    except UnsupportedError as error:
        assert "intermediate features on each rank" in str(error)
        return False
    return True


def loads_linear(scheme: Scheme, N: int, K: int, ranks: int, along_k: bool) -> bool:
    from xpuquant.vllm.linear import XpuquantLinearMethod

    method = XpuquantLinearMethod(scheme, "linear")
    part = (N, K // ranks) if along_k else (N // ranks, K)
    try:
        method.create_weights(
            torch.nn.Module(), part[1], [part[0]], K, N, torch.bfloat16, weight_loader=lambda *_: None
        )
    except UnsupportedError as error:
        assert "features on each rank" in str(error)
        return False
    return True


@pytest.mark.parametrize("name", EXPERTS)
def test_plan_and_plugin_say_the_same_of_experts(name: str) -> None:
    told = set()
    for gated in (True, False):
        for I in SIZES:
            for scheme in of_sizes(replace(EXPERTS[name], gated=gated), I):
                for ranks in (ranks for ranks in RANKS if I % ranks == 0):
                    matrix = lambda N, K: [SimpleNamespace(N=N, K=K)] * 2  # noqa: E731
                    weights = {"weights": {"up": matrix(I, 128), "down": matrix(128, I)}, "ranks": ranks}
                    said = planned(scheme, "model.layers.0.mlp.experts", weights)
                    assert (said is None) == loads_experts(scheme, I, ranks), (scheme.label(), I, ranks, said)
                    told.add(said is None)
    assert told == {True, False}


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_plan_and_plugin_say_the_same_of_linears(name: str, along_k: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("rank", "world_size"):  # vLLM's parameters ask for both; no group of processes is made here
        monkeypatch.setattr(f"vllm.model_executor.parameter.get_tensor_model_parallel_{asked}", lambda: 0)
    for size in SIZES:
        N, K = (256, size) if along_k else (size, 256)
        for scheme in of_sizes(SCHEMES[name], K):
            for ranks in (ranks for ranks in RANKS if size % ranks == 0):
                weights = {"weight": SimpleNamespace(N=N, K=K), "ranks": ranks}
                said = planned(scheme, f"model.layers.0.mlp.{'down' if along_k else 'up'}_proj", weights)
                assert (said is None) == loads_linear(scheme, N, K, ranks, along_k), (scheme.label(), N, K, ranks, said)
