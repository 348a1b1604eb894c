"""Every class of experts in the installed Transformers: computed as it computes itself, or refused by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from xpuquant.errors import UnsupportedError
from xpuquant.formats.scheme import Scheme

transformers = pytest.importorskip("transformers", minversion="5.0")

from support.models import EXPERTS, PACK  # noqa: E402

from xpuquant.transformers.contracts import (  # noqa: E402
    check_experts_class,
    has_identities,
    kernel_gate,
    takes_rows_by_expert,
)
from xpuquant.transformers.layers import XpuquantExperts, quantized  # noqa: E402

REFUSED = {
    "DbrxExperts": "own way",  # three matrices without experts of their own
    "InklingSharedExperts": "own way",  # each token goes to all
    "JetMoeParallelExperts": "own way",  # one matrix
    "NllbMoeExperts": "own way",  # a ModuleDict
    "SwitchTransformersExperts": "own way",  # likewise
}
NO_KERNEL = {
    "Inkling2Experts",  # capped softly
    "MiniMaxM3VLExperts",  # the gate of gpt-oss, of rows that do not alternate
    "OpenAIPrivacyFilterExperts",  # likewise
    "Step3p7Experts",  # clamps after the activation
}
"""Gates that no XPU kernel has."""

SCHEME = EXPERTS["int4"]
E, H, I = 4, 64, 32
LIMIT = 0.4


def classes() -> Iterator[tuple[str, str]]:
    """Module and name of each class of experts, read out of the sources."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "Experts" not in text and "gate_up_proj = nn.Parameter" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and _is_of_experts(node):
                yield f"transformers.models.{path.parent.name}.{path.stem}", node.name


def _is_of_experts(node: ast.ClassDef) -> bool:
    source = ast.unparse(node)
    return node.name.endswith("Experts") or ("gate_up_proj = nn.Parameter" in source and "down_proj" in source)


class AnyConfig:
    """Answers what constructors of experts ask for, whatever a model calls it."""

    _experts_implementation = "eager"
    hidden_act = hidden_activation = "silu"
    mlp_hidden_act = "relu2"
    swiglu_alpha = 1.3
    moe_latent_size = None

    def __getattr__(self, name: str) -> Any:
        for part, value in (("intermediate", I), ("ffn", I), ("hidden", H), ("limit", LIMIT), ("zero", 1)):
            if part in name:
                return value
        if "expert" in name:
            return 2 if "per_tok" in name else E
        if name.startswith("__"):
            raise AttributeError(name)
        return 2.0


CLASSES = list(classes())


def make(module: str, name: str) -> Any:
    """One with random weights. Step-3.7's takes the limit beside the config."""
    kind = getattr(import_module(module), name)
    more = {"swiglu_limit": LIMIT} if name == "Step3p7Experts" else {}
    experts = kind(AnyConfig(), **more)
    generator = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return experts.eval()


def scheme_of(experts: Any) -> Scheme:
    interleaved = not getattr(experts, "is_concatenated", True)
    bias, gated = getattr(experts, "has_bias", False), getattr(experts, "has_gate", True)
    return replace(SCHEME, group_size=32, interleaved=interleaved, bias=bias, gated=gated)


@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
@torch.no_grad()
def test_computes_as_the_class_does_or_refuses(module: str, name: str) -> None:
    if name in REFUSED:
        kind = getattr(import_module(module), name)
        experts = kind.__new__(kind)
        torch.nn.Module.__init__(experts)
        with pytest.raises(UnsupportedError, match=f"{name}.*{REFUSED[name]}.*load the source repo"):
            check_experts_class(experts, SCHEME)
        return
    experts = make(module, name)
    ours = stand_in(experts)
    x = torch.randn(16, H, generator=torch.Generator().manual_seed(4))
    known = E + has_identities(experts)  # an expert that returns its input is beyond the stack
    ids = torch.stack([torch.randperm(known, generator=torch.Generator().manual_seed(i))[:2] for i in range(16)])
    weights = torch.rand(16, 2, generator=torch.Generator().manual_seed(5))
    asked = (x,) if takes_rows_by_expert(experts) else (x, ids, weights)
    wanted = experts(*asked)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(ours(*asked), wanted, atol=1e-5, rtol=1e-4)


