"""A family's tiny model, and it quantized: a source as producers write it, and its dequantized twin."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.families.catalogue import ABSENT, SIZE, VISION, VOCAB, Family
from support.families.processors import write_processor
from support.packers import pack_tensor


def config_of(family: Family) -> Any:
    """The family's configuration, small."""
    import transformers

    kind = getattr(transformers, family.config)
    default = kind()
    values = _sizes(default, SIZE) | dict(family.values)
    for part, sizes, more in (("text_config", SIZE, family.text), ("vision_config", VISION, family.vision)):
        inner = getattr(default, part, None)
        if inner is None:
            continue
        if "model_type" in more:
            inner = transformers.AutoConfig.for_model(more["model_type"])
        values[part] = {"model_type": inner.model_type, **_sizes(inner, sizes), **more}
    if "text_config" in values:
        for key in [key for key in values if key in SIZE and "token" not in key and key not in family.values]:
            del values[key]
    free = iter(range(VOCAB - 1, 0, -1))
    for holder in (default, getattr(default, "text_config", None)):
        for key, value in (vars(holder) if holder is not None else {}).items():
            if key.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB:
                target = values if holder is default else values["text_config"]
                target.setdefault(key, next(free))
    return kind(**values)


def _sizes(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a configuration has and lets be set."""
    stored = config.to_dict()
    mapped = type(config).attribute_map
    return {key: value for key, value in sizes.items() if key in stored or (mapped.get(key) in stored and value)}


def tiny(family: Family) -> Any:
    """The model, in bfloat16."""
    import transformers

    config = config_of(family)
    torch.manual_seed(7)
    model = getattr(transformers, family.head).from_config(config, dtype=torch.bfloat16)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param, std=0.05)
    for param in model.parameters():
        if param.ndim > 1 and not param.any():  # a projection of nothing but zeros would hide the image behind it
            torch.nn.init.normal_(param, std=0.05)
    return model.eval()


GROUP = 64
BLOCK = 128
_NEVER = re.compile(
    r".*(embed|wte|router|conv|norm|visual|vision|vit_|projector|patch|pos_emb|sinks|bias|audio|classifier|compressor)"
    r"|(.*\.)?(lm_head|head|gate|wg|shared_expert_gate|A_log|D|g_proj|weights_proj|in_proj_[ab]|in_proj_ba|in_proj_a|"
    r"x_proj|dt_proj|f_[ab]_proj|b_proj|g_[ab]_proj|per_layer_\w+|hc_\w+|ape|tid2eid)$"
)
"""Modules that no producer quantizes, by a part of their name or the whole of its last; and the narrow ones, whose
sizes no group divides."""
_STACKED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "input_linear": ("input_linear",),
    "output_linear": ("output_linear",),
}
_IN_STACKS = {
    "int4": tuple(_STACKED),
    "mxfp4": ("gate_up_proj", "down_proj"),
    "fp8": ("gate_proj", "up_proj", "down_proj", "input_linear", "output_linear"),
}
"""Tensors of all experts that are quantized in each scheme."""
_CONFIGS: dict[str, dict[str, Any]] = {
    "int4": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Twins:
    """`source` is quantized; `plain` holds the same values in bfloat16, exactly: every scale is a power of two."""

    source: Path
    plain: Path
    quantized: tuple[str, ...]


def write(folder: Path, family: Family, experts: bool = True) -> Twins:
    """The family's model twice. `experts`: whether those are quantized too."""
    source, plain = folder / "source", folder / "plain"
    tiny(family).save_pretrained(plain, max_shard_size="1GB")
    _publish(plain / "config.json", family.published)
    if family.sees:
        write_processor(plain, family.sees)
    tensors = {published_name(family, name): t for name, t in load_file(plain / "model.safetensors").items()}
    if family.mtp:
        tensors |= dict(_nextn(tensors, family.mtp))
    stored: Tensors = {}
    quantized: list[str] = []
    for name, tensor in list(tensors.items()):
        module = name.removesuffix(".weight")
        is_expert = re.search(r"\.experts\.|block_sparse_moe|\.moe\.", name) is not None
        if re.fullmatch(family.source_lacks, name):  # still in the twin, without which Transformers would not load it
            continue
        if _NEVER.match(module) or re.fullmatch(family.skipped, module) or (is_expert and not experts):
            stored[name] = tensor
        elif tensor.ndim == 2 and name.endswith(".weight") and family.scheme != "mxfp4":
            packed, tensors[name] = _PACK[family.scheme](tensor)
            stored |= {f"{module}.{suffix}": part for suffix, part in packed.items()}
            quantized.append(module)
        elif tensor.ndim == 3 and module.rpartition(".")[2] in _IN_STACKS[family.scheme]:
            stored |= _stack(module, name, tensors, family)
            quantized.append(module)
        else:
            stored[name] = tensor
    source.mkdir()
    if family.source_lacks != Family.source_lacks:
        _without(family.source_lacks, tensors, plain, folder / "published")
    if family.turns:
        tensors = {n: t.transpose(1, 2) if t.ndim == 3 and ".experts." in n else t for n, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, plain / "model.safetensors", {"format": "pt"})
    save_file({name: t.contiguous() for name, t in stored.items()}, source / "model.safetensors", {"format": "pt"})
    for path in plain.glob("*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": _CONFIGS[family.scheme]}))
    return Twins(source, plain, tuple(quantized))


def published_name(family: Family, name: str) -> str:
    """What published repos call a tensor that Transformers saves under `name`."""
    for pattern, published in family.renames.items():
        name = re.sub(pattern, published, name)
    return name


