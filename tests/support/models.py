"""Tiny models in an XPU layout and, beside each, the dequantized model it must agree with.

Written without the converter, by the plainest code there is: every weight is rounded to nearest, packed
byte by byte as the contract says, and the values that the packed bytes mean go into the twin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.packers import pack_tensor
from xpuquant.formats.scheme import Scheme, to_config

VOCAB = 512
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """Two model folders: `converted` in the XPU layout, `plain` its dequantized twin (exact values, in float32)."""

    converted: Path
    plain: Path


def grouped(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.float().reshape(weight.shape[0], -1, size)


def int4(weight: torch.Tensor, scheme: Scheme) -> Packed:
    """Linear: qweight, scales, qzeros, g_idx. Act-order shuffles by N: q and k differ, gate and up agree."""
    N, K = weight.shape
    order = torch.arange(K)
    if scheme.act_order:
        order = torch.randperm(K, generator=torch.Generator().manual_seed(N))
    groups = grouped(weight[:, order], scheme.group_size)
    if scheme.symmetric:
        scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
        zero = torch.full_like(scale, 8.0).float()
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).bfloat16()
        zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (groups / scale.float() + zero).round().clamp(0, 15)
    values = ((codes - zero) * scale.float()).reshape(N, K)
    tensors = {
        "qweight": pack_tensor(codes.reshape(N, K).to(torch.uint8)).view(torch.int32),
        "scales": scale.squeeze(-1).t().contiguous(),
    }
    if not scheme.symmetric:
        tensors["qzeros"] = pack_tensor(zero.squeeze(-1).t().to(torch.uint8)).view(torch.int32)
    if scheme.act_order:
        tensors["g_idx"] = order.to(torch.int32)
    plain = torch.empty_like(values)
    plain[:, order] = values
    return tensors, plain


def int8(weight: torch.Tensor, scheme: Scheme) -> Packed:
    """Of each group the high nibbles, then the low ones; 16 times the scale, then the scale; zero points alike."""
    N, K = weight.shape
    order = torch.randperm(K, generator=torch.Generator().manual_seed(N)) if scheme.act_order else torch.arange(K)
    groups = grouped(weight[:, order], scheme.group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if scheme.symmetric:
        scale = (torch.maximum(high, -low) / 127).bfloat16()
        zero = torch.full_like(scale, 128.0).float()
    else:
        scale = ((high - low) / 255).bfloat16()
        zero = (-low / scale.float()).round().clamp(0, 255)
    codes = (groups / scale.float() + zero).round().clamp(0, 255)
    plain = torch.empty(N, K)
    plain[:, order] = ((codes - zero) * scale.float()).reshape(N, K)
    octets, zeros = codes.to(torch.uint8), zero.squeeze(-1).t().to(torch.uint8)
    by_turns = lambda high, low: torch.stack([high, low], 1).flatten(0, 1)  # noqa: E731
    scales = scale.squeeze(-1).t()
    tensors = {
        "qweight": pack_tensor(torch.stack([octets >> 4, octets & 15], 2).reshape(N, 2 * K)).view(torch.int32),
        "scales": by_turns(16 * scales, scales).contiguous(),
        "qzeros": pack_tensor(by_turns(zeros >> 4, zeros & 15)).view(torch.int32),
    }
    return tensors | ({"g_idx": order.to(torch.int32)} if scheme.act_order else {}), plain


def int4_expert(weight: torch.Tensor, scheme: Scheme) -> Packed:
    groups = grouped(weight, scheme.group_size)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
    codes = (groups / scale.float()).round().clamp(-8, 7)
    signed = pack_tensor((codes.reshape(weight.shape).to(torch.int8) & 15).to(torch.uint8))
    return {"": signed, "_scale": scale.squeeze(-1)}, (codes * scale.float()).reshape(weight.shape)


def ark_expert(weight: torch.Tensor, scheme: Scheme) -> Packed:
    """Rows of unsigned codes with true zero points, a byte each; signed bytes where symmetric."""
    top = 15 if scheme.layout == "uint4_experts" else 255
    groups = grouped(weight, scheme.group_size)
    if scheme.symmetric:
        scale = (groups.abs().amax(-1, keepdim=True) / (top // 2)).bfloat16()
        zero = torch.full_like(scale, top // 2 + 1).float()
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / top).bfloat16()
        zero = (-low / scale.float()).round().clamp(0, top)
    codes = (groups / scale.float() + zero).round().clamp(0, top)
    values = ((codes - zero) * scale.float()).reshape(weight.shape)
    stored = codes.reshape(weight.shape)
    if scheme.symmetric:
        return {"": (stored - 128).to(torch.int8), "_scale": scale.squeeze(-1)}, values
    octets = stored.to(torch.uint8)
    packed = pack_tensor(octets) if top == 15 else octets
    return {"": packed, "_scale": scale.squeeze(-1), "_zero_point": zero.squeeze(-1).to(torch.uint8)}, values


def _power(groups: torch.Tensor, largest: int) -> torch.Tensor:
    """E8M0 byte so that the group's largest value has the format's largest exponent (`largest`)."""
    return (torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-100))) - largest + 127).to(torch.uint8)


def mxfp4(weight: torch.Tensor, scheme: Scheme) -> Packed:
    groups = grouped(weight, 32)
    exponent = _power(groups, 2)
    scale = torch.exp2(exponent.float() - 127).unsqueeze(-1)
    code = (groups.abs().div(scale).unsqueeze(-1) - E2M1).abs().argmin(-1)
    values = E2M1[code] * groups.sign() * scale
    signed = (code | (groups < 0).long() << 3).reshape(weight.shape).to(torch.uint8)
    if scheme.experts:
        return {"": pack_tensor(signed), "_scale": exponent}, values.reshape(weight.shape)
    return {"weight": pack_tensor(signed), "weight_scale": exponent.t().contiguous()}, values.reshape(weight.shape)


def nvfp4(weight: torch.Tensor, scheme: Scheme) -> Packed:
    """Twice the E2M1 numbers: two planes of nibbles group by group, or bytes; scales as e4m3 gives them, halved."""
    twice, scale, number, values = _nvfp4(weight, scheme.divides)
    if scheme.experts:
        return {"": twice.flatten(1), "_scale": scale, "_global_scale": number}, values
    first = twice.clamp(-8, 7)
    planes = torch.stack([first, twice - first], 2).flatten(1) + 8
    tensors = {"qweight": pack_tensor(planes.to(torch.uint8)).view(torch.int32), "scales": scale.t().contiguous()}
    return tensors | {"global_scale": number}, values


def _nvfp4(weight: torch.Tensor, divides: bool) -> tuple[torch.Tensor, ...]:
    groups = grouped(weight, 16)
    overall = groups.abs().max() / (6 * 448)
    scale = (groups.abs().amax(-1) / 6 / overall).to(torch.float8_e4m3fn).float()
    code = (groups.abs().div((scale * overall).clamp(min=1e-30).unsqueeze(-1)).unsqueeze(-1) - E2M1).abs().argmin(-1)
    twice = (2 * E2M1[code] * groups.sign()).to(torch.int8)
    power = torch.exp2(torch.floor(torch.log2(overall)))
    number = (overall / power).reshape(1)  # 1 to 2
    if divides:
        number = 1 / number
    halved = (scale * power / 2).bfloat16()
    wide = twice.double() * halved.double().unsqueeze(-1)
    values = wide / number.double() if divides else wide * number.double()
    return twice, halved, number, values.float().reshape(weight.shape)


FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def mxfp8(weight: torch.Tensor, scheme: Scheme) -> Packed:
    groups = grouped(weight, 32)
    dtype = FP8[scheme.weight_dtype]
    largest = torch.finfo(dtype).max
    exponent = _power(groups, 8 if dtype is torch.float8_e4m3fn else 15)
    scale = torch.exp2(exponent.float() - 127).unsqueeze(-1)
    stored = (groups / scale).clamp(-largest, largest).to(dtype)
    values = (stored.float() * scale).reshape(weight.shape)
    stored = stored.reshape(weight.shape)
    if scheme.experts:
        return {"": stored.t().contiguous(), "_scale": exponent}, values
    return {"weight": stored, "weight_scale": exponent.t().contiguous()}, values


def fp8(weight: torch.Tensor, scheme: Scheme) -> Packed:
    wide = weight.float()
    dtype = FP8[scheme.weight_dtype]
    largest = torch.finfo(dtype).max
    N, K = wide.shape
    if scheme.granularity == "block":
        blocks = wide.reshape(N // scheme.block_n, scheme.block_n, K // scheme.group_size, scheme.group_size)
        scale = blocks.abs().amax((1, 3)) / largest
        spread = scale[:, None, :, None].expand_as(blocks).reshape(N, K)
        stored_scale = scale.t().contiguous()
    elif scheme.granularity == "group":
        stored_scale = (grouped(wide, scheme.group_size).abs().amax(-1) / largest).bfloat16()
        spread = stored_scale.float().repeat_interleave(scheme.group_size, dim=1)
    elif scheme.granularity == "channel":
        stored_scale = wide.abs().amax(1) / largest
        spread = stored_scale[:, None]
    else:
        stored_scale = (wide.abs().amax() / largest).reshape(1)
        spread = stored_scale
    stored = (wide / spread).clamp(-largest, largest).to(dtype)
    values = stored.float() * spread
    if scheme.experts:
        rows = stored if scheme.layout == "fp8_channel_experts" else stored.t().contiguous()
        return {"": rows, "_scale": stored_scale}, values
    tensors = {"weight": stored, "weight_scale": stored_scale}
    return tensors | ({"input_scale": torch.tensor([0.5])} if scheme.input_scale else {}), values


PACK: dict[str, Callable[[torch.Tensor, Scheme], Packed]] = {
    "int4_linear": int4,
    "int8_linear": int8,
    "int4_experts": int4_expert,
    "uint4_experts": ark_expert,
    "int8_experts": ark_expert,
    "mxfp4_linear": mxfp4,
    "mxfp4_experts": mxfp4,
    "mxfp8_linear": mxfp8,
    "mxfp8_experts": mxfp8,
    "nvfp4_linear": nvfp4,
    "nvfp4_experts": nvfp4,
    "fp8_linear": fp8,
    "fp8_experts": fp8,
    "fp8_channel_experts": fp8,
}

SCHEMES: dict[str, Scheme] = {
    "int4": Scheme("int4_linear", group_size=32),
    "int4-asym": Scheme("int4_linear", group_size=64, symmetric=False),
    "int4-channel": Scheme("int4_linear", group_size=-1),
    "int4-act-order": Scheme("int4_linear", group_size=32, act_order=True),
    "int4-act-order-asym": Scheme("int4_linear", group_size=32, act_order=True, symmetric=False),
    "int8": Scheme("int8_linear", group_size=32),
    "int8-asym": Scheme("int8_linear", group_size=64, symmetric=False),
    "int8-act-order": Scheme("int8_linear", group_size=32, act_order=True),
    "fp8-tensor": Scheme("fp8_linear", granularity="tensor", scale_dtype="F32", input_scale=True),
    "fp8-channel": Scheme("fp8_linear", granularity="channel", scale_dtype="F32"),
    "fp8-block": Scheme("fp8_linear", granularity="block", group_size=128, block_n=128, scale_dtype="F32"),
    "mxfp4": Scheme("mxfp4_linear", group_size=32, scale_dtype="U8"),
    "mxfp8": Scheme("mxfp8_linear", group_size=32, scale_dtype="U8"),
    "nvfp4": Scheme("nvfp4_linear", group_size=16, divides=True),
    "nvfp4-factor": Scheme("nvfp4_linear", group_size=16),
    "fp8-e5m2": Scheme("fp8_linear", granularity="channel", scale_dtype="F32", weight_dtype="F8_E5M2"),
    "mxfp8-e5m2": Scheme("mxfp8_linear", group_size=32, scale_dtype="U8", weight_dtype="F8_E5M2"),
}
EXPERTS: dict[str, Scheme] = {
    "int4": Scheme("int4_experts", group_size=32),
    "uint4": Scheme("uint4_experts", group_size=32, symmetric=False),
    "int8": Scheme("int8_experts", group_size=32),
    "int8-asym": Scheme("int8_experts", group_size=64, symmetric=False),
    "fp8-tensor": Scheme("fp8_experts", granularity="tensor", scale_dtype="F32"),
    "fp8-block": Scheme("fp8_experts", granularity="block", group_size=128, block_n=128, scale_dtype="F32"),
    "fp8-channel": Scheme("fp8_channel_experts", granularity="channel", scale_dtype="F32"),
    "fp8-group": Scheme("fp8_channel_experts", group_size=32),
    "mxfp4": Scheme("mxfp4_experts", group_size=32, scale_dtype="U8"),
    "mxfp8": Scheme("mxfp8_experts", group_size=32, scale_dtype="U8"),
    "nvfp4": Scheme("nvfp4_experts", group_size=16, divides=True),
    "nvfp4-factor": Scheme("nvfp4_experts", group_size=16),
    "fp8-e5m2": Scheme("fp8_experts", granularity="tensor", scale_dtype="F32", weight_dtype="F8_E5M2"),
    "mxfp8-e5m2": Scheme("mxfp8_experts", group_size=32, scale_dtype="U8", weight_dtype="F8_E5M2"),
}


def pack_matrices(matrices: list[torch.Tensor], scheme: Scheme) -> Packed:
    """Gate and up of an expert, or down alone, as the stack has them: each with a global scale of its own."""
    if scheme.layout != "nvfp4_experts":
        return PACK[scheme.layout](torch.cat(matrices), scheme)
    packed = [PACK[scheme.layout](matrix, scheme) for matrix in matrices]
    tensors = {end: torch.cat([tensors[end] for tensors, _ in packed]) for end in packed[0][0]}
    return tensors, torch.cat([values for _, values in packed])


FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "qwen3_moe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
)
MOE = FAMILIES[4:]


def tiny(family: str, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Any:
    """Two layers, hidden 256, random weights wide enough that greedy tokens are not near-ties."""
    import transformers

    size = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    moe = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
    mla = {
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    special: dict[str, dict[str, Any]] = {
        "qwen2": {"attn_implementation": "eager"},
        "qwen3": {"head_dim": 64},
        "qwen3_moe": {"head_dim": 64, "num_experts": 8, "decoder_sparse_step": 1, **moe},
        "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
        "deepseek_v2": {**moe, **mla, "topk_method": "greedy"},
        "deepseek_v3": {**moe, **mla, "topk_method": "noaux_tc"},
        # Experts without a gate.
        "nemotron_h": {
            "head_dim": 64,
            "layers_block_type": ["mamba", "moe", "full_attention", "moe"],
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 128,
            "mamba_num_heads": 4,
            "mamba_head_dim": 64,
            "ssm_state_size": 16,
            "mamba_n_groups": 1,
            **moe,
        },
        "gpt_oss": {
            "head_dim": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    }
    config = transformers.AutoConfig.for_model(family, **{**size, **special.get(family, {}), **changes})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param, std=0.05)
    return model


def write(
    folder: Path,
    family: str,
    scheme: Scheme | Sequence[Scheme],
    experts: Scheme | Sequence[Scheme] | None = None,
    others: Mapping[str, Scheme | None] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **changes: object,
) -> Pair:
    """A tiny model of `family` with every linear in `scheme` and every stack of experts in `experts`.

    Several schemes: one for each layer, of which there are as many.
    `others`: last part of a linear's name → another scheme, or None for unquantized.
    `dtype`: of what is not quantized. `changes`: to the model's config.

    Routers and embeddings stay as they are, and `lm_head` unless `others` names it. Scheme fields that depend on
    the module (interleaving, biases, a group as long as K) are filled in.
    """
    pair = Pair(folder / "converted", folder / "plain")
    several = [schemes for schemes in (scheme, experts) if isinstance(schemes, Sequence)]
    if several:
        changes["num_hidden_layers"] = len(several[0])
    model = tiny(family, dtype, **changes)
    model.save_pretrained(pair.plain)
    saved = load_file(pair.plain / "model.safetensors")
    plain = {name: tensor.float() for name, tensor in saved.items()}
    converted: dict[str, torch.Tensor] = {}
    modules: dict[str, Scheme] = {}
    stacks: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in list(plain.items()):
        if experts is not None and ".experts." in name:
            stack, _, part = name.partition(".experts.")
            stacks.setdefault(f"{stack}.experts", {})[part] = tensor
        elif _is_linear(name, tensor) or name.removesuffix(".weight") in (others or {}):
            module = name.removesuffix(".weight")
            own = (others or {}).get(module.rpartition(".")[2], _of_layer(scheme, module))
            if own is None:
                converted[name] = saved[name]
                continue
            modules[module] = own if own.group_size >= 0 else _whole(own, tensor)
            tensors, values = PACK[own.layout](tensor, modules[module])
            converted |= {f"{module}.{suffix}": t for suffix, t in tensors.items()}
            plain[name] = values
        else:
            converted[name] = saved[name]  # some routers are float32 in a bfloat16 model
    for stack, parts in stacks.items():
        assert experts is not None
        modules[stack] = _pack_stack(stack, parts, _of_layer(experts, stack), plain, converted)
    _save(pair.plain, plain, None)
    _save(pair.converted, converted, to_config(modules, "tests"))
    for path in pair.plain.iterdir():
        if not (pair.converted / path.name).exists():
            (pair.converted / path.name).write_bytes(path.read_bytes())
    return pair


def _of_layer(schemes: Scheme | Sequence[Scheme], module: str) -> Scheme:
    if isinstance(schemes, Scheme):
        return schemes
    found = re.search(r"\.layers\.(\d+)\.", module)
    assert found is not None, module
    return schemes[int(found[1])]


def _is_linear(name: str, tensor: torch.Tensor) -> bool:
    skipped = ("lm_head", "embed", "norm", "gate.weight", "router", "sinks", "shared_expert_gate")
    return name.endswith("weight") and tensor.ndim == 2 and not any(word in name for word in skipped)


def _whole(scheme: Scheme, weight: torch.Tensor) -> Scheme:
    from dataclasses import replace

    return replace(scheme, group_size=weight.shape[1])


def _pack_stack(
    stack: str,
    parts: dict[str, torch.Tensor],
    scheme: Scheme,
    plain: dict[str, torch.Tensor],
    converted: dict[str, torch.Tensor],
) -> Scheme:
    """Packs one layer's experts and writes their values back where they came from."""
    from dataclasses import replace

    fused = "gate_up_proj" in parts  # gpt-oss: [E, H, 2I], gate and up interleaved, biases
    if fused:
        E = parts["gate_up_proj"].shape[0]
        scheme = replace(scheme, interleaved=True, bias=True)
    else:
        E = 1 + max(int(part.split(".")[0]) for part in parts)
    names: tuple[str, ...] = ("w1", "w3", "w2") if "0.w1.weight" in parts else ("gate_proj", "up_proj", "down_proj")
    if not fused and f"0.{names[0]}.weight" not in parts:
        scheme, names = replace(scheme, gated=False), names[1:]
    gathered: dict[str, list[torch.Tensor]] = {}
    for e in range(E):
        for out, sources in zip(scheme.stacks, (names[:-1], names[-1:]), strict=True):
            matrices = [parts[out][e].t()] if fused else [parts[f"{e}.{source}.weight"] for source in sources]
            tensors, values = pack_matrices(matrices, scheme)
            for suffix, tensor in tensors.items():
                gathered.setdefault(out + suffix, []).append(tensor)
            if fused:
                plain[f"{stack}.{out}"][e] = values.t()
                continue
            for source, part in zip(sources, values.chunk(len(sources)), strict=True):
                plain[f"{stack}.{e}.{source}.weight"] = part
    for name, tensors_of in gathered.items():
        stacked = torch.stack(tensors_of)
        scalars = stacked.shape == (E, 1) and not name.endswith("_global_scale")
        converted[f"{stack}.{name}"] = stacked.reshape(E) if scalars else stacked
    for name in ("gate_up_proj_bias", "down_proj_bias") if fused else ():
        converted[f"{stack}.{name}"] = parts[name].bfloat16()
    return scheme


def _save(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, object] | None) -> None:
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    if quantization is not None:
        config = json.loads((folder.parent / "plain" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
