"""Transformers loads a converted repo: every layout, dense and with experts, and saves it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from xpuquant.errors import DamagedError, EnvironmentFault, UnsupportedError

transformers = pytest.importorskip("transformers", minversion="5.0")

from support.models import EXPERTS, FAMILIES, MOE, SCHEMES, write  # noqa: E402

PROMPT = torch.tensor([[1, 17, 33, 250, 99, 4, 311, 8, 5, 5, 400, 12]])
CASES = [
    *(("llama", scheme, None) for scheme in SCHEMES),
    *((family, "int4", "int4" if family in MOE else None) for family in FAMILIES[1:]),
    *(("qwen3_moe", experts if experts in SCHEMES else "int4", experts) for experts in EXPERTS if experts != "int4"),
    ("gpt_oss", "mxfp4", "mxfp4"),
    ("gpt_oss", "mxfp8", "fp8-block"),
    ("mixtral", "fp8-tensor", "mxfp8"),
    *(("nemotron_h", "int4", experts) for experts in EXPERTS),
]


def load(folder: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    answer: torch.Tensor = model(PROMPT).logits
    return answer


def case_id(case: Any) -> str:
    return "-".join(part for part in case if part)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_computes_what_the_dequantized_model_computes(case: tuple[str, str, str | None], tmp_path: Path) -> None:
    family, scheme, experts = case
    pair = write(tmp_path, family, SCHEMES[scheme], EXPERTS[experts] if experts else None)
    wanted = logits(load(pair.plain))
    assert wanted.abs().max() > 1
    torch.testing.assert_close(logits(load(pair.converted)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_saves_what_it_loaded(case: tuple[str, str, str | None], tmp_path: Path) -> None:
    """Names, dtypes and bytes of quantized modules, and the config: what vLLM serves afterwards too."""
    family, scheme, experts = case
    pair = write(tmp_path, family, SCHEMES[scheme], EXPERTS[experts] if experts else None)
    model = load(pair.converted, torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    before = load_file(pair.converted / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert set(after) == set(before)
    quantized = ("qweight", "scales", "qzeros", "g_idx", "weight_scale", "input_scale")
    stacks = tuple(part + end for part in ("gate_up_proj", "down_proj") for end in ("", "_scale", "_zero_point"))
    stored = [n for n, t in before.items() if n.endswith((*quantized, *stacks)) or t.dtype.itemsize == 1]
    assert len(stored) >= 10
    for name in stored:
        tensor = before[name]
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    configs = [json.loads((f / "config.json").read_text()) for f in (pair.converted, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again", torch.bfloat16)), logits(model))


FILES = [
    *((family, dtype, ()) for family in FAMILIES for dtype in (torch.bfloat16, torch.float32)),
    ("qwen3_next", torch.bfloat16, ()),
    ("qwen3_next", torch.float32, ()),
    # Float32 in a bfloat16 model, as DeepSeek-V3 and Qwen3.5 are published.
    ("deepseek_v3", torch.bfloat16, ("e_score_correction_bias",)),
    ("qwen3_next", torch.bfloat16, ("A_log",)),
]
"""Family, dtype of the model, and which of its parameters its file holds in float32."""
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "layer_types": ["linear_attention", "full_attention"],
    }
}


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: f"{kind[0]}-{str(kind[1])[6:]}" + "-".join(("", *kind[2])))
def test_unquantized_parameters_are_those_of_the_file(kind: Any, tmp_path: Path) -> None:
    """Every bit of every norm, router, bias, embedding, decay: none is rounded on its way into the model."""
    family, dtype, wide = kind
    changes = SHAPES.get(family, {})
    experts = EXPERTS["int4"] if family in (*MOE, *SHAPES) else None
    folder = write(tmp_path, family, SCHEMES["int4"], experts, dtype=dtype, **changes).converted
    generator = torch.Generator().manual_seed(3)

    def rewrite(tensors: dict[str, torch.Tensor]) -> None:
        """Values with every bit of their dtype in use."""
        for name in sorted(unquantized(tensors)):
            kept = torch.float32 if name.endswith(wide) else tensors[name].dtype
            tensors[name] = (torch.rand(tensors[name].shape, generator=generator) + 0.5).to(kept)

    stored = load_file(edit(folder, rewrite) / "model.safetensors")
    assert all(sum(name.endswith(end) for name in stored) for end in wide)
    model = load(folder, "auto")
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "again")
    loaded = load_file(tmp_path / "again" / "model.safetensors")
    for name in unquantized(stored):
        # Wider is what some classes ask for, and the same number.
        assert loaded[name].dtype in (stored[name].dtype, torch.float32), name
        assert torch.equal(loaded[name].float(), stored[name].float()), name
    assert logits(model).isfinite().all()


def unquantized(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names of what belongs to no quantized module. Here all of those are int4."""
    modules = {name.removesuffix(end) for name in tensors for end in ("qweight", "_scale") if name.endswith(end)}
    parts = (".scales", ".qzeros", ".g_idx", ".qweight", "_scale", "_proj", "_proj_bias")
    return [name for name in tensors if not (name.endswith(parts) and name.startswith(tuple(modules)))]


