"""What a module's name tells, and what the architecture knows where its tensors are silent. Names and config keys only.

`LAYERS` is the one table of what layers are called. The rest answers three questions of readers: how many of the packed
columns are real (AutoRound's model-free export pads K inside qweight), whether a zero bias is a dummy (AutoGPTQ wrote
one for every module), and whether a module is looked up rather than multiplied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from xpuquant.values import frozen

if TYPE_CHECKING:
    from xpuquant.formats.checkpoint import Checkpoint


@frozen
class LayerKind:
    """What is known of a layer by the last part of its name.

    role       the matrix of an expert that it is: `gate`, `up`, `down` or `gate_up`; empty for others
    fused      the tensor into which serving engines load it together with others (`packed_modules_mapping` of vLLM's
               models); empty where it stays alone
    K          the config key that holds its in_features; empty where none does
    fed_by     the layers beside it whose out_features are its in_features; the first that exists decides
    block      `attention` or `mlp`: whose config key says whether it has a bias
    along_k    engines split it over several GPUs along K; all others along N
    whole      engines do not split it: each GPU has all of it
    embedding  a table of rows to look up, not a matrix to multiply with
    """

    role: str = ""
    fused: str = ""
    K: str = ""
    fed_by: tuple[str, ...] = ()
    block: str = ""
    along_k: bool = False
    embedding: bool = False
    whole: bool = False


_HIDDEN = "hidden_size"

LAYERS: Mapping[str, LayerKind] = {
    "q_proj": LayerKind(fused="qkv_proj", K=_HIDDEN, block="attention"),
    "k_proj": LayerKind(fused="qkv_proj", K=_HIDDEN, block="attention"),
    "v_proj": LayerKind(fused="qkv_proj", K=_HIDDEN, block="attention"),
    "qkv_proj": LayerKind(K=_HIDDEN),
    "o_proj": LayerKind(block="attention", along_k=True),
    "q_a_proj": LayerKind(fused="fused_qkv_a_proj", K=_HIDDEN, whole=True),
    "kv_a_proj_with_mqa": LayerKind(fused="fused_qkv_a_proj", K=_HIDDEN, whole=True),
    "q_b_proj": LayerKind(K="q_lora_rank"),
    "kv_b_proj": LayerKind(K="kv_lora_rank"),
    "in_proj_qkv": LayerKind(K=_HIDDEN),
    "in_proj_z": LayerKind(K=_HIDDEN),
    "in_proj_qkvz": LayerKind(K=_HIDDEN),
    "in_proj_a": LayerKind(K=_HIDDEN),
    "in_proj_b": LayerKind(K=_HIDDEN),
    "in_proj_ba": LayerKind(K=_HIDDEN),
    "out_proj": LayerKind(along_k=True),
    "dense": LayerKind(along_k=True),
    "gate_proj": LayerKind("gate", fused="gate_up_proj", K=_HIDDEN, block="mlp"),
    "up_proj": LayerKind("up", fused="gate_up_proj", K=_HIDDEN, block="mlp"),
    "gate_up_proj": LayerKind("gate_up", K=_HIDDEN),
    "input_linear": LayerKind("gate_up", K=_HIDDEN),
    "down_proj": LayerKind("down", fed_by=("up_proj", "gate_proj"), block="mlp", along_k=True),
    "w1": LayerKind("gate", fused="w13", K=_HIDDEN, block="mlp"),
    "w3": LayerKind("up", fused="w13", K=_HIDDEN, block="mlp"),
    "w2": LayerKind("down", fed_by=("w3", "w1"), block="mlp", along_k=True),
    "output_linear": LayerKind("down", along_k=True),
    "fc2": LayerKind(along_k=True),
    "lm_head": LayerKind(K=_HIDDEN),
    "embed_tokens": LayerKind(K=_HIDDEN, embedding=True),
    "embed_in": LayerKind(K=_HIDDEN, embedding=True),
    "wte": LayerKind(K=_HIDDEN, embedding=True),
    "word_embeddings": LayerKind(K=_HIDDEN, embedding=True),
    "tok_embeddings": LayerKind(K=_HIDDEN, embedding=True),
}
"""The last part of a module's name → what is known of it. Layers in one tensor are in its order."""

