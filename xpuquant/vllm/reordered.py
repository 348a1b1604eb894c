"""Model loaders of vLLM that reorder the rows of a weight, and know a weight by the names of other formats' tensors.

Llama 4's loader (`Llama4ForCausalLM.permute_qk_weight_for_rotary`) brings the rows of q and k from the order of Hugging
Face's rotary embedding into its own. It does so for `weight`, `weight_packed` and `weight_scale`, and takes the rows of
each for its first dimension: `qweight` and `scales` would stay as they are, and the model would say other tokens,
without an error. Here that method is followed: what it does to a matrix of row numbers is done to every tensor of a
module. Loaders that nothing follows yet are refused.
"""

from __future__ import annotations

from inspect import getmro
from typing import Any

import torch

from xpuquant.errors import UnsupportedError, one_line
from xpuquant.formats.scheme import Scheme

REFUSED = {"K2HorizonForCausalLM": ("q_proj", "k_proj"), "TeleChat2ForCausalLM": ("key_value",)}
"""Classes of vLLM whose `load_weights` takes rows apart or reorders them → the linears of which it does."""

_METHOD = "permute_qk_weight_for_rotary"
_REORDERED = ("q_proj", "k_proj")
_STORED = ("qweight", "qzeros", "scales", "weight_scale")


def follow_or_refuse(model: torch.nn.Module, stored: dict[str, Scheme]) -> None:
    """Make a model's loader reorder stored tensors as it would a plain weight.

    Args:
        model: as vLLM built it, before its weights are loaded.
        stored: the repo's quantized modules.

    Raises:
        UnsupportedError: in one line, where that cannot be: a class of `REFUSED`, or rows that share a scale.
    """
    for module in model.modules():
        for kind in getmro(type(module)):
            for name in stored:
                if name.rpartition(".")[2] in REFUSED.get(kind.__name__, ()):
                    raise UnsupportedError(
                        f"{one_line(name)}: vLLM's {kind.__name__} reorders its rows while it loads them, "
                        "which is not done for stored layouts yet; serve the source repo instead"
                    )
        if hasattr(module, _METHOD):
            _refuse_shared_scales(type(module).__name__, stored)
            setattr(module, _METHOD, _following(getattr(module, _METHOD)))


def _refuse_shared_scales(kind: str, stored: dict[str, Scheme]) -> None:
    for name, scheme in stored.items():
        if name.rpartition(".")[2] in _REORDERED and scheme.granularity == "block":
            raise UnsupportedError(
                f"{one_line(name)}: vLLM's {kind} reorders its rows, of which {scheme.block_n} share a scale; "
                "serve the source repo instead"
            )


def _following(theirs: Any) -> Any:
    """`theirs` for what it knows; for stored tensors the same, along the dimension that their rows lie in."""

    def reorder(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        module, _, suffix = name.rpartition(".")
        if module.rpartition(".")[2] not in _REORDERED or suffix not in _STORED or tensor.ndim != 2:
            result: tuple[str, torch.Tensor] = theirs(
                name, tensor
            )  # `weight`, scales of rows, and what is not reordered
            return result
        if suffix == "qzeros":
            return name, _packed(_unpacked(tensor)[:, _order(theirs, module, tensor.shape[1] * 8)])
        if suffix == "qweight":
            return name, tensor[_order(theirs, module, tensor.shape[0])]
        return name, tensor[:, _order(theirs, module, tensor.shape[1])].contiguous()

    return reorder


def _order(theirs: Any, module: str, N: int) -> torch.Tensor:
    """Which row `theirs` puts at each place."""
    _, rows = theirs(f"{module}.weight", torch.arange(N).unsqueeze(1))
    order: torch.Tensor = rows.flatten()
    return order


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 `[G, N/8]` → nibbles, uint8 `[G, N]`."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def _packed(nibbles: torch.Tensor) -> torch.Tensor:
    """The other way."""
    octets = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return octets.contiguous().view(torch.int32)
