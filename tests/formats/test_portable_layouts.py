"""`--layout compressed-tensors`: standard checkpoints, read by the libraries that stock loaders use.

Three readers that know nothing of this tool: the compressed-tensors library, whose decoding must have the digests that
the producers' own libraries gave for the source; Transformers with it, which must compute what the dequantized source
computes; and this tool's own reader of sources, by which an output converts to the XPU layout like its source.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import FIXTURES, oracles
from support.ints import Pico, ct_config, gptq, gptq_config, ints, pack_quantized

import xpuquant
from xpuquant.conversion.cli.app import run
from xpuquant.formats.layouts.compressed_tensors.config import CtScheme, scheme_of, to_ct_config
from xpuquant.formats.safetensors import Tensor

REFUSED = {
    "autoround-0.15-qwen3-w3g32-asym-v1": "3-bit packer spoils",
    "gptqmodel-qwen3-w4g32-actorder": "act-order, which compressed-tensors 0.19",
    "llmcompressor-0.9-llama-w4a16-actorder": "act-order, which compressed-tensors 0.19",
    "llmcompressor-llama-nvfp4a16": "its tensors are those of compressed-tensors' nvfp4-pack-quantized already",
    "llmcompressor-qwen3moe-nvfp4a16": "its tensors are those of compressed-tensors' nvfp4-pack-quantized already",
    "modelopt-llama-nvfp4": "few factors over all have an exact float32 divisor, which compressed-tensors wants",
    "modelopt-llama4-nvfp4": "few factors over all have an exact float32 divisor, which compressed-tensors wants",
    "llmcompressor-llama-w8a8": "W8A8 is a compressed-tensors checkpoint already, which stock loaders read",
}
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json") if path.parent.name not in REFUSED)


def convert(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """Convert and verify; the output's quantization_config."""
    assert run(["convert", str(source), str(out), "--layout", "compressed-tensors", "--jobs", "1", *options]) == 0
    config: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize("name", NAMES)
def test_the_library_decodes_what_the_producer_meant(name: str, tmp_path: Path) -> None:
    config = convert(FIXTURES / name, tmp_path / "out")
    verdict = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert verdict["passed"] is True
    assert run(["verify", str(tmp_path / "out"), "--backend", "reference"]) == 0, "by its own records"
    decoded = by_library(tmp_path / "out", config)
    assert decoded, "the library saw no quantized module"
    wanted = dict(oracles().get(name, {}))
    if "gptoss" in name:
        assert set(decoded) >= {
            "model.layers.0.mlp.experts.0.gate_proj",
            "model.layers.0.mlp.experts.0.down_proj",
        }
        wanted = alternating(name, decoded, wanted)
    assert set(decoded) == set(wanted)
    for module, (values, codes) in decoded.items():
        assert sha256(values) == wanted[module]["values_sha256"], module
        if codes is not None:
            assert sha256(codes) == wanted[module]["ints_sha256"], module


@pytest.mark.parametrize("name", NAMES)
def test_plans_name_the_kernel_of_experts(name: str) -> None:
    """By vLLM's own loader: each expert has tensors of its own, and a grouped kernel reads all of them,
    but for asymmetric ones and 8 bits, which it has no path for."""
    modules = xpuquant.plan(FIXTURES / name, layout="compressed-tensors").modules
    assert modules
    for module in modules:
        assert module.kernel is not None and module.scheme is not None
        is_expert = re.search(r"\.experts\.[0-9]+\.", module.name) is not None
        has_no_path = module.scheme.startswith("pack-quantized") and "asym" in module.scheme
        wanted = ("none: " if has_no_path else "grouped GEMM ") if is_expert else ("int4_gemm", "fp8_gemm", "fp4_gemm")
        if module.scheme.startswith("pack-quantized int8"):
            wanted = "none: "
        assert module.kernel.startswith(wanted), (module.name, module.scheme, module.kernel)


