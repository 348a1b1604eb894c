"""What is loaded is what was stored, where it was put; what is not whole is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import FIXTURES
from support.models import EXPERTS, SCHEMES, write

from xpuquant.errors import DamagedError, EnvironmentFault, UnsupportedError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def load() -> Any:
    from support.plugin_loading import load

    return load


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of our layers' parameters whose memory is elsewhere after `process_weights_after_loading`."""
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading
    names: list[str] = []

    def places(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
        return {
            f"{name}.{suffix}": (param.data_ptr(), param.numel())
            for name, layer in model.named_modules()
            if type(getattr(layer, "quant_method", None)).__name__.startswith("Xpuquant")
            for suffix, param in layer.named_parameters(recurse=False)
        }

    def watched(model: torch.nn.Module, *args: Any) -> None:
        before = places(model)
        assert before
        process(model, *args)
        after = places(model)
        names.extend(name for name in before if before[name] != after.get(name))

    monkeypatch.setattr(base_loader, "process_weights_after_loading", watched)
    return names


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_linear_moves(scheme: str, tmp_path: Path, load: Any, moved: list[str]) -> None:
    model = load(write(tmp_path, "llama", SCHEMES[scheme]).converted)
    weights = [name for name, _ in model.named_parameters() if name.endswith(("qweight", "proj.weight"))]
    assert len(weights) == 2 * 4
    # The scale of each fused member becomes one per row, and one shared permutation stays of the members'.
    small = ("weight_scale",) if scheme == "fp8-tensor" else ("g_idx", "global_scale")
    assert [name for name in moved if not name.endswith(small)] == []


def test_every_member_of_a_fused_projection_has_a_place() -> None:
    """vLLM's names of members, a lightning indexer's among them (MiniMax-M3): each has an order of columns."""
    import ast
    import inspect

    from vllm.model_executor.layers import linear

    from xpuquant.vllm.adoption import SHARDS

    sets = [node for node in ast.walk(ast.parse(inspect.getsource(linear))) if isinstance(node, ast.Set | ast.List)]
    members = [{e.value for e in node.elts if isinstance(e, ast.Constant)} for node in sets]
    known = [names for names in members if {"q", "k", "v"} <= names]
    assert known and set().union(*known) == set(SHARDS)


def mapped(path: Path) -> list[range]:
    """Where a file lies in this process's memory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    found = [line[0].split("-") for line in lines if line[5:] == [str(path.resolve())]]
    return [range(int(begin, 16), int(end, 16)) for begin, end in found]


def lie_in(pages: list[range], model: torch.nn.Module) -> dict[str, bool]:
    """Parameter → whether it lies in the file's pages."""
    return {name: any(param.data_ptr() in part for part in pages) for name, param in model.named_parameters()}


def test_whole_tensors_stay_in_the_files_pages(tmp_path: Path, load: Any) -> None:
    """On the CPU: stacks of experts, linears that are not fused, and those that are where their rows lie side by side,
    which here they do not."""
    pair = write(tmp_path, "qwen3_moe", SCHEMES["int4"], EXPERTS["int4"])
    model = load(pair.converted)
    held = lie_in(mapped(pair.converted / "model.safetensors"), model)
    layer = "model.layers.1"
    assert held[f"{layer}.mlp.experts.routed_experts.gate_up_proj"]
    assert held[f"{layer}.self_attn.o_proj.qweight"]
    assert not held[f"{layer}.self_attn.qkv_proj.qweight"]
    stored = load_file(pair.converted / "model.safetensors")
    weight = model.get_parameter(f"{layer}.self_attn.o_proj.qweight")
    assert torch.equal(weight, stored[f"{layer}.self_attn.o_proj.qweight"])
    weight.data.zero_()  # a private mapping: the file keeps its bytes
    assert torch.equal(
        load_file(pair.converted / "model.safetensors")[f"{layer}.self_attn.o_proj.qweight"],
        stored[f"{layer}.self_attn.o_proj.qweight"],
    )


JOINED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


@pytest.mark.parametrize(
    "source",
    ["gptqmodel-qwen3-w4g32", "gptqmodel-qwen3-w4g32-actorder", "llmcompressor-llama-fp8-dynamic"]
    + [f"llmcompressor-llama-{kind}" for kind in ("fp8-static", "mxfp4", "mxfp8", "nvfp4a16", "w8a8")],
)
def test_what_vllm_joins_is_a_view_of_the_file(source: str, tmp_path: Path, load: Any) -> None:
    """q, k, v and gate, up lie in a converted repo as vLLM joins them: on the CPU nothing of them is copied."""
    import xpuquant

    xpuquant.convert(FIXTURES / source, tmp_path / "out", verify=False)
    file = tmp_path / "out" / "model.safetensors"
    model, stored = load(tmp_path / "out"), load_file(file)
    held = lie_in(mapped(file), model)
    layer = "model.layers.0"
    for joined, members in JOINED.items():
        block = joined.partition(".")[0]
        suffix = "qweight" if f"{layer}.{joined}.qweight" in held else "weight"
        weight = model.get_parameter(f"{layer}.{joined}.{suffix}")
        assert held[f"{layer}.{joined}.{suffix}"]
        wanted = torch.cat([stored[f"{layer}.{block}.{member}.{suffix}"] for member in members])
        assert torch.equal(weight.view(torch.uint8), wanted.view(torch.uint8))
    weight.data.zero_()
    assert all(torch.equal(load_file(file)[name].view(torch.uint8), t.view(torch.uint8)) for name, t in stored.items())


@pytest.mark.parametrize("family", ["bloom", "falcon"])
@pytest.mark.parametrize("scheme", ["int4", "int4-asym", "int4-act-order", "fp8-channel", "mxfp8", "nvfp4"])
def test_a_loader_that_reorders_rows_is_not_passed_by(family: str, scheme: str, tmp_path: Path, load: Any) -> None:
    """vLLM's own classes for BLOOM and Falcon, of the converted model and of its dequantized twin."""
    falcon = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
    changes: dict[str, Any] = falcon if family == "falcon" else {"tie_word_embeddings": True}
    pair = write(tmp_path, family, SCHEMES[scheme], **changes)
    plain, model = load(pair.plain, dtype="float32"), load(pair.converted, dtype="float32")
    stored = load_file(pair.plain / "model.safetensors")
    checked = 0
    for name, layer in model.named_modules():
        if name.endswith("query_key_value"):
            x = torch.eye(256)
            wanted = plain.get_submodule(name)(x)[0]
            torch.testing.assert_close(layer(x)[0], wanted, atol=1e-5, rtol=0)
            (source,) = (t for key, t in stored.items() if key.endswith(f"{name.partition('.h.')[2]}.weight"))
            assert not torch.equal(wanted, x @ source.t()), "nothing is reordered"
            checked += 1
    assert checked == 2


def test_members_that_wait_for_others_are_copied() -> None:
    """A load that brings some members only, one that brings them from elsewhere, and one in another dtype."""
    from xpuquant.vllm.adoption import MemberLoader, settle

    def theirs(param: torch.nn.Parameter, tensor: torch.Tensor, member: int) -> None:
        start = (0, 4)[member]
        param.data[start : start + len(tensor)].copy_(tensor)

    def fresh() -> Any:
        model: Any = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.int32), requires_grad=False)
        model.weight.weight_loader = MemberLoader(theirs, [4, 2])
        return model

    rows = torch.arange(48, dtype=torch.int32).view(6, 8)
    for parts, is_view in [
        ({0: rows[:4], 1: rows[4:]}, True),
        ({1: rows[4:], 0: rows[:4]}, True),
        ({0: rows[:4].clone(), 1: rows[4:].clone()}, False),
        ({0: rows[:4].long(), 1: rows[4:].long()}, False),
        ({1: rows[4:]}, False),
    ]:
        model = fresh()
        for member, tensor in parts.items():
            model.weight.weight_loader(model.weight, tensor, member)
        settle(model)
        wanted = torch.zeros_like(rows)
        for member in parts:
            start = (0, 4)[member]
            wanted[start : start + len(parts[member])] = rows[start : start + len(parts[member])]
        assert torch.equal(model.weight, wanted)
        assert (model.weight.data_ptr() == rows.data_ptr()) == is_view


