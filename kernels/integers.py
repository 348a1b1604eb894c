"""Stored layers as the integer layers that kernels for integers know.

An int8 linear and an NVFP4 linear are int4 linears with two planes of nibbles, an NVFP4 expert is an int8 expert; what
is left of NVFP4 is one number, which the product is multiplied with (`finished`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from xpuquant.errors import UnsupportedError
from xpuquant.formats.dtypes import label_of
from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.base import Array, Backend, Layer


def unsigned_int4(layer: Layer) -> tuple[Array, Array]:
    """The words and scales of an int4 layer as an int4 linear has them, also those of an expert.

    Returns:
        int32 words `[N, K/8]` of unsigned nibbles, and scales `[K/g, N]`.
    """
    if layer.scheme.layout == "int4_experts":  # signed nibbles become unsigned with their high bit flipped
        return (layer.tensors["weight"] ^ np.uint8(0x88)).view(np.int32), layer.tensors["weight_scale"].T
    if layer.scheme.layout == "uint4_experts":
        return np.ascontiguousarray(layer.tensors["weight"]).view(np.int32), layer.tensors["weight_scale"].T
    return layer.tensors["qweight"], layer.tensors["scales"]


def integer_scheme(scheme: Scheme, K: int) -> tuple[Scheme, int]:
    """The scheme and K of the integer layer that a layer is; any other scheme as it is."""
    if scheme.layout == "int8_linear":
        return replace(scheme, layout="int4_linear", symmetric=False, act_order=False), 2 * K
    if scheme.layout == "nvfp4_linear":
        return replace(scheme, layout="int4_linear", group_size=2 * scheme.group_size, divides=False), 2 * K
    if scheme.layout == "nvfp4_experts":
        return replace(scheme, layout="int8_experts", divides=False), K
    return scheme, K


_APART = {
    "int8_linear": ("g_idx",),
    "nvfp4_linear": ("global_scale", "bias"),
    "nvfp4_experts": ("global_scale", "bias"),
}
"""Layout → tensors that the integer layer has not: used before, or after."""


def taken(backend: Backend, layer: Layer, x: Array) -> tuple[Layer, Array]:
    """`as_integers` of a layer, with the activations in the order of its columns.

    Raises:
        UnsupportedError: the backend refuses it.
    """
    reason = backend.refuses(layer.scheme, layer.N, layer.K, label_of(x.dtype))
    if reason is not None:
        raise UnsupportedError(reason)
    layer, x = as_integers(layer, x)
    return layer, x[:, layer.tensors["g_idx"]] if layer.scheme.act_order else x


def as_integers(layer: Layer, x: Array) -> tuple[Layer, Array]:
    """The integer layer that a layer is, and activations in which each group comes twice where it has two planes; any
    other layer as it is. What it returns is to be `finished`."""
    scheme, K = integer_scheme(layer.scheme, layer.K)
    if scheme is layer.scheme:
        return layer, x
    if layer.scheme.act_order:
        x = x[:, layer.tensors["g_idx"]]
    if K > layer.K:
        group = layer.scheme.group_size
        x = np.repeat(x.reshape(len(x), -1, 1, group), 2, axis=2).reshape(len(x), K)
    apart = _APART[layer.scheme.layout]
    tensors = {role: tensor for role, tensor in layer.tensors.items() if role not in apart}
    return Layer(scheme, layer.N, K, tensors), x


def finished(layer: Layer, product: Array) -> Array:
    """A layer's output, float32 `[M, N]`, from the product of its integer layer."""
    number = layer.tensors.get("global_scale")
    if number is None:
        return product
    out: Array = product / number if layer.scheme.divides else product * number
    return out + layer.tensors["bias"].astype(np.float32) if "bias" in layer.tensors else out