HEADS = ["int4-asym", "int4-act-order", "fp8-tensor", "fp8-e5m2", "mxfp4", "mxfp8"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_quantized_head(head: str, tied: bool, tmp_path: Path) -> None:
    """Saved too; a config that calls it tied is overruled by its tensors."""
    pair = write(tmp_path, "llama", SCHEMES["int4"], others={"lm_head": SCHEMES[head]})
    config = json.loads((pair.converted / "config.json").read_text())
    (pair.converted / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    model, wanted = load(pair.converted), logits(load(pair.plain))
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (pair.converted, tmp_path / "again"))
    assert set(after) == set(before)
    torch.testing.assert_close(logits(load(tmp_path / "again")), wanted, atol=1e-4, rtol=0)


def test_tied_embeddings(tmp_path: Path) -> None:
    pair = write(tmp_path, "llama", SCHEMES["int4"], tie_word_embeddings=True)
    model = load(pair.converted)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(load(pair.plain)), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")


def test_scales_keep_their_dtype_under_another_serving_dtype(tmp_path: Path) -> None:
    model = load(write(tmp_path, "qwen3", SCHEMES["int4"]).converted, torch.float16)
    assert model.model.layers[0].mlp.gate_proj.scales.dtype == torch.bfloat16
    assert logits(model).dtype == torch.float16


def test_what_the_config_does_not_name_stays_as_it_was(tmp_path: Path) -> None:
    pair = write(tmp_path, "llama", SCHEMES["int4"], others={"q_proj": None})
    model = load(pair.converted)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(model.lm_head) is torch.nn.Linear
    torch.testing.assert_close(logits(model), logits(load(pair.plain)), atol=1e-4, rtol=0)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["self_attn.k_proj.scales", "mlp.experts.down_proj", "mlp.experts.gate_up_proj_scale"])
def test_refuses_a_missing_tensor(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "qwen3_moe", SCHEMES["int4"], EXPERTS["int4"]).converted
    with pytest.raises(DamagedError, match=f"{name} is missing from the repo") as refusal:
        load(edit(folder, lambda tensors: tensors.pop(f"model.layers.1.{name}")))
    assert "\n" not in str(refusal.value)


