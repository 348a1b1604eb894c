"""What each GPU has to hold: weights as vLLM splits them, and the KV cache of one sequence. From headers and config.

An estimate that errs upwards: parts that engines keep whole count whole, vision parts among them, and a layer keeps
every token unless config.json says that it looks at a window. Activations, and what the runtime itself takes, come on
top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from xpuquant.conversion.plan.survey import PlannedModule
from xpuquant.formats.safetensors import Tensor

_REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa", "gate", "router", "shared_expert_gate", "g_proj")
"""Routers, and the low-rank projections of MLA: every GPU has them whole, as norms."""

_WINDOWS = ("sliding_attention", "chunked_attention", "local_attention")
_KEEP_ALL = ("full_attention", "attention", "hybrid", "*")
"""Kinds of layers, in the words of `layer_types` and of `layers_block_type`, and Nemotron-H's sign for one; `hybrid`
has attention beside a state space (Falcon-H1, Zamba 2)."""

_INT4_BITS = 4 + 16 / 128
"""Of a weight as int4 in groups of 128 with a scale of 16 bits, as most are published."""


def weights_on_each(
    modules: Iterable[PlannedModule],
    passed: Iterable[Tensor],
    config: Mapping[str, Any],
    ranks: int,
    as_int4: bool = False,
) -> int:
    """Bytes of weights on each of `ranks` GPUs.

    Args:
        config: the language model's, of config.json.
        as_int4: what it would be, were wider modules quantized to int4 in groups of 128 instead.
    """
    heads = _number(config, "num_key_value_heads") or 1
    sizes = [(module.conversion.name, _int4(module) if as_int4 else module.nbytes, 2) for module in modules]
    sizes += [(tensor.name.removesuffix(".weight"), tensor.nbytes, len(tensor.shape)) for tensor in passed]
    return sum(_share(name, nbytes, dims, ranks, heads) for name, nbytes, dims in sizes)


def _int4(module: PlannedModule) -> int:
    elements = sum(weight.N * weight.K for _, _, weight in module.weights)
    return min(module.nbytes, int(elements * _INT4_BITS / 8))


def _share(name: str, nbytes: int, dims: int, ranks: int, heads: int) -> int:
    """What one of `ranks` GPUs holds of a tensor."""
    leaf = name.rpartition(".")[2]
    if dims < 2 or leaf in _REPLICATED or "norm" in leaf or "vis" in name:
        return nbytes
    return nbytes // (min(ranks, heads) if leaf in ("k_proj", "v_proj") else ranks)


def kv_cache(config: Mapping[str, Any], tokens: int, ranks: int, element: int = 2) -> int | None:
    """Bytes of the KV cache of one sequence on each of `ranks` GPUs; None where config.json does not say enough.

    Args:
        config: the language model's, of config.json.
        element: bytes of a stored number: 2 (bf16), or 1 (fp8).
    """
    layers = _number(config, "num_hidden_layers")
    if layers is None:
        return None
    latent = _number(config, "kv_lora_rank")
    if latent is not None:
        # MLA: one latent vector and the rotary part of the key, the same on every GPU.
        per_token = (latent + (_number(config, "qk_rope_head_dim") or 0)) * element
    else:
        heads = _number(config, "num_attention_heads")
        hidden = _number(config, "hidden_size")
        kv_heads = _number(config, "num_key_value_heads") or heads
        if heads is None or kv_heads is None or (hidden is None and _head_dim(config) is None):
            return None
        head_dim = _head_dim(config) or (hidden or 0) // heads
        per_token = 2 * -(-kv_heads // ranks) * head_dim * element
    return per_token * sum(_tokens_kept(config, layers, tokens))


def _head_dim(config: Mapping[str, Any]) -> int | None:
    return _number(config, "head_dim") or _number(config, "attention_head_dim")  # Zamba 2


def _tokens_kept(config: Mapping[str, Any], layers: int, tokens: int) -> list[int]:
    """Of each layer. Layers of other kinds (linear attention, state spaces, experts) keep none: their state does not
    grow."""
    window = _number(config, "sliding_window") or _number(config, "attention_chunk_size") or tokens
    kept = {**dict.fromkeys(_KEEP_ALL, tokens), **dict.fromkeys(_WINDOWS, min(tokens, window))}
    for key in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        kinds = config.get(key)
        if isinstance(kinds, list | str) and len(kinds) == layers:
            return [kept.get(str(kind), 0) for kind in kinds]
    return [tokens] * _attention_layers(config, layers)


def _attention_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many layers have attention, where config.json does not say the kind of each."""
    for key in ("hybrid_layer_ids", "attn_layer_indices"):  # Zamba 2, Bamba
        numbers = config.get(key)
        if isinstance(numbers, list) and all(type(number) is int for number in numbers):
            return len({number for number in numbers if 0 <= number < layers})
    if (period := _number(config, "attn_layer_period")) is not None:  # Jamba
        return len(range(_number(config, "attn_layer_offset") or 0, layers, period))
    every = _number(config, "full_attention_interval")
    return layers if every is None else layers // every


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and 0 < value < 1 << 40 else None
