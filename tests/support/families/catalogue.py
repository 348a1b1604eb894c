"""The families that people serve, each as a model of two layers with random weights.

A family is a configuration class of Transformers, made small: `SIZE` and `VISION` replace what a class has of these
keys, `text`, `vision` and `values` what is particular to a family. Names of tensors are those that Transformers saves,
which are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCAB = 512

SIZE: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "sliding_window": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": None,
    "mlp_layer_types": None,
}
VISION: Mapping[str, Any] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "patch_size": 4,
    "image_size": 16,
    "out_hidden_size": 256,
    "deepstack_visual_indexes": [],
    "fullatt_block_indexes": [0],
    "initializer_range": 0.1,
}


ABSENT = object()
"""Of a key that published repos do not have."""


@dataclass(frozen=True)
class Family:
    """An architecture.

    name     by which it is asked for
    config   class of Transformers; empty where Transformers has none
    values   of its config.json
    text     the same, of its `text_config`
    vision   the same, of its `vision_config`
    head     Auto class that makes the model
    renames  regex of names of tensors that Transformers saves → what published repos have there
    skipped  regex of modules that are left unquantized besides heads, routers and embeddings
    source_lacks  regex of tensors that Transformers saves and no published repo has
    published  keys of the published config.json that Transformers' own lacks and vLLM reads; a part's are merged in
    turned   experts are saved in one tensor, `[E, K, N]`
    turns    the same, of published repos alone: Transformers turns the stacks while it loads them
    scheme   `int4`, as GPTQModel writes it, `fp8` in blocks, or `mxfp4` experts, as gpt-oss has them
    dtype    in which vLLM is asked: its CPU code for gated delta nets takes bfloat16 alone
    engine   more arguments of vLLM's `LLM`
    mtp      name of a layer for multi-token prediction, made of the last layer's tensors
    image    how the model is asked with an image in Transformers: a key of `prompts.IMAGES`; empty: it takes none
    sees     the same in vLLM: a key of `processors.PROCESSORS`
    """

    name: str
    config: str
    values: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    head: str = "AutoModelForCausalLM"
    renames: Mapping[str, str] = field(default_factory=dict)
    skipped: str = "(?!)"
    source_lacks: str = "(?!)"
    published: Mapping[str, Any] = field(default_factory=dict)
    turned: bool = False
    turns: bool = False
    scheme: str = "int4"
    dtype: str = "float32"
    engine: Mapping[str, Any] = field(default_factory=dict)
    mtp: str = ""
    image: str = ""
    sees: str = ""


_SEES = "AutoModelForImageTextToText"
_MLA = {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
_LOCAL = {"layer_types": ["sliding_attention", "full_attention"]}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_SIGLIP = {r"vision_tower\.(?!vision_model)": "vision_tower.vision_model."}
_CONV = {"conv_dim": 256, "conv_dim_out": 256, "block_dim": 256}
_NEXTN = {"num_nextn_predict_layers": 1}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}}
_HALF = {"rope_type": "default", "partial_rotary_factor": 0.5}
_MIMO_THETAS = (("full_attention", 5e6), ("sliding_attention", 1e4))
_ERNIE_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [11, 11, 10]}}
_QWEN35_ROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    }
}

FAMILIES: tuple[Family, ...] = (
    Family("llama", "LlamaConfig"),
    Family("qwen2", "Qwen2Config"),
    Family("qwen3", "Qwen3Config"),
    Family("mistral", "MistralConfig", {"sliding_window": None}),
    Family("ministral3", "Ministral3Config", {"sliding_window": None}),
    Family("phi", "PhiConfig", {"num_key_value_heads": 4}),
    Family("phi3", "Phi3Config", {"sliding_window": None}),
    Family("glm4", "Glm4Config", {"attention_bias": True}),
    Family("gemma2", "Gemma2Config", {"query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    Family("gemma3_text", "Gemma3TextConfig", {"query_pre_attn_scalar": 64}),
    Family("granite", "GraniteConfig"),
    Family("hunyuan_v1_dense", "HunYuanDenseV1Config"),
    Family("qwen2_moe", "Qwen2MoeConfig"),
    Family("qwen3_moe", "Qwen3MoeConfig"),
    Family("mixtral", "MixtralConfig", {"sliding_window": None}),
    Family("olmoe", "OlmoeConfig"),
    Family(
        "phimoe",
        "PhimoeConfig",
        {"sliding_window": None, "attention_bias": True, "lm_head_bias": True},
        published={"architectures": ["PhiMoEForCausalLM"]},  # Transformers calls its class PhimoeForCausalLM
    ),
    Family("ernie4_5_moe", "Ernie4_5_MoeConfig", {"moe_layer_start_index": 1, "moe_layer_interval": 1}),
    Family("hunyuan_v1_moe", "HunYuanMoEV1Config"),
    Family("lfm2_moe", "Lfm2MoeConfig", {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
    Family("gpt_oss", "GptOssConfig", _LOCAL, turned=True, scheme="mxfp4"),
    Family("deepseek_v2", "DeepseekV2Config", {**_MLA, "topk_method": "greedy"}),
    Family(
        "deepseek_v3",
        "DeepseekV3Config",
        {**_MLA, **_NEXTN},
        published={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        mtp="model.layers.2",
    ),
    Family("deepseek_v32", "DeepseekV32Config", {**_MLA, "index_n_heads": 4, "index_head_dim": 128, "index_topk": 64}),
    Family(
        "deepseek_v4",
        "DeepseekV4Config",
        {"o_groups": 4, "o_lora_rank": 64, "head_dim": 512},
        renames={
            r"^model\.": "",
            r"^embed_tokens\.": "embed.",
            r"^hc_head\.hc_": "hc_head_",
            r"n\.norm\.": "n.kv_norm.",
        },
        published={
            "mlp_layer_types": ABSENT,
            "num_hash_layers": 2,
            "layer_types": ABSENT,
            "compress_ratios": [128, 128],
        }
        | {"qk_rope_head_dim": 64, "partial_rotary_factor": ABSENT, "expert_dtype": "fp8"},
    ),
    Family("glm4_moe", "Glm4MoeConfig", {**_NEXTN, "head_dim": 64}, mtp="model.layers.2"),
    Family(
        "glm4_moe_lite",
        "Glm4MoeLiteConfig",
        {**_MLA, **_NEXTN},
        published={"first_k_dense_replace": 1, "topk_method": "noaux_tc"},
        mtp="model.layers.2",
    ),
    Family("minimax_m2", "MiniMaxM2Config", {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True}),
    Family(  # whose scores vLLM has code for on CPUs
        "minimax_m2_softmax",
        "MiniMaxM2Config",
        {"rotary_dim": 32},
        source_lacks=r".*\.e_score_correction_bias",
        published={"scoring_func": "softmax", "use_routing_bias": False},
    ),
    Family("granitemoe", "GraniteMoeConfig", scheme="fp8"),
    Family("granitemoe_by_expert", "GraniteMoeConfig"),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64}
        | {"shared_intermediate_size": 256, "mamba_chunk_size": 64},
        skipped=r".*\.mamba\.in_proj",  # 1160 rows, which are no blocks
        scheme="fp8",
    ),
    Family(
        "mistral4",
        "Mistral3Config",
        text={"model_type": "mistral4", **_MLA, "head_dim": 128},
        head=_SEES,
        image="sizes",
    ),
    Family(
        "mimo_v2_flash",
        "MiMoV2FlashConfig",
        {"v_head_dim": 64, "sliding_window": 129, "layer_types": ["full_attention", "sliding_attention"]}
        | {"rope_parameters": {layer: {**_HALF, "rope_theta": theta} for layer, theta in _MIMO_THETAS}},
        published={"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layernorm_epsilon": 1e-5}
        | {"sliding_window_size": 128, "rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.5}
        | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 64, "swa_v_head_dim": 64}
        | {"add_swa_attention_sink_bias": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
    Family(
        "kimi_linear",
        "KimiLinearConfig",
        {**_MLA, **_HYBRID, **_SPARSE, "q_lora_rank": None, "linear_head_dim": 64, "linear_num_heads": 4}
        | {"num_experts_per_token": 2, "num_shared_experts": 1},
        dtype="bfloat16",
        engine={"enable_prefix_caching": False},  # vLLM turns it off itself on a CPU, and then refuses its block size
    ),
    Family(
        "longcat_flash",
        "LongcatFlashConfig",
        {**_MLA, "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 2, "expert_ffn_hidden_size": 128}
        | {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"}
        | {"ffn_hidden_size": 256, "num_layers": 2},
        source_lacks=r".*\.experts\.(8|9|1\d)\..*",  # rows of the experts that return their input
    ),
    Family(
        "muse_spark",
        "MuseSparkConfig",
        {"audio_config": {"model_type": "muse_spark_audio", "out_hidden_size": 256, "hidden_sizes": [32, 32, 32, 32]}}
        | {"out_hidden_size": 256, "projector_hidden_size": 64},
        {"moe_hidden_size": 256, "layer_rope_theta": [500000.0, 0.0], **_LOCAL},
        head=_SEES,
        image="muse",
    ),
    Family(
        "nemotron_h",
        "NemotronHConfig",
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 8, "n_groups": 1}
        | {"ssm_state_size": 64, "moe_shared_expert_intermediate_size": 128, "num_hidden_layers": 4, "chunk_size": 64},
    ),
    Family(
        "qwen3_next",
        "Qwen3NextConfig",
        {**_HYBRID, "partial_rotary_factor": 0.25},
        dtype="bfloat16",
        mtp="mtp.layers.0",
    ),
    Family(
        "falcon_h1",
        "FalconH1Config",
        {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 64},
    ),
    Family(
        "jamba",
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 16, "use_mamba_kernels": False},
    ),
    Family(
        "zamba2",
        "Zamba2Config",
        {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "num_key_value_heads": 4}
        | {"attention_hidden_size": 512, "attention_head_dim": 128, "mamba_headdim": 64, "chunk_size": 64}
        | {"use_mamba_kernels": False, "tie_word_embeddings": True},
    ),
    Family("lfm2", "Lfm2Config", {"layer_types": ["conv", "full_attention"], **_CONV}),
    Family(
        "qwen3_5",
        "Qwen3_5Config",
        text={**_HYBRID, **_QWEN35_ROPE},
        head=_SEES,
        dtype="bfloat16",
        mtp="mtp.layers.0",
        image="qwen",
        sees="qwen3",
    ),
    Family(
        "qwen3_5_moe",
        "Qwen3_5MoeConfig",
        text={**_HYBRID, **_QWEN35_ROPE},
        head=_SEES,
        dtype="bfloat16",
        mtp="mtp.layers.0",
        image="qwen",
        sees="qwen3",
    ),
    Family("qwen3_vl", "Qwen3VLConfig", text=_MROPE, head=_SEES, image="qwen", sees="qwen3"),
    Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeConfig",
        text={**_MROPE, "norm_topk_prob": True, "moe_intermediate_size": 64},
        head=_SEES,
        turns=True,
        image="qwen",
        sees="qwen3",
    ),
    Family("qwen2_5_vl", "Qwen2_5_VLConfig", text=_MROPE, head=_SEES, image="qwen", sees="qwen2_5"),
    Family(
        "gemma3",
        "Gemma3Config",
        {"mm_tokens_per_image": 4},
        {"query_pre_attn_scalar": 64},
        head=_SEES,
        renames=_SIGLIP,
        image="flat",
        sees="gemma3",
    ),
    Family(
        "gemma4",
        "Gemma4Config",
        {
            "vision_config": {"model_type": "gemma4_vision", **VISION, "num_key_value_heads": 2, "global_head_dim": 32}
            | {"default_output_length": 70}
        },
        text={**_LOCAL, "head_dim": 64, "enable_moe_block": True, "top_k_experts": 2, "per_layer_config": {}}
        | {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 64},
        head=_SEES,
        image="gemma4",
        sees="gemma4",
    ),
    Family("mistral3", "Mistral3Config", head=_SEES, image="sizes", sees="pixtral"),
    Family(
        "llama4",
        "Llama4Config",
        text={"num_experts_per_tok": 1, "intermediate_size_mlp": 256, "moe_layers": [0, 1]},
        vision={
            "intermediate_size": 256,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        head=_SEES,
        turned=True,
        image="pixels",
        sees="llama4",
    ),
    Family(
        "kimi_k25",
        "Kimi_K25Config",
        {"tie_word_embeddings": False, "projection_hidden_size": VISION["hidden_size"]},
        text=_MLA,
        # Transformers gives the names of the vision tower's blocks to all layers.
        renames={r"language_model\.model\.blocks\.": "language_model.model.layers.", r"^model\.mm_": "mm_"},
        published={"architectures": ["KimiK25ForConditionalGeneration"]}  # Transformers calls its class otherwise
        | {"text_config": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}},
        head=_SEES,
        image="kimi",
    ),
    Family(
        "step3p7",
        "Step3p7Config",
        text={**_SPARSE, "share_expert_dim": 128},
        vision={"mlp_ratio": 4.0},
        published={"projector_bias": False}
        | {
            "text_config": {"architectures": ["Step3p5ForCausalLM"], "num_attention_groups": 2, "moe_num_experts": 8}
            | {"moe_top_k": 2, "moe_layers_enum": "1", "use_moe": True, "use_head_wise_attn_gate": True}
            | {"norm_expert_weight": True, "moe_router_activation": "sigmoid", "moe_router_scaling_factor": 1.0}
            | {"rope_theta": 10000.0},
            "vision_config": {"width": 64, "layers": 1, "heads": 2, "output_dim": None, "use_cls_token": False}
            | {"use_ln_pre": True, "use_ln_post": False, "use_abs_posemb": True, "use_rope2d": True}
            | {"ls_init_value": 0.1, "pool_type": "none"},
        },
        head=_SEES,
        scheme="fp8",
        image="downsampled",
    ),
    Family(
        "lfm2_vl",
        "Lfm2VlConfig",
        text={"layer_types": ["conv", "full_attention"], **_CONV},
        vision={"vision_use_head": False},
        head=_SEES,
        renames=_SIGLIP,
        image="siglip2",
        sees="lfm2",
    ),
    Family("aria", "AriaConfig", {"projector_patch_to_query_dict": {16: 4}}, head=_SEES, image="pixels"),
    Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeConfig",
        text={**_SPARSE, "moe_intermediate_size": [128, 64], **_ERNIE_ROPE},
        head=_SEES,
    ),
    Family(
        "glm4v_moe",
        "Glm4vMoeConfig",
        text={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [4, 6, 6],
            }
        },
        published={"text_config": {"head_dim": 64, "use_qk_norm": False}},
        head=_SEES,
        image="qwen",
    ),
)
