"""Models that people run on Intel GPUs, and the schemes that they are published in.

A model is a configuration class of Transformers with the values of the published config.json; where the class's
defaults are those of the model, nothing is listed. Every value has its source. The names are of the repos of the Hub
that the shapes stand for; what is written has no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULTS = "defaults of Transformers' {}"
SLIME = "THUDM/slime scripts/models/{}.sh"


@dataclass(frozen=True)
class Model:
    """A published architecture.

    config  class of Transformers
    values  of its config.json where they are not the class's defaults
    text    the same, of its `text_config`
    head    Auto class that makes the model
    source  where the values are from
    """

    name: str
    config: str
    source: str
    values: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    head: str = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Published:
    """A model in a scheme of `schemes.SCHEMES`.

    skipped  regex of modules that the producer left unquantized, besides heads, routers and embeddings
    only     regex of those it quantized, where it names these
    """

    model: Model
    scheme: str
    skipped: str = "(?!)"
    only: str = ""


DEEPSEEK_V3 = Model("DeepSeek-V3", "DeepseekV3Config", DEFAULTS.format("DeepseekV3Config"))
KIMI_K2 = Model(
    "Kimi-K2-Thinking",
    "DeepseekV3Config",
    "ParagEkbote/hf-model-inspector model_inspection_report.md (moonshotai/Kimi-K2-Instruct-0905); 384 experts, one "
    "dense layer: mfarisadip/Kimi-K2-Mini README.md; else as DeepSeek-V3",
    {"num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1}
    | {"vocab_size": 163840},
)
GPT_OSS_120B = Model("gpt-oss-120b", "GptOssConfig", DEFAULTS.format("GptOssConfig"))
GPT_OSS_20B = Model(
    "gpt-oss-20b",
    "GptOssConfig",
    "arXiv:2508.10925, table 1; else as gpt-oss-120b",
    {"num_hidden_layers": 24, "num_local_experts": 32, "layer_types": ["sliding_attention", "full_attention"] * 12},
)
QWEN36_35B = Model(
    "Qwen3.6-35B-A3B",
    "Qwen3_5MoeConfig",
    f"{DEFAULTS.format('Qwen3_5MoeConfig')}; {SLIME.format('qwen36-35B-A3B')}",
    head="AutoModelForImageTextToText",
)
QWEN35_122B = Model(
    "Qwen3.5-122B-A10B",
    "Qwen3_5MoeConfig",
    "48 layers, 256 experts, vocabulary: card of olka-fi/Qwen3.5-122B-A10B-MXFP4; no public config was found: the "
    "sizes here are ones that give 122 billion parameters in this family",
    text={"hidden_size": 3072, "num_hidden_layers": 48, "moe_intermediate_size": 1024}
    | {"shared_expert_intermediate_size": 1024, "num_attention_heads": 32, "linear_num_value_heads": 64},
    head="AutoModelForImageTextToText",
)
QWEN35_27B = Model(
    "Qwen3.5-27B",
    "Qwen3_5Config",
    f"{SLIME.format('qwen3.5-27B')}; 48 value heads of linear attention: not found, they give 27 billion parameters",
    text={"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "num_attention_heads": 24}
    | {"num_key_value_heads": 4, "linear_num_value_heads": 48},
    head="AutoModelForImageTextToText",
)
QWEN3_30B = Model(
    "Qwen3-30B-A3B",
    "Qwen3MoeConfig",
    "zyzshishui/slime scripts/models/qwen3-30B-A3B.sh",
    {"num_hidden_layers": 48, "head_dim": 128, "tie_word_embeddings": False},
)
QWEN3_32B = Model(
    "Qwen3-32B",
    "Qwen3Config",
    "arXiv:2505.09388, table 1 (layers, heads); widths: 25600 and 5120 give its 32.8 billion parameters",
    {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False},
)
QWEN3_NEXT = Model("Qwen3-Next-80B-A3B", "Qwen3NextConfig", DEFAULTS.format("Qwen3NextConfig"))
LLAMA_405B = Model(
    "Llama-3.1-405B",
    "LlamaConfig",
    "arXiv:2407.21783, table 3",
    {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
)
LLAMA_8B = Model(
    "Llama-3.1-8B",
    "LlamaConfig",
    "vulkomilev/oumi configs/recipes/llama3_1/README.md",
    {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
)
GLM_45_AIR = Model(
    "GLM-4.5-Air",
    "Glm4MoeConfig",
    f"{DEFAULTS.format('Glm4MoeConfig')}; heads of 128: zyzshishui/slime scripts/models/glm4.5-355B-A32B.sh",
    {"head_dim": 128},
)
GLM_47_FLASH = Model("GLM-4.7-Flash", "Glm4MoeLiteConfig", DEFAULTS.format("Glm4MoeLiteConfig"))
MINIMAX_M2 = Model("MiniMax-M2", "MiniMaxM2Config", DEFAULTS.format("MiniMaxM2Config"))
STEP = Model(
    "Step-3.5-Flash",
    "Step3p7Config",
    f"{DEFAULTS.format('Step3p7Config')}; whether g_proj is quantized was not found: it is left alone here",
    head="AutoModelForImageTextToText",
)
MISTRAL_SMALL = Model(
    "Mistral-Small-3.2-24B",
    "Mistral3Config",
    DEFAULTS.format("Mistral3Config"),
    head="AutoModelForImageTextToText",
)
LLAMA4_SCOUT = Model(
    "Llama-4-Scout-17B-16E", "Llama4Config", DEFAULTS.format("Llama4Config"), head="AutoModelForImageTextToText"
)
NEMOTRON_3_NANO = Model(
    "Nemotron-3-Nano-30B-A3B",
    "NemotronHConfig",
    SLIME.format("nemotron-nano-30B-A3B"),
    {"hidden_size": 2688, "intermediate_size": 1856, "num_attention_heads": 32, "num_key_value_heads": 2}
    | {"head_dim": 128, "n_routed_experts": 128, "moe_intermediate_size": 1856, "mamba_num_heads": 64}
    | {"moe_shared_expert_intermediate_size": 3712, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8}
    | {"hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "vocab_size": 131072}
    | {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
)

_LINEAR_ATTENTION = r".*\.linear_attn\..*"
_SHARED = r".*\.shared_experts?\..*"
_ATTENTION = r".*\.self_attn\..*"

PUBLISHED = (
    Published(LLAMA_8B, "fp8 channel"),
    Published(LLAMA_8B, "fp8 tensor"),
    Published(LLAMA_8B, "gptq int4"),
    Published(LLAMA_8B, "int8 w8a8"),
    Published(LLAMA_8B, "nvfp4"),
    Published(MISTRAL_SMALL, "fp8 tensor", r".*(vision_tower|multi_modal_projector).*"),
    Published(QWEN3_32B, "gptq int4"),
    Published(QWEN3_32B, "awq int4"),
    Published(QWEN3_32B, "fp8 block"),
    Published(QWEN35_27B, "gptq int4", _LINEAR_ATTENTION),
    Published(QWEN35_27B, "fp8 block", r".*\.linear_attn\.in_proj_[ab]"),
    Published(QWEN3_30B, "gptq int4"),
    Published(QWEN3_30B, "awq int4"),
    Published(QWEN3_30B, "fp8 block"),
    Published(QWEN3_30B, "mxfp4"),
    Published(QWEN3_30B, "mxfp8"),
    Published(QWEN36_35B, "gptq int4", f"{_LINEAR_ATTENTION}|{_ATTENTION}|{_SHARED}"),
    Published(QWEN36_35B, "fp8 block", r".*\.linear_attn\.in_proj_[ab]"),
    Published(GPT_OSS_20B, "gpt-oss mxfp4"),
    Published(GLM_47_FLASH, "fp8 channel"),
    Published(NEMOTRON_3_NANO, "fp8 tensor", only=r".*\.(experts\.\d+|shared_experts)\..*|.*mixer\.(in|out)_proj"),
    Published(QWEN3_NEXT, "fp8 block", r".*\.linear_attn\.in_proj_ba"),
    Published(GLM_45_AIR, "fp8 channel"),
    Published(GLM_45_AIR, "awq int4", r"model\.layers\.0\..*"),
    Published(LLAMA4_SCOUT, "int4 group 128", r".*(vision_model|multi_modal_projector).*|.*self_attn.*"),
    Published(GPT_OSS_120B, "gpt-oss mxfp4"),
    Published(QWEN35_122B, "awq int4", f"{_LINEAR_ATTENTION}|{_ATTENTION}|{_SHARED}"),
    Published(STEP, "fp8 block", r".*(vision_model|vit_large_projector).*|.*\.g_proj"),
    Published(MINIMAX_M2, "fp8 block"),
    Published(DEEPSEEK_V3, "awq int4"),
    Published(DEEPSEEK_V3, "fp8 block"),
    Published(LLAMA_405B, "fp8 channel"),
    Published(KIMI_K2, "int4 group 32", only=r".*\.experts\.\d+\..*"),
)
"""In about the order of their sizes."""