def by_library(folder: Path, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """module → (float32 values, int16 codes minus zero points or None), by compressed-tensors itself."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name
    from safetensors.torch import load_file as load_torch

    groups = list(QuantizationConfig.model_validate(config).config_groups.values())
    modules: dict[str, dict[str, Any]] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_torch(shard).items():
            module, _, suffix = name.rpartition(".")
            modules.setdefault(module, {})[suffix] = tensor
    found = {}
    for module, parts in modules.items():
        if "weight_scale" not in parts:
            continue
        exact = [g for g in groups if any(t != "Linear" and match_name(module, t) for t in g.targets)]
        scheme = (exact or [g for g in groups if "Linear" in g.targets])[0]
        compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
        scale = parts["weight_scale"]
        wide = scale if scale.dtype == torch.uint8 else scale.float()
        values = compressor.decompress({**parts, "weight_scale": wide}, scheme)["weight"].float() + 0.0
        ints = None
        if scheme.weights.type == "int":
            ones = {**parts, "weight_scale": torch.ones_like(wide)}
            ints = compressor.decompress(ones, scheme)["weight"].to(torch.int16).numpy()
        found[module] = (values.numpy(), ints)
    return found


def alternating(name: str, decoded: dict[str, tuple[Any, Any]], wanted: dict[str, Any]) -> dict[str, Any]:
    """gpt-oss: the oracle decoded gate and up as the file has them; put the output's rows back in that order."""
    merged: dict[str, Any] = {}
    stacks: dict[str, list[Any]] = {}
    for module, (values, _) in decoded.items():
        role = module.rpartition(".")[2]
        if role == "gate_proj" and module not in wanted:
            up_values, _ = decoded[module.replace("gate_proj", "up_proj")]
            rows = np.stack([values, up_values], 1).reshape(-1, values.shape[1])
            stacks.setdefault("gate_up_proj", []).append(rows)
        elif role == "down_proj" and module not in wanted:
            stacks.setdefault("down_proj", []).append(values)
    for role, experts in stacks.items():
        entry = next(entry for module, entry in wanted.items() if module.endswith(f"experts.{role}"))
        assert sha256(np.stack(experts)) == entry["values_sha256"], role
    for module, (values, codes) in decoded.items():
        gate = module.replace("up_proj", "gate_proj")
        up = module.replace("gate_proj", "up_proj")
        if name.startswith("llmcompressor-0.12") and gate in wanted and up in wanted and gate != up:
            # The file had halves of the alternating rows under these names.
            order = [np.stack([decoded[gate][i], decoded[up][i]], 1).reshape(-1, values.shape[1]) for i in (0, 1)]
            half = slice(0, len(values)) if module == gate else slice(len(values), None)
            assert sha256(order[0][half]) == wanted[module]["values_sha256"], module
            assert sha256(order[1][half]) == wanted[module]["ints_sha256"], module
        elif module in wanted:
            merged[module] = wanted[module]
            continue
        merged[module] = {
            "values_sha256": sha256(values),
            "ints_sha256": None if codes is None else sha256(codes),
        }
    return merged


def sha256(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["convert", str(FIXTURES / name), str(out), "--layout", "compressed-tensors"]) == 2
    error = capsys.readouterr().err
    assert REFUSED[name] in error
    assert error.count("\n") == 1
    assert not out.exists()


SOURCES_LIKE = [
    "autoround-qwen3-w4g32-asym-as-awq",
    "gptqmodel-qwen3-w3g32-asym",
    "gptqmodel-qwen3moe-w4g32",
    "llmcompressor-gptoss-w4a16",
    "llmcompressor-0.12-gptoss-w4a16",
    "handpacked-gptoss-mxfp4",
    "llmcompressor-qwen3moe-fp8-block",
    "llmcompressor-qwen3moe-fp8-tensor",
    "llmcompressor-llama-fp8-static",
    "llmcompressor-0.9-llama-mxfp4",
    "llmcompressor-llama-mxfp8",
]


@pytest.mark.parametrize("name", SOURCES_LIKE)
def test_converts_to_xpu_like_its_source(name: str, tmp_path: Path) -> None:
    convert(FIXTURES / name, tmp_path / "portable")
    for source, out in ((FIXTURES / name, "direct"), (tmp_path / "portable", "by way of")):
        assert run(["convert", str(source), str(tmp_path / out), "--jobs", "1"]) == 0
    direct, way = (tensors(tmp_path / out) for out in ("direct", "by way of"))
    assert direct == way


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """dtype, shape and digest of everything in a repo's shards."""
    found = {}
    for shard in folder.glob("*.safetensors"):
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + at for at in entry["data_offsets"])
                digest = hashlib.sha256(data[begin:end]).hexdigest()
                found[name] = (entry["dtype"], tuple(entry["shape"]), digest)
    return found


