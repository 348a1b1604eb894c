"""Model loaders of vLLM that reorder the rows of a weight, and know a weight by the names of other formats' tensors.

Llama 4's loader (`Llama4ForCausalLM.permute_qk_weight_for_rotary`) brings the rows of q and k from the order of Hugging
Face's rotary embedding into its own. It does so for `weight`, `weight_packed` and `weight_scale`, and takes the rows of
each for its first dimension: `qweight` and `scales` would stay as they are, and the model would say other tokens,
without an error. BLOOM's (`BloomModel._repack_qkv`) brings the rows of all heads' q, k and v into the order q of all,
k of all, v of all, and takes every tensor of the module for one whose first dimension they are, scales and permutations
included. Here those methods are followed: what they do to a matrix of row numbers is done to every tensor of a module,
along the dimension that its rows lie in. Loaders that nothing follows yet are refused.

Mamba 2's mixer is another: where several GPUs share one group of states, each has the group's rows beside those of its
own heads, for which the mixer gives its `in_proj.weight` a loader of its own. Tensors of other names would be cut in
even parts, and the model would say other tokens. That is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from inspect import getmro
from typing import Any

import torch
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from xpuquant.errors import UnsupportedError, one_line
from xpuquant.formats.scheme import Scheme
from xpuquant.served_families import REORDERING, reordered
from xpuquant.vllm.linear import XpuquantLinearMethod
from xpuquant.vllm.members import XpuquantMembersMethod

_BY_NAME = "permute_qk_weight_for_rotary"
"""Llama 4: a name and a tensor in, both out."""

_BY_STREAM = "_repack_qkv"
"""BLOOM: all names and tensors in, all out."""

_REORDERED = {_BY_NAME: ("q_proj", "k_proj"), _BY_STREAM: ("query_key_value",)}
"""Method → the linears whose rows it reorders."""

_STORED = ("qweight", "qzeros", "scales", "weight_scale")
_ROWLESS = ("g_idx", "global_scale", "input_scale")


def follow_or_refuse(model: torch.nn.Module, stored: dict[str, Scheme]) -> None:
    """Make a model's loader reorder stored tensors as it would a plain weight.

    Args:
        model: as vLLM built it, before its weights are loaded.
        stored: the repo's quantized modules.

    Raises:
        UnsupportedError: in one line, where that cannot be: a class of `REORDERING`, rows that share a scale, or a
            group of states that several GPUs share.
    """
    for module in model.modules():
        for kind in getmro(type(module)):
            for name in stored:
                if name.rpartition(".")[2] in REORDERING.get(kind.__name__, ()):
                    raise UnsupportedError(reordered(one_line(name), kind.__name__))
        _refuse_repeated_group(module)
        for method, follow in ((_BY_NAME, _following), (_BY_STREAM, _following_stream)):
            if hasattr(module, method):
                _refuse_shared_scales(type(module).__name__, _REORDERED[method], stored)
                setattr(module, method, follow(getattr(module, method)))


def _refuse_repeated_group(module: Any) -> None:
    """Raise UnsupportedError for a mixer of Mamba 2 on several GPUs whose quantized `in_proj` is one piece to vLLM:
    where the groups can be dealt out, it is merged of five."""
    in_proj: Any = getattr(module, "in_proj", None)
    is_ours = isinstance(getattr(in_proj, "quant_method", None), XpuquantLinearMethod | XpuquantMembersMethod)
    if not (is_ours and any(kind.__name__ == "MambaMixer2" for kind in getmro(type(module)))):
        return
    if in_proj.tp_size > 1 and not isinstance(in_proj, MergedColumnParallelLinear):
        raise UnsupportedError(
            f"{in_proj.prefix}: {in_proj.tp_size} GPUs share a group of this layer's states, whose rows vLLM repeats "
            "on each, which is not done for stored layouts yet; use --tensor-parallel-size 1"
        )


def _refuse_shared_scales(kind: str, reordered: tuple[str, ...], stored: dict[str, Scheme]) -> None:
    for name, scheme in stored.items():
        if name.rpartition(".")[2] in reordered and scheme.granularity == "block":
            raise UnsupportedError(
                f"{one_line(name)}: vLLM's {kind} reorders its rows, of which {scheme.block_n} share a scale; "
                "serve the source repo instead"
            )


def _following(theirs: Any) -> Any:
    """Llama 4's `theirs` for what it knows; for stored tensors the same, along the dimension that their rows lie in."""

    def reorder(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        module, _, suffix = name.rpartition(".")
        if module.rpartition(".")[2] not in _REORDERED[_BY_NAME] or suffix not in _STORED or tensor.ndim != 2:
            result: tuple[str, torch.Tensor] = theirs(
                name, tensor
            )  # `weight`, scales of rows, and what is not reordered
            return result
        return name, _in_order(suffix, tensor, lambda rows: theirs(f"{module}.weight", rows)[1])

    return reorder


def _following_stream(theirs: Any) -> Any:
    """BLOOM's `theirs` likewise. What has no rows stays as it is."""

    def reorder(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            module, _, suffix = name.rpartition(".")
            of_it = module.rpartition(".")[2] in _REORDERED[_BY_STREAM]
            if of_it and (suffix in _ROWLESS or tensor.numel() == 1):
                yield name, tensor
            elif of_it and suffix in _STORED and tensor.ndim == 2:
                yield name, _in_order(suffix, tensor, lambda rows: next(iter(theirs([(name, rows)])))[1])  # noqa: B023
            else:
                yield from theirs([(name, tensor)])

    return reorder


def _in_order(suffix: str, tensor: torch.Tensor, reorder: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A stored tensor with its rows as `reorder` has those of a weight `[N, K]`."""

    def order(N: int) -> torch.Tensor:
        return reorder(torch.arange(N).unsqueeze(1)).flatten()

    if suffix == "qzeros":
        return _packed(_unpacked(tensor)[:, order(tensor.shape[1] * 8)])
    if suffix == "qweight":
        return tensor[order(tensor.shape[0])]
    return tensor[:, order(tensor.shape[1])].contiguous()


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 `[G, N/8]` → nibbles, uint8 `[G, N]`."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def _packed(nibbles: torch.Tensor) -> torch.Tensor:
    """The other way."""
    octets = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return octets.contiguous().view(torch.int32)