def stand_in(experts: Any) -> XpuquantExperts:
    """What takes the place of `experts`, filled with its weights rounded; `experts` itself gets the rounded ones."""
    scheme = scheme_of(experts)
    ours = quantized(scheme, experts)
    assert isinstance(ours, XpuquantExperts)
    turned = getattr(experts, "is_transposed", takes_rows_by_expert(experts))
    stored: dict[str, list[torch.Tensor]] = {}
    for part in scheme.stacks:
        for expert in range(E):
            weight = getattr(experts, part).data[expert]
            tensors, values = PACK[scheme.layout](weight.t().contiguous() if turned else weight, scheme)
            weight.copy_(values.t() if turned else values)
            for suffix, tensor in tensors.items():
                stored.setdefault(part + suffix, []).append(tensor)
        if scheme.bias:
            bias = getattr(experts, f"{part}_bias").data
            bias.copy_(bias.bfloat16())
            stored[f"{part}_bias"] = list(bias.bfloat16())
    for suffix, tensors_of in stored.items():
        wanted, tensor = ours.wanted[suffix], torch.stack(tensors_of)
        assert (tuple(tensor.shape), tensor.dtype) == (wanted.shape, wanted.dtype)
        setattr(ours, suffix, torch.nn.Parameter(tensor, requires_grad=False))
    return ours


@pytest.mark.parametrize(
    ("module", "name"), [c for c in CLASSES if c[1] not in REFUSED], ids=[n for _, n in CLASSES if n not in REFUSED]
)
def test_the_gate_that_a_kernel_is_told_is_the_class_s(module: str, name: str) -> None:
    """Clamp limits and names found are what `layers.gated`, and with it vLLM's kernels, computes."""
    experts = make(module, name)
    find = partial(kernel_gate, experts, scheme_of(experts), torch.device("cpu"))
    if name == "GptOssExperts":
        with pytest.raises(UnsupportedError, match="GptOssExperts"):
            find()
        experts.alpha, experts.limit = 1.702, 7.0
        assert find() == ("swigluoai", None)
    elif name == "NemotronHExperts":
        assert find() == ("relu2_no_mul", None)
        experts.act_fn = transformers.activations.ACT2FN["silu"]
        with pytest.raises(UnsupportedError, match=f"gates as {name} does, whose activation is SiLU"):
            find()
    elif name in NO_KERNEL:
        with pytest.raises(UnsupportedError, match=f"gates as {name} does"):
            find()
    else:
        clamps = {"DeepseekV4Experts", "Glm5NextTextExperts", "HYV4Experts"}
        assert find() == ("silu", LIMIT if name in clamps else None)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):  # as while Transformers makes a model
                assert find() == ("silu", LIMIT if name in clamps else None)
        finally:
            torch.set_default_dtype(torch.float32)


def test_rows_that_alternate_and_biases_must_be_the_class_s() -> None:
    plain = make("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
    with pytest.raises(UnsupportedError, match=r"Qwen3MoeExperts reads other rows .* alternate"):
        quantized(replace(SCHEME, interleaved=True), plain)
    with pytest.raises(UnsupportedError, match="with biases, and Qwen3MoeExperts has none"):
        quantized(replace(SCHEME, bias=True), plain)
    with pytest.raises(UnsupportedError, match="stored without a gate, and Qwen3MoeExperts has one"):
        quantized(replace(SCHEME, gated=False), plain)
    gateless = make("transformers.models.nemotron_h.modeling_nemotron_h", "NemotronHExperts")
    with pytest.raises(UnsupportedError, match="stored with a gate, and NemotronHExperts has none"):
        quantized(SCHEME, gateless)
    other = make("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")
    with pytest.raises(UnsupportedError, match="without biases, and GptOssExperts adds them"):
        quantized(replace(SCHEME, interleaved=True), other)


def test_a_class_of_a_newer_transformers_is_refused_by_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument of the decorator that is not known yet."""
    from xpuquant.transformers import contracts

    declaration = contracts._declaration()
    monkeypatch.setattr(contracts, "_declaration", lambda: {**declaration, "has_pre_expert_norm": False})
    experts = make("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
    check_experts_class(experts, SCHEME)
    experts.has_pre_expert_norm = True
    with pytest.raises(UnsupportedError, match="Qwen3MoeExperts is declared has_pre_expert_norm=True"):
        check_experts_class(experts, SCHEME)


def test_other_activations() -> None:
    """Another function than the kernels have is not taken for one of theirs: its own name is refused."""
    experts = make("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
    tanhs = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")
    for act, name in (("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), *((act, "gelu_tanh") for act in tanhs)):
        experts.act_fn = transformers.activations.ACT2FN[act]
        assert kernel_gate(experts, SCHEME, torch.device("cpu")) == (name, None)
    for act in ("relu", "relu2", "quick_gelu", "gelu_10", "mish"):
        experts.act_fn = transformers.activations.ACT2FN[act]
        refusal = f"no XPU kernel gates as Qwen3MoeExperts does, whose activation is {type(experts.act_fn).__name__}"
        with pytest.raises(UnsupportedError, match=refusal):
            kernel_gate(experts, SCHEME, torch.device("cpu"))