@pytest.mark.parametrize("experts", EXPERTS)
def test_no_expert_moves(experts: str, tmp_path: Path, load: Any, moved: list[str]) -> None:
    pair = write(tmp_path, "qwen3_moe", SCHEMES["int4"], EXPERTS[experts])
    model = load(pair.converted)
    assert moved == []
    stored = load_file(pair.converted / "model.safetensors")
    layer = model.model.layers[1].mlp.experts.routed_experts
    for name, wanted in stored.items():
        if name.startswith("model.layers.1.mlp.experts."):
            held = layer.get_parameter(name.rpartition(".")[2])
            assert held.shape == wanted.shape
            if held.dtype != wanted.dtype:  # what ARK reads as activations
                suffixes = ("_zero_point", "_scale") if experts.startswith("fp8") else ("_zero_point",)
                assert name.endswith(suffixes) and held.dtype == torch.bfloat16
                wanted = wanted.to(held.dtype)
            assert torch.equal(held.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32, torch.float8_e4m3fn, torch.uint8])
def test_copies_of_a_load_are_torchs_own(dtype: torch.dtype) -> None:
    """Contiguous or a rank's part, several pieces or one, of another dtype, broadcast, or empty."""
    from xpuquant.vllm.copying import _PIECE, HostCopies

    source = torch.randint(0, 2**31 - 1, (3 * _PIECE // 4 // 1000 + 1, 1000), dtype=torch.int32).view(dtype)
    half, K = len(source) // 2, source.shape[1]
    cuts: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t,
        lambda t: t[half:],
        lambda t: t[:, K // 2 :],
        lambda t: t[: K // 2, : len(t)].t(),
        lambda t: t.view(-1, 1, K),
        lambda t: t[3],
        lambda t: t[3, 3],
        lambda t: t[:0],
    ]
    for cut in cuts:
        wanted, copied = torch.zeros_like(source), torch.zeros_like(source)
        cut(wanted).copy_(cut(source))
        with HostCopies():
            returned = cut(copied)
            assert returned.copy_(cut(source)) is returned
        assert torch.equal(copied.view(torch.uint8), wanted.view(torch.uint8))
    wide = torch.zeros(len(source), K, dtype=torch.float64)
    with HostCopies():
        wide.copy_(source)
        assert torch.equal(wide.nan_to_num(), source.to(torch.float64).nan_to_num())
        wide.copy_(torch.arange(K))
    assert torch.equal(wide[-1], torch.arange(K, dtype=torch.float64))


def test_copies_use_every_processor_of_the_process() -> None:
    """vLLM's CPU worker binds the thread that loads to one processor; the copying threads are not."""
    import os

    from xpuquant.vllm.copying import HostCopies

    everywhere = os.sched_getaffinity(0)
    torch.rand(1 << 20).cos()  # torch's own threads exist, where there is more than one processor
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        with HostCopies() as copies:
            assert copies.pool.submit(os.sched_getaffinity, 0).result() == everywhere
            assert os.sched_getaffinity(0) == {min(everywhere)}
    finally:
        os.sched_setaffinity(0, everywhere)


def edit(folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


LAYER = "model.layers.1"
MISSING = [
    ("llama", f"{LAYER}.self_attn.k_proj.qweight"),
    ("llama", f"{LAYER}.mlp.down_proj.qzeros"),
    ("llama", f"{LAYER}.input_layernorm.weight"),
    ("llama", "model.embed_tokens.weight"),
    ("llama", "lm_head.weight"),
    ("qwen2", f"{LAYER}.self_attn.v_proj.bias"),
    ("qwen3_moe", f"{LAYER}.mlp.experts.down_proj_scale"),
    ("qwen3_moe", f"{LAYER}.mlp.gate.weight"),
    ("mixtral", f"{LAYER}.block_sparse_moe.experts.gate_up_proj"),
    ("deepseek_v3", f"{LAYER}.mlp.experts.down_proj"),
    ("deepseek_v3", f"{LAYER}.mlp.gate.e_score_correction_bias"),
    ("deepseek_v3", f"{LAYER}.self_attn.kv_a_proj_with_mqa.scales"),
    ("gpt_oss", f"{LAYER}.mlp.experts.gate_up_proj_bias"),
    ("gpt_oss", f"{LAYER}.self_attn.sinks"),
    ("gpt_oss", f"{LAYER}.self_attn.q_proj.bias"),
]


@pytest.mark.parametrize(("family", "tensor"), MISSING)
def test_refuses_a_missing_tensor(family: str, tensor: str, tmp_path: Path, load: Any) -> None:
    experts = None if family in ("llama", "qwen2") else EXPERTS["int4"]
    folder = write(tmp_path, family, SCHEMES["int4-asym"], experts).converted
    with pytest.raises(DamagedError) as refusal:
        load(edit(folder, lambda tensors: tensors.pop(tensor)))
    message = str(refusal.value)
    assert "is missing from the repo" in message
    assert "\n" not in message
    # Fused layers are named as vLLM knows them, where the repo's own name is not known any more.
    assert tensor.split(".")[-1] in message


EXTRA = {
    f"{LAYER}.mlp.down_proj.g_idx": torch.zeros(256, dtype=torch.int32),
    f"{LAYER}.self_attn.rotary.qweight": torch.zeros(8, 8, dtype=torch.int32),
    f"{LAYER}.mlp.down_proj.qweight_extra": torch.zeros(4),
    f"{LAYER}.mlp.unheard_of": torch.zeros(4),
}


@pytest.mark.parametrize("tensor", EXTRA)
def test_refuses_an_extra_tensor(tensor: str, tmp_path: Path, load: Any) -> None:
    folder = write(tmp_path, "llama", SCHEMES["int4"]).converted
    with pytest.raises(ValueError if "unheard" in tensor else DamagedError, match=tensor.split(".")[-1]):
        load(edit(folder, lambda tensors: tensors.update({tensor: EXTRA[tensor]})))


def test_refuses_bytes_of_another_dtype(tmp_path: Path, load: Any) -> None:
    """A copy into the parameter would convert e5m2 to e4m3 without a word."""
    folder = write(tmp_path, "llama", SCHEMES["fp8-channel"]).converted
    name = f"{LAYER}.mlp.down_proj.weight"
    with pytest.raises(DamagedError, match=r"float8_e5m2, the format wants torch\.float8_e4m3fn"):
        load(edit(folder, lambda t: t.update({name: t[name].float().to(torch.float8_e5m2)})))


@pytest.mark.parametrize(
    ("scheme", "suffix"),
    [
        *((SCHEMES[name], "scales") for name in ("int4", "int8", "nvfp4")),
        *((EXPERTS[name], "down_proj_scale") for name in ("int4", "int8", "fp8-channel", "nvfp4")),
    ],
)
def test_refuses_scales_that_float16_cannot_hold(scheme: Any, suffix: str) -> None:
    from xpuquant.vllm.loading import check_range

    name = f"model.layers.0.mlp.experts.{suffix}"
    scales = torch.tensor([[0.5, 70000.0, float("inf")]])
    for dtype in (torch.bfloat16, torch.float32):
        check_range(name, suffix, scheme, scales, dtype)
    already = torch.tensor([[0.5, 60000.0, float("inf")]])
    check_range(name, suffix, scheme, already, torch.float16)  # an infinite one is the repo's own
    with pytest.raises(UnsupportedError, match=f"{name}: 70000 is beyond float16, .* --dtype bfloat16"):
        check_range(name, suffix, scheme, scales, torch.float16)


def test_refuses_a_stack_of_another_shape(tmp_path: Path, load: Any) -> None:
    folder = write(tmp_path, "qwen3_moe", SCHEMES["int4"], EXPERTS["int4"]).converted
    name = f"{LAYER}.mlp.experts.down_proj"
    with pytest.raises(DamagedError, match=r"does not fit config\.json"):
        load(edit(folder, lambda t: t.update({name: t[name][:, :128].contiguous()})))


def reconfigure(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_refuses_a_newer_format(tmp_path: Path, load: Any) -> None:
    folder = write(tmp_path, "llama", SCHEMES["int4"]).converted
    with pytest.raises(DamagedError, match="format_version 3, this xpuquant reads 1 to 2"):
        load(reconfigure(folder, lambda q: q.update(format_version=3)))


@pytest.mark.parametrize("tensor", ["q_proj.weight", "k_proj.scales"])
def test_refuses_a_missing_tensor_of_a_mixed_layer(tensor: str, tmp_path: Path, load: Any) -> None:
    folder = write(tmp_path, "llama", SCHEMES["int4"], others={"q_proj": None}).converted
    load(folder)
    with pytest.raises(DamagedError, match=tensor.split(".")[-1]):
        load(edit(folder, lambda tensors: tensors.pop(f"{LAYER}.self_attn.{tensor}")))


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "0.40.2+xpu"])
def test_names_the_wrong_vllm(version: str, tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from xpuquant.vllm import versions

    monkeypatch.setattr(versions, "vllm_version", lambda: version)
    with pytest.raises(EnvironmentFault, match=f"vLLM {version.replace('+', '.')} is not supported.*0.32 to 0.33"):
        load(write(tmp_path, "llama", SCHEMES["int4"]).converted)


@pytest.mark.parametrize(("version", "complaint"), [("0.1.14.1", "0.1.14.1 is too old"), (None, "not installed")])
def test_names_the_wrong_kernels(version: str | None, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from xpuquant.xpu_ops import installed

    def found(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    with pytest.raises(EnvironmentFault, match=complaint):
        installed()


HEADS = {
    **{name: SCHEMES[name] for name in ("int4", "int4-asym", "int4-channel", "int4-act-order", "fp8-tensor")},
    **{name: SCHEMES[name] for name in ("fp8-e5m2", "mxfp4", "mxfp8")},
    "fp8-block": replace(SCHEMES["fp8-block"], block_n=16),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_quantized_head(head: str, tied: bool, tmp_path: Path, load: Any) -> None:
    """496 rows, which vLLM pads to 512; a config that calls it tied is overruled by its tensors."""
    pair = write(tmp_path, "llama", SCHEMES["int4"], others={"lm_head": HEADS[head]}, vocab_size=496)
    for folder in (pair.converted, pair.plain):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    model = load(pair.converted, dtype="float32")
    plain = load_file(pair.plain / "model.safetensors")
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model.compute_logits(x), x @ plain["lm_head.weight"].t().float(), atol=1e-4, rtol=0)
    embedded = model.model.embed_tokens(torch.arange(496))
    torch.testing.assert_close(embedded, plain["model.embed_tokens.weight"].float(), atol=0, rtol=0)


def test_refuses_a_missing_tensor_of_the_head(tmp_path: Path, load: Any) -> None:
    folder = write(tmp_path, "llama", SCHEMES["int4"], others={"lm_head": SCHEMES["int4-asym"]}).converted
    with pytest.raises(DamagedError, match=r"tensor lm_head\.qzeros is missing"):
        load(edit(folder, lambda tensors: tensors.pop("lm_head.qzeros")))


def test_refuses_a_quantized_head_that_the_model_does_not_take(tmp_path: Path, load: Any) -> None:
    """vLLM 0.32 and 0.33 give gpt-oss's head no quantization method."""
    folder = write(tmp_path, "gpt_oss", SCHEMES["int4"], EXPERTS["int4"], others={"lm_head": SCHEMES["int4"]}).converted
    with pytest.raises(UnsupportedError, match=r"lm_head: vLLM.s GptOssForCausalLM builds this layer so that it can"):
        load(folder)


def test_tied_embeddings(tmp_path: Path, load: Any) -> None:
    folder = write(tmp_path, "llama", SCHEMES["int4"], tie_word_embeddings=True).converted
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(DamagedError, match=r"embed_tokens\.weight is missing"):
        load(edit(folder, lambda tensors: tensors.pop("model.embed_tokens.weight")))


def test_a_tensor_of_a_module_with_two_paths_has_come_by_either() -> None:
    """vLLM 0.33's models of Transformers have a block's shared experts under its routed ones, too."""
    from xpuquant.vllm.config import XpuquantConfig
    from xpuquant.vllm.loading import Intake

    model = torch.nn.Module()
    model.first, model.other = torch.nn.Module(), torch.nn.Linear(2, 2, bias=False)
    model.first.inner = model.second = torch.nn.Linear(2, 2, bias=False)
    intake = Intake(model, XpuquantConfig({}), torch.bfloat16)
    intake.finish({"second.weight", "other.weight"})
    intake.finish({"first.inner.weight", "other.weight"})
    with pytest.raises(DamagedError, match=r"^tensor first\.inner\.weight is missing from the repo"):
        intake.finish({"other.weight"})


def test_serving_imports_no_compiler() -> None:
    """vLLM's CPU worker looks into whatever is imported for kernels of its own, and stumbles over llvmlite."""
    code = (
        "import sys; from xpuquant.vllm import register; register(); import xpuquant.vllm.experts; "
        "print(*{'numba', 'llvmlite'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
