"""What the shapes alone say of an integer module that no group of the config describes, or describes otherwise.

Names change after a config was written (a language model that became part of a multimodal one: `model.layers` is
`model.language_model.layers` now), targets list the modules of an older save, and other producers store the same
tensors with a config of their own (Quark, SGLang). `weight_shape` and the scales say what such a config does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xpuquant.errors import DamagedError, UnsupportedError
from xpuquant.formats.readers.compressed_tensors.config import WeightArgs
from xpuquant.formats.safetensors import Tensor

_GROUP_STEP = 16
"""Producers have groups of 16, 32, 64, ... columns. What is none of these is some other table than scales."""


def group_of_scales(scale: Tensor, N: int, K: int) -> int | None:
    """Columns per scale of a weight `[N, K]`, K where each row has one; None where the shapes give none."""
    if scale.shape in ((), (1,), (1, 1), (N,), (N, 1), (1, N)):
        return K
    if len(scale.shape) != 2 or scale.shape[0] != N or K % scale.shape[1]:
        return None
    size = K // scale.shape[1]
    return size if size % _GROUP_STEP == 0 else None


def args_of_shapes(
    candidates: Sequence[WeightArgs], widths: Iterable[int], codes: Tensor, scale: Tensor, N: int, K: int
) -> tuple[WeightArgs, tuple[str, ...]]:
    """(the scheme, the fact that says where it is from) of a module of integers.

    Args:
        candidates: what the config says of the module; none of it fits.
        widths: bits per code that the shape of `codes` allows.

    Raises:
        UnsupportedError: nothing says what is stored.
        DamagedError: the config says what the shapes contradict.
    """
    size, widths = group_of_scales(scale, N, K), tuple(widths)
    said = next((args for args in candidates if args.type == "int" and args.bits in widths), None)
    if candidates and (said is None or size is None):
        raise DamagedError(
            f"{codes.name} {list(codes.shape)} with scales {list(scale.shape)} is not what the config describes "
            f"({candidates[0]})"
        )
    if size is None or len(widths) != 1:
        raise UnsupportedError(
            f"no group of the config describes it, and {codes.name} {list(codes.shape)} with scales "
            f"{list(scale.shape)} may be of {' or '.join(map(str, widths)) or 'no known number of'} bits"
        )
    args = WeightArgs(
        bits=said.bits if said else widths[0],
        type="int",
        strategy=None,
        group_size=size if size < K else None,
        symmetric=said is None or said.symmetric,
        block=None,
        format=None,
    )
    if said is None:
        return args, (f"no group of the config describes it: {args}, from the shapes",)
    return args, (f"{args.groups}, from the shapes; the config says {said.groups}",)
