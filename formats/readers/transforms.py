"""What a config says is computed beside the weights: rotations, smoothing, low-rank terms.

An online rotation leaves weights whose product with the plain activations is garbage, and nothing in the tensors shows
it. So keys are read the other way round: one that names a transform refuses the checkpoint unless it says none. Spelled

    rotation_config, hadamard_config, transform_config      AutoRound (auto_round/inference/convert_model.py)
    transform_config: {config_groups: ...}                  compressed-tensors (transform/transform_config.py)
    rotation                                                GPTQModel; online before down_proj (its pull request 2980)
    algo_config: [{name: rotation, r3, r4, online_...}]     Quark; r1 and r2 alone are folded into the weights
    online_rotations, spinquant_config, quarot, ...         forks of engines
    adapter                                                 GPTQModel's EoRA: a low-rank term beside the linear

and by the next producer in a way nobody here has seen: what is matched are words, not keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from xpuquant.errors import one_line, shown
from xpuquant.formats.checkpoint import Checkpoint

_WORDS = (
    r"rotat(?!ory)|hadamard|(?:^|_)had(?:_|$)|spin_?quant|quarot|(?:ost|flat|du|kurta)_?quant|transform(?!ers)|smooth"
    r"|svd|low_?rank|(?:^|_)(?:e?o?lora|eora|adapter|butterfly|householder|givens|kronecker)(?:_|$)"
)
_TRANSFORM = re.compile(_WORDS, re.I)

_OF_THE_MODEL = re.compile(
    r"(?:online_)?(?:rotations?|rotation_config|online_rotation\w*|hadamard\w*|transform_config|online_had\w*"
    r"|spin_?quant\w*|quarot\w*|flat_?quant\w*|ost_?quant\w*)",
    re.I,
)
"""Keys of config.json itself. Narrow: models have words of their own there."""

_HISTORY = frozenset({"meta", "producer", "export", "recipe"})
"""How the file was made, not what it means: `meta.weight_only.smooth` of GPTQModel chooses codes."""

_BY_MODULE = frozenset({"extra_config", "dynamic", "quantized_layers", "layer_quant_config", "layer_type_quant_config"})
"""Tables whose keys are names of modules."""

_NAMES = ("name", "algorithm", "type", "method")
_FOLDED = frozenset({"r1", "r2"})
"""Quark's rotations that are multiplied into weights and leave nothing to do (quark.docs.amd.com, RotationConfig)."""

_KNOWN = """
    quant_method method bits w_bit wbits group_size q_group_size sym symmetric zero_point desc_act static_groups
    act_group_aware damp_percent damp_auto_increment true_sequential mse gptaq foem lm_head quant_lm_head dynamic meta
    pack_dtype checkpoint_format format is_marlin_format model_name_or_path model_file_base_name version backend
    modules_to_not_convert modules_in_block_to_quantize module_name_preserved cache_block_outputs batch_size block_name
    dataset exllama_config use_exllama use_cuda_fp16 max_input_length model_seqlen pad_token_id tokenizer
    do_fuse fuse_max_seq_len modules_to_fuse
    packing_format autoround_version provider data_type scale_dtype act_bits act_data_type act_dynamic act_group_size
    act_sym act_scale_dtype super_bits super_group_size extra_config block_name_to_quantize to_quant_block_names
    enable_quanted_input enable_minmax_tuning enable_norm_bias_tuning low_gpu_mem_usage low_cpu_mem_usage iters lr
    minmax_lr nsamples seqlen gradient_accumulate_steps amp scheme seed sampler model_free supported_types
    regex_config layer_config quant_block_list static_attention_granularity static_kv_granularity static_attention_dtype
    static_kv_dtype supported_archs enable_torch_compile enable_deterministic_algorithms not_use_best_mse
    config_groups ignore ignored_layers quantization_status kv_cache_scheme sparsity_config moe_sparsity_config
    global_compression_ratio
    fmt activation_scheme activation_scale_ub weight_block_size scale_fmt ignored_modules dequantize
    quant_algo kv_cache_quant_algo exclude_modules has_zero_point pre_quant_scale quantized_layers producer
    global_quant_config exclude algo_config layer_quant_config layer_type_quant_config kv_cache_quant_config
    kv_cache_post_rope softmax_quant_spec quant_mode export log_severity_level
    mode biases
"""
"""Keys of quantization configs, by all producers, that say nothing of how activations are computed, or whose values are
looked at above or by a reader."""

KNOWN = frozenset(_KNOWN.split())


def online_transform(checkpoint: Checkpoint) -> str | None:
    """Why no module of a checkpoint can be converted: its config names arithmetic that no kernel here applies."""
    named = next(_named(checkpoint.quantization, ""), None)
    if named is None:
        named = next(_of_parts(checkpoint.config, ""), None)
    if named is None:
        return None
    return one_line(
        f"the config asks for '{named}', arithmetic beside the weights (an online rotation or the like) which no "
        "kernel here applies"
    )


def unknown_keys(checkpoint: Checkpoint) -> list[str]:
    """Notes on keys of the quantization config that nobody here has heard of."""
    unknown = [key for key in checkpoint.quantization if key not in KNOWN and not _TRANSFORM.search(key)]
    return [f"quantization config: {shown(key)} is not known here, and is ignored" for key in unknown]


def _of_parts(config: Mapping[str, Any], place: str) -> Iterator[str]:
    """Dotted keys of config.json and its parts that name a transform."""
    for key, value in config.items():
        if _OF_THE_MODEL.fullmatch(key) and not _is_none(value):
            yield f"{place}{key}"
        elif isinstance(value, Mapping) and key not in ("quantization_config", "compression_config"):
            yield from _of_parts(value, f"{place}{key}.")


def _named(table: Mapping[str, Any], place: str, by_module: bool = False) -> Iterator[str]:
    """Dotted keys that name a transform, at any depth."""
    for key, value in table.items():
        if not by_module and key in _HISTORY:
            continue
        here = f"{place}{key}"
        if not by_module and key != "pre_quant_scale" and _TRANSFORM.search(key):
            if not _is_none(value):
                yield here
            continue
        members = value if isinstance(value, list) else [value]
        for member in members:
            if not isinstance(member, Mapping):
                continue
            said = next((str(member[name]) for name in _NAMES if _TRANSFORM.search(str(member.get(name) or ""))), None)
            if said is None:
                yield from _named(member, f"{here}.", key in _BY_MODULE)
            elif not _is_folded(said, member):
                yield f"{here}: {said}"


def _is_folded(said: str, entry: Mapping[str, Any]) -> bool:
    """Whether one of Quark's algorithms leaves nothing to compute: smoothing, and rotations of weights alone."""
    if "smooth" in said.lower():
        return True
    steps = {key for key, value in entry.items() if re.fullmatch(r"r\d+", key) and value}
    return steps <= _FOLDED and not any("online" in key and not _is_none(value) for key, value in entry.items())


def _is_none(value: Any) -> bool:
    """Whether a value says that there is none of it: empty, or a table of such."""
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return all(not member or str(member).lower() in ("none", "null", "identity", "false") for member in members)