def test_refuses_a_tensor_of_another_shape(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", SCHEMES["int4"]).converted
    name = "model.layers.0.mlp.up_proj.qweight"
    # Transformers 5.20 and later refuse on their own.
    with pytest.raises((DamagedError, RuntimeError), match=r"qweight is torch.int32 \[128, 32\].*says|mismatched"):
        load(edit(folder, lambda t: t.update({name: t[name][:128].contiguous()})))


def test_what_no_xpu_kernel_computes_is_said_before_the_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in vLLM, and although no GPU is here: a device map says where the model goes."""
    from xpuquant import xpu_ops
    from xpuquant.xpu_releases import served

    folder = write(tmp_path, "qwen3_moe", SCHEMES["int4"], EXPERTS["int4"]).converted
    config = json.loads((folder / "config.json").read_text())

    def refused(error: type[Exception], said: str, device_map: Any = "xpu", **changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=said) as raised:
            transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
        assert "\n" not in str(raised.value)

    for device_map in ("xpu", "xpu:1", {"": "xpu"}, {"model": torch.device("xpu", 0), "lm_head": "cpu"}):
        refused(
            UnsupportedError,
            r"model\.layers\.0\.mlp\.experts: no XPU kernel gates as Qwen3MoeExperts",
            device_map,
            hidden_act="relu",
        )
    # What is installed, then the number of experts per token.
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.14.1" if "vllm-xpu" in name else "5")
    refused(EnvironmentFault, "vllm-xpu-kernels 0.1.14.1 is too old")
    arch = SimpleNamespace(is_xe2_arch=lambda: True, int4_gemm_w4a16=None)
    monkeypatch.setattr(xpu_ops, "installed", lambda: served()[-1])
    monkeypatch.setattr(xpu_ops, "operators", lambda: arch)
    refused(UnsupportedError, r"layers\.0\.mlp\.experts: .* experts per token, not 3", num_experts_per_tok=3)
    # A CPU computes all of it.
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 3}))
    transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def test_refuses_a_module_the_model_does_not_have(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", SCHEMES["int4"]).converted
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["schemes"][0]["modules"].append("model.layers.0.mlp.sideways_proj")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="sideways_proj is quantized in the repo, but LlamaForCausalLM has no"):
        load(folder)


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LOADS = "print('layer', type(AutoModelForCausalLM.from_pretrained({!r}).model.layers[0].mlp.up_proj).__name__)"


@pytest.mark.parametrize(
    "first",
    [
        "",
        "import transformers.quantizers.auto",
        "import torch, xpuquant.transformers, xpuquant.transformers_autoload as a; a.install(); a.install()",
    ],
)
def test_loads_without_an_import_by_the_user(first: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", SCHEMES["int4"]).converted
    lines = [first, "from transformers import AutoModelForCausalLM", LOADS.format(str(folder))]
    lines += ["import sys; assert not [f for f in sys.meta_path if 'xpuquant' in type(f).__module__]"]
    assert "layer XpuquantLinear" in python("\n".join(lines))


def test_discovery_can_be_switched_off_and_done_by_hand(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", SCHEMES["int4"]).converted
    lines = [
        "import xpuquant.transformers",
        "from transformers import AutoModelForCausalLM",
        LOADS.format(str(folder)),
    ]
    assert "layer XpuquantLinear" in python("\n".join(lines), TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_discovery_imports_nothing() -> None:
    """`import torch` calls `install` in every program on the machine."""
    out = python(
        "import torch, sys\n"
        "print(sorted(m for m in sys.modules if m.startswith('xpuquant')), 'transformers' in sys.modules)\n"
    )
    ours = ["xpuquant", "xpuquant.errors", "xpuquant.transformers_autoload", "xpuquant.values"]
    assert out.strip() == f"{ours} False"
    from xpuquant import transformers_autoload

    assert transformers_autoload._Finder().find_spec("some.module") is None, "a finder is asked at every import"


def test_a_broken_install_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch turns an exception in an entry point into a failed `import torch`."""
    import transformers.quantizers.auto  # noqa: F401

    from xpuquant import transformers_autoload

    def broken(name: str) -> None:
        raise ImportError("half an update")

    monkeypatch.setattr(transformers_autoload.importlib, "import_module", broken)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    with pytest.warns(UserWarning, match="xpuquant is not active in Transformers: half an update"):
        transformers_autoload.install()
