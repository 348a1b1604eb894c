"""Output files: tensors in the order of their sources, filled into shards of even size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xpuquant.conversion.plan.survey import PlannedModule
from xpuquant.formats.architecture import LAYERS
from xpuquant.formats.layouts.base import OutTensor, copied
from xpuquant.formats.safetensors import PREFIX_BYTES, Tensor, build_header, parse_header
from xpuquant.values import frozen

_METADATA = {"format": "pt"}

_ROWS = frozenset({"qweight", "weight"})
"""Suffixes of the tensors of linears, in the layouts that XPU kernels read, whose first dimension is their rows."""

_FUSED = {leaf: layer.fused for leaf, layer in LAYERS.items() if layer.fused}
_PLACES = {leaf: place for place, leaf in enumerate(_FUSED)}


@frozen
class Shard:
    """One output file: `header` first, then `tensors` in order, without gaps."""

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def places(self) -> dict[str, Tensor]:
        """Name → where the tensor will lie in the file, as its header says."""
        return parse_header(self.header[PREFIX_BYTES:], self.name, self.nbytes)


def in_source_order(planned: Iterable[PlannedModule], passed: Iterable[Tensor]) -> list[list[OutTensor]]:
    """Output tensors, module by module, in the order of their first source byte: reading goes forward and layers
    stay together.

    Args:
        passed: tensors that keep their bytes.
    """
    placed: list[tuple[tuple[str, int], list[OutTensor]]] = []
    for module in planned:
        first = min((tensor.file, tensor.begin) for _, _, weight in module.weights for tensor in weight.tensors)
        placed.append((first, list(module.conversion.tensors)))
    placed += [((tensor.file, tensor.begin), [copied(tensor)]) for tensor in passed]
    placed.sort(key=lambda entry: entry[0])
    return [tensors for _, tensors in placed]


def balance(units: Sequence[Sequence[OutTensor]], max_bytes: int, *, fused: bool = False) -> tuple[Shard, ...]:
    """Fill shards evenly, none over `max_bytes` of data unless one tensor is. A unit's tensors stay in one shard where
    they fit, so that a shard can be made and verified on its own.

    Args:
        fused: put the rows of q, k and v, and those of gate and up, that lie in one shard one behind the other, in the
            order in which engines join them. The joined tensor is then one run of the file's bytes.
    """
    sizes = [sum(tensor.nbytes for tensor in unit) for unit in units]
    total = sum(sizes)
    # Even shards: the same number of files, none of them a stub. Two where one would be more than half full: a file is
    # hashed in one thread, here, when it is sent and when it is checked.
    count = max(-(-total // max_bytes), 1 + (total > max_bytes // 2))
    target = total / count
    filled: list[list[OutTensor]] = [[]]
    filled_bytes = 0
    for unit, unit_bytes in zip(units, sizes, strict=True):
        for tensors, size in [(unit, unit_bytes)] if unit_bytes <= max_bytes else [([t], t.nbytes) for t in unit]:
            if filled[-1] and (filled_bytes + size > max_bytes or filled_bytes >= target):
                filled.append([])
                filled_bytes = 0
            filled[-1] += tensors
            filled_bytes += size
    return tuple(
        _shard(
            f"model-{i:05}-of-{len(filled):05}.safetensors" if len(filled) > 1 else "model.safetensors",
            _side_by_side(members) if fused else members,
        )
        for i, members in enumerate(filled, 1)
    )


def _side_by_side(tensors: Sequence[OutTensor]) -> list[OutTensor]:
    """The tensors, with the rows that engines join at the place of the first of them."""
    units: list[list[OutTensor]] = []
    joined: dict[tuple[str, str, str], list[OutTensor]] = {}
    for tensor in tensors:
        module, _, suffix = tensor.name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        if leaf not in _FUSED or suffix not in _ROWS:
            units.append([tensor])
            continue
        key = (parent, _FUSED[leaf], suffix)
        if key not in joined:
            joined[key] = []
            units.append(joined[key])
        joined[key].append(tensor)
    for members in joined.values():
        members.sort(key=lambda tensor: _PLACES[tensor.name.rsplit(".", 2)[-2]])
    return [tensor for unit in units for tensor in unit]


def _shard(name: str, tensors: Iterable[OutTensor]) -> Shard:
    # Tensors whose length is no multiple of 8 go last, so that every other one stays aligned.
    ordered = tuple(sorted(tensors, key=lambda tensor: tensor.nbytes % 8 != 0))
    header = build_header(((t.name, t.dtype, t.shape, t.nbytes) for t in ordered), _METADATA)
    return Shard(name, header, ordered)
