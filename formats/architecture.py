"""What the architecture knows about a module where its tensors are silent. Names and config keys only.

Used for three questions: how many of the packed columns are real (AutoRound's model-free export pads K inside
qweight), whether a zero bias is a dummy (AutoGPTQ wrote one for every module), and whether a module is looked up
rather than multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from xpuquant.formats.checkpoint import Checkpoint

_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings"})

_FROM_HIDDEN = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "q_a_proj",
        "kv_a_proj_with_mqa",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "w1",
        "w3",
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_qkvz",
        "in_proj_a",
        "in_proj_b",
        "in_proj_ba",
        "lm_head",
    }
)
_PRODUCERS = {"down_proj": ("up_proj", "gate_proj"), "w2": ("w3", "w1")}

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})

# model_type → (attention, mlp): whether the linears have biases, or the config key that says so
# (transformers/models/<model_type>/modeling_*.py, default False).
_BIASES: Mapping[str, tuple[str | bool, str | bool]] = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": (False, False),
    "mixtral": (False, False),
    "qwen3": ("attention_bias", False),
    "qwen3_moe": ("attention_bias", False),
}


# down(act(gate(x)) * up(x)), act element by element (transformers/models/<model_type>/modeling_*.py, class *MLP).
_GATED_MLPS = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo2",
        "granite",
        "cohere",
        "deepseek_v2",
        "deepseek_v3",
    }
)


def has_plain_gated_mlp(checkpoint: Checkpoint) -> bool:
    """Whether nothing but element-wise work stands between gate_proj, up_proj and down_proj."""
    return checkpoint.text_config.get("model_type") in _GATED_MLPS


def is_embedding(name: str) -> bool:
    """Whether a module is a table of rows to look up."""
    return name.rpartition(".")[2] in _EMBEDDINGS


def in_features(checkpoint: Checkpoint, name: str) -> int | None:
    """K of a linear as the rest of the model demands it, or None where that is not known."""
    parent, _, leaf = name.rpartition(".")
    config = checkpoint.text_config
    if leaf in _FROM_HIDDEN or is_embedding(name):
        return _int(config, "hidden_size")
    if leaf in _PRODUCERS:
        for sibling in _PRODUCERS[leaf]:
            width = _out_features(checkpoint, f"{parent}.{sibling}")
            if width is not None:
                return width
        return None
    if leaf == "q_b_proj":
        return _int(config, "q_lora_rank")
    if leaf == "kv_b_proj":
        return _int(config, "kv_lora_rank")
    if leaf == "o_proj":
        heads, width = (
            _int(config, "num_attention_heads"),
            _int(config, "v_head_dim") or _int(config, "head_dim"),
        )
        hidden = _int(config, "hidden_size")
        return heads * width if heads and width else hidden
    if leaf == "out_proj":
        heads, width = _int(config, "linear_num_value_heads"), _int(config, "linear_value_head_dim")
        return heads * width if heads and width else None
    return None


def has_bias(checkpoint: Checkpoint, name: str) -> bool | None:
    """Whether the architecture gives a linear a bias; None where that is not known."""
    model_type, leaf = checkpoint.text_config.get("model_type"), name.rpartition(".")[2]
    if model_type in ("qwen2", "qwen2_moe") and leaf in _ATTENTION | _MLP:
        return leaf in ("q_proj", "k_proj", "v_proj") and bool(checkpoint.text_config.get("qkv_bias", True))
    attention, mlp = _BIASES.get(str(model_type), (None, None))
    says = attention if leaf in _ATTENTION else mlp if leaf in _MLP else None
    return bool(checkpoint.text_config.get(says, False)) if isinstance(says, str) else says


def _out_features(checkpoint: Checkpoint, name: str) -> int | None:
    """N of a sibling, from GPTQ's or AWQ's scales `[G, N]`, or its unquantized weight `[N, K]`."""
    scales, weight = checkpoint.tensors.get(f"{name}.scales"), checkpoint.tensors.get(f"{name}.weight")
    if scales is not None and len(scales.shape) == 2:
        return scales.shape[1]
    return weight.shape[0] if weight is not None and len(weight.shape) == 2 else None


def _int(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else None


ROLES = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "gate_up_proj": "gate_up",
}

# A number as it is written for an expert: `07` is another module than `7`, and would replace it.
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>0|[1-9][0-9]{0,8})\.(?P<part>" + "|".join(ROLES) + ")")


def expert_of(name: str) -> tuple[str, int, str] | None:
    """(stack, expert, role) of a module name, or None for one that is no expert's."""
    match = _EXPERT.fullmatch(name)
    return (match["stack"], int(match["expert"]), ROLES[match["part"]]) if match else None
