"""Parameters that stay in the pages of a file, where they are in host memory: nothing is copied.

What vLLM's model loader hands to a parameter becomes the parameter, where a copy would be the same. So do the rows of
q, k and v, or of gate and up: the file has them one behind the other, in the order of the parameter into which vLLM
joins them (`convert/plan/shards.py`). What arrives decides, not its name: rows that a loader reorders, cuts for a rank
or casts lie elsewhere and are copied as ever. So are the members of a file that has them in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

SHARDS = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}
"""vLLM's name of a member of a fused attention projection → its place. The last two are a lightning indexer's."""


def adopt(param: Any, tensor: torch.Tensor) -> bool:
    """Let a parameter in host memory be the tensor that it would be a copy of, and say whether it could."""
    if not isinstance(param, torch.nn.Parameter) or not _in_host_memory(param, tensor):
        return False
    alike = param.shape == tensor.shape and param.dtype == tensor.dtype and param.stride() == tensor.stride()
    if not alike or tensor.data_ptr() % tensor.itemsize:
        return False
    param.data = tensor
    return True


class MemberLoader:
    """The `weight_loader` of one parameter of a linear: adopts what it can, and leaves the rest to vLLM's own.

    Members of a fused parameter are kept until all of them are there, which shows whether they lie side by side. Those
    that wait for ever, because a load brings no others, are copied by `settle`.
    """

    def __init__(self, loader: Callable[..., Any], rows: Sequence[int]) -> None:
        """
        Args:
            loader: vLLM's own.
            rows: of each member, where the parameter is `[rows of all, ...]` and this rank has all of it; else empty.
        """
        self._loader = loader
        self._rows = rows
        self._waiting: dict[int, tuple[str | int, torch.Tensor]] = {}

    def __call__(self, param: Any, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> None:
        """As vLLM calls it: `loaded_shard_id` says which member it is, None that it is the whole parameter."""
        if loaded_shard_id is None:
            if not adopt(param, loaded_weight):
                self._loader(param, loaded_weight)
            return
        place = SHARDS.get(loaded_shard_id) if isinstance(loaded_shard_id, str) else loaded_shard_id
        if not isinstance(place, int) or not self._is_member(param, loaded_weight, place):
            self._loader(param, loaded_weight, loaded_shard_id)
            return
        self._waiting[place] = (loaded_shard_id, loaded_weight)
        if len(self._waiting) == len(self._rows):
            self.settle(param)

    def settle(self, param: Any) -> None:
        """Adopt the members that wait, where they are all and lie side by side; else copy them."""
        members = [self._waiting[place] for place in sorted(self._waiting)]
        self._waiting.clear()
        if members and len(members) == len(self._rows):
            rows = _joined([tensor for _, tensor in members])
            if rows is not None and adopt(param, rows):
                return
        for shard, tensor in members:
            self._loader(param, tensor, shard)

    def _is_member(self, param: Any, tensor: torch.Tensor, place: int) -> bool:
        return (
            place < len(self._rows)
            and _in_host_memory(param, tensor)
            and tensor.dtype == param.dtype
            and tensor.shape == (self._rows[place], *param.shape[1:])
            and tensor.is_contiguous()
        )


def settle(model: torch.nn.Module) -> None:
    """End a load: no parameter has members that wait for others."""
    for param in model.parameters():
        loader = getattr(param, "weight_loader", None)
        if isinstance(loader, MemberLoader):
            loader.settle(param)


def _in_host_memory(param: torch.Tensor, tensor: torch.Tensor) -> bool:
    return param.device.type == tensor.device.type == "cpu"


class _SideBySide:
    """The memory of several tensors, one behind the other, which live as long as it is used."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        nbytes = sum(tensor.nbytes for tensor in tensors)
        self.__array_interface__ = {
            "data": (tensors[0].data_ptr(), False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Contiguous tensors, which differ in their rows only, as one, where each begins at the end of the one before."""
    end = tensors[0].data_ptr()
    if end % tensors[0].itemsize:
        return None
    for tensor in tensors:
        if tensor.data_ptr() != end:
            return None
        end += tensor.nbytes
    octets = torch.from_numpy(np.asarray(_SideBySide(tensors)))
    return octets.view(tensors[0].dtype).view(-1, *tensors[0].shape[1:])