ALIASES = ((".block_sparse_moe.", ".mlp."), (".mamba.", ".mixer."), (".moe.", ".mlp."))
"""Two names of one thing. Mixtral: published checkpoints and vLLM have the first, Transformers the second. MiniMax-M2:
files have the first, vLLM asks for the second. Granite 4, Falcon-H1, Jamba, Zamba2: likewise. Step-3.7: files
and vLLM have the first, Transformers the second."""

_UNKNOWN = LayerKind()
_ALONG_K = tuple(leaf for leaf, layer in LAYERS.items() if layer.along_k)


def layer_of(name: str) -> LayerKind:
    """What is known of a module by its name; nothing, for names that are not in the table."""
    return LAYERS.get(name.rpartition(".")[2], _UNKNOWN)


def is_known(name: str) -> bool:
    """Whether anything is known of a module by its name."""
    return name.rpartition(".")[2] in LAYERS


_LOOKED_UP = frozenset(
    {
        "embed",
        "embeds",
        "embedding",
        "embeddings",
        "embd",
        "emb",
        "embedders",
        "wte",
        "wpe",
        "lookup",
        "table",
        "tables",
        "codebook",
    }
)
_MULTIPLIED = frozenset(
    {
        "proj",
        "projs",
        "projection",
        "projector",
        "projections",
        "out",
        "output",
        "head",
        "unembed",
        "norm",
        "gate",
        "mlp",
        "fc",
        "linear",
        "dense",
        "conv",
        "patch",
        "query",
        "key",
        "value",
    }
)


def is_embedding(name: str) -> bool:
    """Whether a module is a table of rows to look up, by its role: the words of its name say it looks something up
    (`embed_tokens_per_layer`, `wpe`, `ngram_embeddings.3`), and none says that it multiplies (`embed_out` is GPT-NeoX's
    head, `embedding_projection` a linear)."""
    parent, _, leaf = name.rpartition(".")
    if leaf.isdigit():
        leaf = parent.rpartition(".")[2]
    return _looks_up(leaf)


@lru_cache(1024)
def _looks_up(leaf: str) -> bool:
    words = set(leaf.lower().split("_"))
    return layer_of(leaf).embedding or leaf == "shared" or bool(words & _LOOKED_UP and not words & _MULTIPLIED)


def is_router(name: str) -> bool:
    """Whether a module chooses the experts of a token: `mlp.gate`, `feed_forward.router`, `router.proj` (Gemma 4),
    `block_sparse_moe.router.layer` (Granite), `mlp.gate.wg` (Hunyuan). `gate` is a router's name in every architecture
    known here; the linears that gate a layer are called `gate_proj`."""
    parent, _, leaf = name.rpartition(".")
    if leaf in ("proj", "layer", "wg"):
        leaf = parent.rpartition(".")[2]
    return leaf in ("router", "gate")


def splits_along_k(name: str) -> bool:
    """Whether engines split a module over several GPUs along K. `attn_out_proj` does as `out_proj` does."""
    return name.endswith(_ALONG_K)


def fused_with(name: str) -> str:
    """The module into which engines load this one together with others; its own name where it stays alone."""
    parent, dot, leaf = name.rpartition(".")
    return f"{parent}{dot}{layer_of(name).fused or leaf}"


def members_of(fused: str) -> list[str]:
    """The layers that engines load into one tensor of this name, in its order; none for other names."""
    return [leaf for leaf, layer in LAYERS.items() if fused and layer.fused == fused]