def test_packing_by_eye(tmp_path: Path) -> None:
    """Codes 0 .. 7 in a row; zero points 1 .. 8 in a column of rows; both come out in order."""
    N, K = 8, 32
    codes = np.tile(np.arange(8, dtype=np.uint32), (N, K // 8))
    qweight = np.zeros((K // 8, N), np.uint32)
    for k in range(K):
        qweight[k // 8] |= codes[:, k] << np.uint32(4 * (k % 8))
    source = tmp_path / "source"
    source.mkdir()
    arrays: dict[str, Any] = {
        "qweight": qweight.view(np.int32),
        "qzeros": np.array([[0x87654321]], np.uint32).view(np.int32),
        "scales": np.arange(1, 9, dtype=np.float16)[None],
        "g_idx": np.zeros(K, np.int32),
    }
    save_file({f"model.layers.0.mlp.up_proj.{s}": a for s, a in arrays.items()}, source / "model.safetensors")
    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "checkpoint_format": "gptq_v2",
        "sym": False,
    }
    config = {"model_type": "llama", "quantization_config": {**quantization, "desc_act": False}}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj."
    assert set(out) == {name + s for s in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")}
    assert (out[name + "weight_packed"].view(np.uint32) == 0x76543210).all()
    assert out[name + "weight_packed"].shape == (8, 4)
    assert out[name + "weight_zero_point"].view(np.uint32).tolist() == [[0x87654321]]
    assert out[name + "weight_scale"].tolist() == [[float(n)] for n in range(1, 9)]
    assert out[name + "weight_shape"].tolist() == [8, 32]
    assert out[name + "weight_shape"].dtype == np.int64


MORE_BITS = [
    # bits, whether symmetric, and whether zero points are stored
    (8, True, False),
    (8, False, True),
    (5, False, False),  # code minus zero point fits a byte
    (6, True, False),
    (7, False, False),
]


@pytest.mark.parametrize(("bits", "symmetric", "zeros"), MORE_BITS)
def test_more_than_4_bits_are_packed_as_8(bits: int, symmetric: bool, zeros: bool, tmp_path: Path) -> None:
    """N = 12: the last word of zero points is not whole."""
    name, weight = "model.layers.0.mlp.down_proj", ints(bits, 12, 64, symmetric=symmetric)
    packed = pack_quantized(weight, zeros="none" if symmetric else "packed")
    Pico(ct_config(bits, symmetric=symmetric), {name: packed}).write(tmp_path / "source")
    config = convert(tmp_path / "source", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored[f"{name}.weight_packed"].shape == (12, 16)
    assert (f"{name}.weight_zero_point" in stored) == zeros
    if bits == 8:
        assert np.array_equal(stored[f"{name}.weight_packed"].view(np.uint8), weight.codes)
        assert not zeros or stored[f"{name}.weight_zero_point"].shape == (3, 2)
    group = config["config_groups"]["group_0"]
    assert (group["format"], group["weights"]["num_bits"], group["weights"]["symmetric"]) == (
        *("pack-quantized", 8),
        not zeros,
    )
    values, codes = by_library(tmp_path / "out", config)[name]
    np.testing.assert_array_equal(values, weight.values.astype(np.float32))
    assert codes.shape == (12, 64)


def test_experts_of_4_and_8_bits_all_get_8(tmp_path: Path) -> None:
    """Engines take the experts of a layer in one scheme."""
    stack, made = "model.layers.0.mlp.experts.0", {}
    for seed, (role, bits) in enumerate((("gate", 4), ("up", 4), ("down", 8))):
        made[f"{stack}.{role}_proj"] = ints(bits, 64, 64, symmetric=role != "up", seed=seed)
    Pico(gptq_config(), {name: gptq(weight) for name, weight in made.items()}).write(tmp_path / "source")
    config = convert(tmp_path / "source", tmp_path / "out")
    assert len(config["config_groups"]) == 1 and config["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    for name, (values, _) in by_library(tmp_path / "out", config).items():
        np.testing.assert_array_equal(values, made[name].values.astype(np.float32))


def test_config_of_a_mixture_names_exactly_what_it_means(tmp_path: Path) -> None:
    """int4 attention with an fp8 MLP: two formats, each with its own targets, in a model that Transformers loads."""
    int4, fp8 = (FIXTURES / name for name in ("llmcompressor-llama-w4a16", "llmcompressor-llama-fp8-dynamic"))
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    source = tmp_path / "source"
    source.mkdir()
    parts = {n: t for n, t in load_torch(fp8 / "model.safetensors").items() if "self_attn" not in n}
    parts |= {n: t for n, t in load_torch(int4 / "model.safetensors").items() if "self_attn" in n}
    save_torch(parts, source / "model.safetensors", {"format": "pt"})
    config, other = (json.loads((folder / "config.json").read_text()) for folder in (int4, fp8))
    groups = [c["quantization_config"]["config_groups"]["group_0"] for c in (config, other)]
    groups[0]["targets"], groups[1]["targets"] = ["re:.*self_attn.*"], ["re:.*mlp.*"]
    config["quantization_config"]["config_groups"] = {"group_0": groups[0], "group_1": groups[1]}
    (source / "config.json").write_text(json.dumps(config))
    quantization = convert(source, tmp_path / "out")
    assert quantization["format"] == "mixed-precision"
    by_format = {group["format"]: group for group in quantization["config_groups"].values()}
    assert set(by_format) == {"pack-quantized", "float-quantized"}
    attention = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    assert sorted(by_format["pack-quantized"]["targets"]) == sorted(attention)
    assert by_format["float-quantized"]["input_activations"]["strategy"] == "token"
    model = load_transformers(tmp_path / "out", torch.float32)
    assert logits(model).abs().max() > 0


def test_config_of_experts_is_a_regex_that_matches_nothing_else() -> None:
    stack = "model.layers.{}.mlp.experts.{}.{}_proj"
    experts = [stack.format(layer, e, part) for layer in (1, 11) for e in range(3) for part in ("gate", "up", "down")]
    int4 = CtScheme("ct_int4", group_size=32)
    fp8 = CtScheme("ct_fp8", granularity="channel", activations="float8 token dynamic")
    schemes = dict.fromkeys(experts, int4)
    schemes |= {f"model.layers.{layer}.self_attn.q_proj": fp8 for layer in (1, 11)}
    # The same names under another root, of another scheme: a pattern must not reach them.
    schemes["mtp.layers.11.mlp.experts.0.up_proj"] = fp8
    config = to_ct_config(schemes, [Tensor("model.layers.1.mlp.gate.weight", "BF16", (3, 8), "", 0, 48)], {})
    assert config["ignore"] == ["model.layers.1.mlp.gate", "lm_head"]
    scale = {"weight_scale": Tensor("", "BF16", (1, 1), "", 0, 2)}
    for name, scheme in schemes.items():
        read = scheme_of(config, name, scale)
        assert (read.layout, read.activations) == (scheme.layout, scheme.activations), name
    targets = [t for g in config["config_groups"].values() for t in g["targets"]]
    assert any(t.startswith("re:") and "experts" in t for t in targets), "Transformers looks for one"
    for target in targets:
        if target.startswith("re:"):
            assert {n for n in schemes if re.match(target[3:], n)} <= set(experts)


def test_fused_mates_share_one_scheme(tmp_path: Path) -> None:
    """k_proj has groups of 64 where q and v have 32; engines fuse the three."""
    config = convert(FIXTURES / "gptqmodel-qwen3-w4g32-dynamic", tmp_path / "out")
    assert [g["targets"] for g in config["config_groups"].values()] == [["Linear", "lm_head"]]
    assert config["ignore"] == ["model.embed_tokens", "model.layers.0.self_attn.o_proj"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


def test_a_changed_bit_fails_verification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = FIXTURES / "gptqmodel-qwen3-w4g32-asym-v1", tmp_path / "out"
    convert(source, out)
    assert run(["verify", str(out), "--source", str(source)]) == 0
    assert run(["verify", str(out)]) == 0
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run(["verify", str(out), "--source", str(source)]) == 1
    assert "differ" in capsys.readouterr().out


def load_transformers(folder: Path, dtype: Any) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("compressed_tensors")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return model.eval()


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([[1, 17, 33, 50, 9, 4, 31, 8, 5, 5, 40, 12]])).logits


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "int4"), ("llama", "fp8-weights"), ("qwen3_moe", "int4"), ("mixtral", "int4")],
)
def test_transformers_computes_what_the_dequantized_source_computes(family: str, kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")
    from support.portable_models import write_source

    twins = write_source(tmp_path, family, kind)
    convert(twins.source, tmp_path / "out")
    # Transformers leaves experts in the dtype of their scales, whatever the model's: bf16 here.
    dtype = torch.float32 if family == "llama" else torch.bfloat16
    wanted = logits(load_transformers(twins.plain, dtype))
    assert wanted.abs().max() > 1
    torch.testing.assert_close(logits(load_transformers(tmp_path / "out", dtype)), wanted, atol=1e-4, rtol=0)


FUSED = {
    "blocks": ((2, 512, 128), (2, 4, 1), {"weight_block_size": [128, 128]}, False),
    "blocks, transposed": ((2, 128, 512), (2, 1, 4), {"weight_block_size": [128, 128]}, True),
    "per tensor": ((2, 512, 128), (2, 1, 1), {}, False),
    "per tensor, transposed": ((2, 128, 512), (2, 1, 1), {}, True),
    "per row": ((2, 512, 128), (2, 512, 1), {}, False),
}


def fused_source(folder: Path, shape: tuple[int, ...], scales: tuple[int, ...], keys: Any, model: str) -> Path:
    """Two experts with gate and up in one fp8 tensor; down_proj beside it is I x H, with one scale each."""
    import ml_dtypes

    rng = np.random.default_rng(5)
    E, inner = shape[0], max(shape[1:]) // 2
    hidden = min(shape[1:])
    down = (E, hidden, inner) if shape[1] > shape[2] else (E, inner, hidden)
    down_scales: tuple[int, ...] = (E, 1, 1)
    if keys:
        down_scales = (E, *(-(-side // 128) for side in down[1:]))
    experts = "model.layers.0.mlp.experts."
    arrays: dict[str, Any] = {
        f"{experts}gate_up_proj": (rng.integers(0, 256, shape, np.uint8) & 0xF7).view(ml_dtypes.float8_e4m3fn),
        f"{experts}gate_up_proj_scale_inv": rng.random(scales, np.float32) + np.float32(0.5),
        f"{experts}down_proj": (rng.integers(0, 256, down, np.uint8) & 0xF7).view(ml_dtypes.float8_e4m3fn),
        f"{experts}down_proj_scale_inv": rng.random(down_scales, np.float32) + np.float32(0.5),
    }
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", **keys}
    (folder / "config.json").write_text(json.dumps({"model_type": model, "quantization_config": quantization}))
    return folder


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"])
def test_fused_experts_are_taken_apart(case: str, model: str, tmp_path: Path) -> None:
    shape, scales, keys, transposed = FUSED[case]
    source = fused_source(tmp_path / "source", shape, scales, keys, model)
    if model == "gpt_oss" and keys:
        arguments = ["convert", str(source), str(tmp_path / "out"), "--layout", "compressed-tensors"]
        assert run(arguments) == 2, "alternating rows share blocks"
        assert run([*arguments, "--on-unsupported", "dequantize"]) == 2, "no model has these names"
        return
    config = convert(source, tmp_path / "out")
    load_torch = pytest.importorskip("safetensors.torch").load_file
    stored = {n: t.float().numpy() for n, t in load_torch(source / "model.safetensors").items()}
    gate_up = stored["model.layers.0.mlp.experts.gate_up_proj"]
    factor = stored["model.layers.0.mlp.experts.gate_up_proj_scale_inv"]
    if keys:
        factor = factor.repeat(128, 1).repeat(128, 2)
    values = gate_up * factor
    if transposed:
        values = values.swapaxes(1, 2)
    rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    if model != "gpt_oss":
        rows = {"gate": slice(0, 256), "up": slice(256, 512)}
    decoded = by_library(tmp_path / "out", config)
    for expert in range(2):
        for role, part in rows.items():
            found, _ = decoded[f"model.layers.0.mlp.experts.{expert}.{role}_proj"]
            assert np.array_equal(found, values[expert, part]), (expert, role)