def _without(pattern: str, tensors: Tensors, plain: Path, folder: Path) -> None:
    """A third model: the twin as it would be published, for loaders that stumble over what Transformers adds."""
    shutil.copytree(plain, folder)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if not re.fullmatch(pattern, name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def _publish(path: Path, keys: Mapping[str, Any]) -> None:
    """Add keys to a config.json, those of a part to that part."""
    config = json.loads(path.read_text())
    for key, value in keys.items():
        config[key] = {**config[key], **value} if isinstance(value, Mapping) and key in config else value
        if value is ABSENT:
            del config[key]
    path.write_text(json.dumps(config, indent=1))


def _nextn(tensors: Tensors, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A layer for multi-token prediction: a copy of the last one, and what joins it with the embeddings."""
    last = max((n.partition(".layers.1.")[0] for n in tensors if ".layers.1." in n and "vis" not in n), key=len)
    prefix = f"{last}.layers.1."
    for other, tensor in tensors.items():
        if other.startswith(prefix):
            yield f"{name}.{other.removeprefix(prefix)}", tensor.clone()
    H = next(t.shape[1] for n, t in tensors.items() if n.endswith("embed_tokens.weight"))
    outer = name.partition(".layers.")[0] if name.startswith("mtp") else name
    joined, norms = ("fc", "pre_fc_norm_embedding") if name.startswith("mtp") else ("eh_proj", "enorm")
    yield f"{outer}.{joined}.weight", torch.eye(H, 2 * H, dtype=torch.bfloat16)
    for norm in (norms, norms.replace("embedding", "hidden").replace("enorm", "hnorm")):
        yield f"{outer}.{norm}.weight", torch.ones(H, dtype=torch.bfloat16)
    if name.startswith("mtp"):
        yield "mtp.norm.weight", torch.ones(H, dtype=torch.bfloat16)
    else:
        yield f"{name}.shared_head.norm.weight", torch.ones(H, dtype=torch.bfloat16)


def _stack(module: str, name: str, tensors: Tensors, family: Family) -> Tensors:
    """A 3-D tensor of experts: for int4 expert by expert, as producers name them; else as one stack."""
    whole = tensors[name]
    upright = whole.transpose(1, 2) if family.turned else whole
    stack, _, part = module.rpartition(".")
    if part.endswith("_linear"):  # AutoRound takes Granite's stack apart, and keeps its names
        stack += ".experts"
    stored: dict[str, list[torch.Tensor]] = {}
    values = []
    for expert, matrix in enumerate(upright):
        roles = _STACKED[part] if family.scheme == "int4" else ("",)
        rows = []
        for role, member in zip(roles, matrix.chunk(len(roles)), strict=True):
            packed, exact = _PACK[family.scheme](member)
            rows.append(exact)
            for suffix, tensor in packed.items():
                own = f"{stack}.{expert}.{role}.{suffix}" if role else f"{module}.{suffix}"
                own = f"{module}_{suffix}" if family.scheme == "mxfp4" else own
                stored.setdefault(own, []).append(tensor)
        values.append(torch.cat(rows))
    exact = torch.stack(values)
    tensors[name] = (exact.transpose(1, 2) if family.turned else exact).contiguous()
    return {own: parts[0] if family.scheme == "int4" else torch.stack(parts) for own, parts in stored.items()}


def _power(groups: torch.Tensor, largest: float) -> torch.Tensor:
    """The smallest power of two with which the largest value of each group is at most `largest`."""
    return torch.exp2(torch.ceil(torch.log2(groups.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / largest)))


def int4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """GPTQ's tensors of a matrix `[N, K]`, and its values."""
    N, K = weight.shape
    size = GROUP if K % GROUP == 0 else 32
    groups = weight.float().reshape(N, -1, size)
    scale = _power(groups, 7)
    codes = (groups / scale).round().clamp(-8, 7)
    nibbles = (codes + 8).reshape(N, K).to(torch.uint8)
    packed = {
        "qweight": pack_tensor(nibbles).view(torch.int32).t().contiguous(),
        "qzeros": torch.full((K // size, N // 8), 0x88888888 - (1 << 32), dtype=torch.int32),
        "scales": scale.squeeze(-1).t().contiguous().half(),
        "g_idx": torch.arange(K, dtype=torch.int32) // size,
    }
    return packed, (codes * scale).reshape(N, K).bfloat16()


def fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP8 in blocks, the last ones as wide as the matrix leaves them."""
    N, K = weight.shape
    padded = torch.zeros(-(-N // BLOCK) * BLOCK, -(-K // BLOCK) * BLOCK)
    padded[:N, :K] = weight.float()
    blocks = padded.reshape(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK).transpose(1, 2)
    scale = _power(blocks.flatten(2), 448).unsqueeze(-1)
    codes = (blocks / scale).to(torch.float8_e4m3fn)
    back = lambda b: b.transpose(1, 2).reshape(padded.shape)[:N, :K].contiguous()  # noqa: E731
    values = back(codes.float() * scale).bfloat16()
    return {"weight": back(codes), "weight_scale_inv": scale[..., 0, 0].contiguous()}, values


def mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """gpt-oss's tensors of an expert."""
    N, K = weight.shape
    groups = weight.float().reshape(N, -1, 32)
    scale = _power(groups, 6)
    code = ((groups / scale).abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    values = E2M1[code] * groups.sign() * scale
    signed = (code | (groups < 0).long() << 3).reshape(N, K).to(torch.uint8)
    blocks = pack_tensor(signed).reshape(N, K // 32, 16)
    return {"blocks": blocks, "scales": (torch.log2(scale).squeeze(-1) + 127).to(torch.uint8)}, values.reshape(
        N, K
    ).bfloat16()


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_PACK = {"int4": int4, "fp8": fp8, "mxfp4": mxfp4}
