"""The method that loads and computes experts under vLLM, alone: what two ranks have adds up to the experts.

Of experts without a gate this is all that runs here: vLLM's CPU path refuses models that have them
(`is_act_and_mul=False`)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import EXPERTS, pack_matrices

from xpuquant import layers
from xpuquant.errors import UnsupportedError

E, H, I = 4, 256, 256
SCHEMES = EXPERTS
GATES = {True: "silu", False: "relu2_no_mul"}


def stacks(scheme: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for part, (matrices, N, K) in zip(scheme.stacks, ((1 + scheme.gated, I, H), (1, H, I)), strict=True):
        weights = [[torch.randn(N, K).bfloat16() / 8 for _ in range(matrices)] for _ in range(E)]
        packed = [pack_matrices(members, scheme)[0] for members in weights]
        for end in packed[0]:
            stack = torch.stack([one[end] for one in packed])
            tensors[part + end] = stack.reshape(E) if end == "_scale" and stack.shape == (E, 1) else stack
    return tensors


def rank_of(
    scheme: Any, tensors: dict[str, torch.Tensor], rank: int, tp: int, ep: int, top_k: int = 2, on_input: bool = False
) -> Any:
    """One rank's layer with its part of the stacks, and the method that computes it. `on_input`: weights of the router
    are for what experts take, not for what they give."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from xpuquant.vllm.experts import XpuquantExpertsMethod

    method = XpuquantExpertsMethod.__new__(XpuquantExpertsMethod)
    method.scheme, method.prefix, method.kernel = scheme, "experts", None
    parallel = SimpleNamespace(tp_rank=rank if tp > 1 else 0, tp_size=tp)
    method.moe = SimpleNamespace(moe_parallel_config=parallel, experts_per_token=top_k, ep_rank=rank, ep_size=ep)
    layer: Any = torch.nn.Module()
    layer.activation, layer.swiglu_limit = MoEActivation(GATES[scheme.gated]), None
    layer.apply_router_weight_on_input, layer.expert_map = on_input, None
    if ep > 1:
        layer.expert_map = torch.full((E,), -1, dtype=torch.int32)
        layer.expert_map[rank * E // ep : (rank + 1) * E // ep] = torch.arange(E // ep, dtype=torch.int32)
    method.create_weights(layer, E // ep, H, I // tp, torch.bfloat16)
    for name, tensor in tensors.items():
        method.load(layer, name, tensor)
    return partial(method.apply, layer)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_ranks_add_up_to_the_experts(name: str, gated: bool, tp: int, ep: int) -> None:
    scheme = replace(SCHEMES[name], gated=gated)
    tensors = stacks(scheme)
    x, weights, ids = torch.randn(6, H).bfloat16(), torch.rand(6, 2), torch.rand(6, E).topk(2).indices.int()
    total = sum(rank_of(scheme, tensors, rank, tp, ep)(x, weights, ids).float() for rank in range(tp * ep))
    activate = partial(layers.activated, scheme, GATES[gated])
    wanted = layers.experts(scheme, tensors, x, weights, ids.long(), activate).float()
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(total, wanted, atol=0.02 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_router_weights_on_the_input(name: str) -> None:
    """Llama 4, which has one expert for a token; of several no kernel computes it."""
    scheme = SCHEMES[name]
    tensors = stacks(scheme)
    x, weights, ids = torch.randn(6, H).bfloat16(), torch.rand(6, 1), torch.rand(6, E).topk(1).indices
    found = rank_of(scheme, tensors, 0, 1, 1, top_k=1, on_input=True)(x, weights, ids.int())
    activate = partial(layers.activated, scheme, GATES[True])
    wanted = layers.experts(scheme, tensors, x * weights.bfloat16(), torch.ones_like(weights), ids, activate).float()
    on_output = layers.experts(scheme, tensors, x, weights, ids, activate).float()
    near = 0.02 * wanted.abs().max().item()
    torch.testing.assert_close(found.float(), wanted, atol=near, rtol=0)
    assert (found.float() - on_output).abs().max() > 2 * near
    with pytest.raises(
        UnsupportedError, match="experts: router weights on the input of several experts have no kernel"
    ):
        rank_of(scheme, tensors, 0, 1, 1, top_k=2, on_input=True)