def fused_rows(checkpoint: Checkpoint, name: str, N: int, count: int) -> tuple[int, ...] | None:
    """Rows of each of the `count` linears that a checkpoint has as one of N rows, in their order; None where that is
    not known.

    gate and up are halves. q, k and v are as large as the heads of attention say, or those of a Gated DeltaNet
    (transformers/models/qwen3_5/modeling_qwen3_5.py, `in_proj_qkv`).
    """
    leaf, config = name.rpartition(".")[2], checkpoint.text_config
    if count == 2 and layer_of(name).role == "gate_up":
        return (N // 2, N // 2) if N % 2 == 0 else None
    if count != 3 or leaf not in ("qkv_proj", "in_proj_qkv"):
        return None
    if leaf == "in_proj_qkv":
        keys, values = (
            _product(config, f"linear_num_{part}_heads", f"linear_{part}_head_dim") for part in ("key", "value")
        )
        return _if_all(N, keys, keys, values)
    heads, hidden = _int(config, "num_attention_heads"), _int(config, "hidden_size")
    width = _int(config, "head_dim") or (hidden // heads if heads and hidden else None)
    kv = _int(config, "num_key_value_heads") or heads
    return _if_all(N, heads * width, kv * width, kv * width) if heads and width and kv else None


def _if_all(N: int, *rows: int | None) -> tuple[int, ...] | None:
    known = tuple(count for count in rows if count)
    return known if len(known) == len(rows) and sum(known) == N else None


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


def in_features(checkpoint: Checkpoint, name: str) -> int | None:
    """K of a linear as the rest of the model demands it, or None where that is not known."""
    parent, _, leaf = name.rpartition(".")
    config, layer = checkpoint.text_config, layer_of(name)
    if layer.K:
        return _int(config, layer.K)
    for sibling in layer.fed_by:
        width = _out_features(checkpoint, f"{parent}.{sibling}")
        if width is not None:
            return width
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
    config, block = checkpoint.text_config, layer_of(name).block
    model_type = config.get("model_type")
    if model_type in ("qwen2", "qwen2_moe") and block:
        return layer_of(name).fused == "qkv_proj" and bool(config.get("qkv_bias", True))
    attention, mlp = _BIASES.get(str(model_type), (None, None))
    says = attention if block == "attention" else mlp if block == "mlp" else None
    return bool(config.get(says, False)) if isinstance(says, str) else says


def _out_features(checkpoint: Checkpoint, name: str) -> int | None:
    """N of a sibling, from GPTQ's or AWQ's scales `[G, N]`, or its unquantized weight `[N, K]`."""
    scales, weight = checkpoint.tensors.get(f"{name}.scales"), checkpoint.tensors.get(f"{name}.weight")
    if scales is not None and len(scales.shape) == 2:
        return scales.shape[1]
    return weight.shape[0] if weight is not None and len(weight.shape) == 2 else None


def _int(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else None


def _product(config: Mapping[str, Any], *keys: str) -> int | None:
    factors = [_int(config, key) for key in keys]
    return math.prod(factor for factor in factors if factor) if all(factors) else None


def state_groups(config: Mapping[str, Any]) -> int | None:
    """How many groups of states the mixers of a Mamba 2 model have; None for other models.

    Falcon-H1, Granite 4 and Bamba call them `mamba_n_groups`, Zamba 2 `mamba_ngroups`, Nemotron-H `n_groups`
    (transformers/models/*/configuration_*.py).
    """
    keys = ("mamba_n_groups", "mamba_ngroups", *(["n_groups"] if "mamba_num_heads" in config else []))
    return next((count for key in keys if (count := _int(config, key)) is not None), None)


def is_mixer_input(name: str) -> bool:
    """Whether a module is the linear before the states of a Mamba mixer: `mamba.in_proj`, `mixer.in_proj`."""
    return name.endswith((".mamba.in_proj", ".mixer.in_proj"))


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def expert_counts(checkpoint: Checkpoint) -> set[int]:
    """Numbers of routed experts in a layer, as any part of the config states them: one, or one for each part of a
    multimodal model or (Hunyuan, Ernie) each layer or modality."""
    found: set[int] = set()
    parts: list[Any] = [checkpoint.config]
    while parts:
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key in _EXPERT_COUNTS:
            value = part.get(key)
            counts = value if isinstance(value, list) else [value]
            found |= {count for count in counts if type(count) is int and count > 0}
    return found


_ROLES = {leaf: layer.role for leaf, layer in LAYERS.items() if layer.role}

# A number as it is written for an expert: `07` is another module than `7`, and would replace it.
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>0|[1-9][0-9]{0,8})\.(?P<part>" + "|".join(_ROLES) + ")")


def expert_of(name: str) -> tuple[str, int, str] | None:
    """(stack, expert, role) of a module name, or None for one that is no expert's."""
    match = _EXPERT.fullmatch(name)
    return (match["stack"], int(match["expert"]), _ROLES[match["part"]]) if match else None


def stacked_experts(name: str, expert: int) -> str | None:
    """The name of one expert's matrix in a module that holds those of all experts of a layer, in one 3-D tensor; None
    where the name tells no role. Step-3.5 has `P.moe.gate_proj`, Granite `P.block_sparse_moe.input_linear`; engines
    keep both in `experts` beside them."""
    parent, _, leaf = name.rpartition(".")
    role = _ROLES.get(leaf)
    if role is None:
        return None
    stack = parent if parent.rpartition(".")[2] == "experts" else f"{parent}.experts"
    return f"{stack}.{expert}.{role}_proj"
