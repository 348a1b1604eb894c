"""What the XPU kernels are handed: the stored bytes themselves, in the shapes and strides their C++ checks.

There is no Intel GPU here. The ops are stood in for by functions that check what the kernels check
(vllm-xpu-kernels 0.1.16: csrc/xpu/onednn, csrc/xpu/grouped_gemm) and then compute from what they were handed,
by their own reading of it; the result is compared with the dequantized weight.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import E2M1, EXPERTS, PACK, SCHEMES

from xpuquant import layers
from xpuquant import xpu_ops as xpu

N, K = 256, 384
Op = Callable[..., torch.Tensor]


def nt(weight: torch.Tensor) -> torch.Tensor:
    """The ops take `[K, N]` whose K is contiguous: the untransposed memory."""
    assert weight.stride(-2) == 1, "NT format"
    return weight.t()


def powers(scale: torch.Tensor) -> torch.Tensor:
    assert scale.dtype == torch.float8_e8m0fnu
    return scale.float()


def int4_gemm_w4a16(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: Any,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group: int,
    g_idx: Any,
) -> torch.Tensor:
    assert b.dtype == torch.int32 and scale.is_contiguous() and g_idx is None
    words = nt(b)
    codes = torch.stack([words >> 4 * j & 15 for j in range(8)], dim=-1).flatten(1)
    assert group > 0 and scale.shape == (codes.shape[1] // group, codes.shape[0])
    if zero.dim() == 1:
        assert zero.dtype == torch.int8 and zero.tolist() == [8]
        zeros = torch.full(scale.shape, 8)
    else:
        assert zero.dtype == torch.int32 and zero.is_contiguous()
        zeros = torch.stack([zero >> 4 * j & 15 for j in range(8)], dim=-1).flatten(1)
    spread = [t.repeat_interleave(group, 0).t() for t in (zeros, scale)]
    return torch.nn.functional.linear(a, ((codes - spread[0]) * spread[1].float()).to(a.dtype), bias)


def fp8_gemm_w8a16(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, bias: Any) -> torch.Tensor:
    weight = nt(b).float()
    assert scale.dtype == torch.float32 and scale.is_contiguous()
    if scale.dim() == 2 and scale.shape[0] > 1:
        k, n = weight.shape[1] // scale.shape[0], weight.shape[0] // scale.shape[1]
        weight = weight * scale.repeat_interleave(k, 0).repeat_interleave(n, 1).t()
    else:
        assert scale.numel() in (1, weight.shape[0])
        weight = weight * scale.reshape(-1, 1)
    return torch.nn.functional.linear(a, weight.to(a.dtype), bias)


def fp8_gemm(a: Any, b: torch.Tensor, dtype: Any, a_scale: Any, scale: torch.Tensor, bias: Any) -> torch.Tensor:
    weight = nt(b)
    assert scale.is_contiguous() and scale.shape == (weight.shape[1] // 32, weight.shape[0])
    return torch.nn.functional.linear(a, (weight.float() * powers(scale).repeat_interleave(32, 0).t()).to(dtype), bias)


def fp4_gemm(a: Any, b: torch.Tensor, a_scale: Any, scale: torch.Tensor, dtype: Any, bias: Any) -> torch.Tensor:
    assert b.dtype == torch.float4_e2m1fn_x2
    pairs = nt(b.view(torch.uint8))
    assert scale.is_contiguous() and scale.shape == (pairs.shape[1] * 2 // 32, pairs.shape[0])
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).int()
    weight = torch.cat([E2M1, -E2M1])[codes] * powers(scale).repeat_interleave(32, 0).t()
    return torch.nn.functional.linear(a, weight.to(dtype), bias)


# Namespaces that vllm-xpu-kernels registers with torch, and what of it this project calls.
NAMESPACES = {"_C", "_moe_C", "_xpu_C", "vllm_xpu_kernels", "fused_moe_interface"}
OPERATORS = {
    *("int4_gemm_w4a16", "int4_gemm_w4a8", "fp8_gemm_w8a16", "fp8_gemm", "fp4_gemm", "XpuFusedMoe"),
    *("cutlass_grouped_gemm", "cutlass_grouped_gemm_interface", "xpu_fused_moe"),
}


def names(tree: ast.Module) -> Iterator[str]:
    """Every identifier of a module, and the strings by which `getattr` and `import_module` would reach one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (part for alias in node.names for part in alias.name.split("."))
            yield from (getattr(node, "module", None) or "").split(".")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "import_module",
            "importlib.import_module",
        ):
            # `kernels/shipped` names the wheel's files, whose device code it runs itself: no operator is called there.
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from (part for text in strings for part in text.split("."))


def test_operators_are_named_in_one_module() -> None:
    """What verifies and what serves make the same calls, because there is one place to make them."""
    root = Path(__file__).parents[2]
    sources = [path for room in ("convert", "formats", "kernels", "xpuquant") for path in (root / room).rglob("*.py")]
    callers = {
        str(path.relative_to(root)): found
        for path in sources
        if (found := set(names(ast.parse(path.read_text()))) & (NAMESPACES | OPERATORS))
    }
    assert len(sources) > 50
    assert callers.pop("xpuquant/xpu_ops.py") >= {"_xpu_C", "int4_gemm_w4a16", "fp8_gemm", "XpuFusedMoe"}
    assert not callers


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_ins = SimpleNamespace(
        int4_gemm_w4a16=int4_gemm_w4a16, fp8_gemm_w8a16=fp8_gemm_w8a16, fp8_gemm=fp8_gemm, fp4_gemm=fp4_gemm
    )
    monkeypatch.setattr(torch.ops, "_xpu_C", stand_ins, raising=False)
    # Activations stay as they are: the stand-ins take them so.
    prefix = "vllm.model_executor.layers.quantization.utils."
    for module, name in (("mxfp4_utils", "xpu_mxfp4_quantize"), ("mxfp8_utils", "xpu_mxfp8_quantize")):
        stub = ModuleType(prefix + module)
        setattr(stub, name, lambda x, dtype=None: (x, None))
        monkeypatch.setitem(sys.modules, prefix + module, stub)
        parts = prefix.rstrip(".").split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    yield


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_linear_is_handed_over_as_stored(name: str, bias: bool, ops: None) -> None:
    from dataclasses import replace

    scheme = SCHEMES[name] if SCHEMES[name].group_size >= 0 else replace(SCHEMES[name], group_size=K)
    torch.manual_seed(1)
    tensors, values = PACK[scheme.layout](torch.randn(N, K).bfloat16(), scheme)
    x, b = torch.randn(5, K).bfloat16(), torch.randn(N).bfloat16() if bias else None
    seen = x.index_select(1, tensors["g_idx"]) if scheme.act_order else x
    answer = xpu.linear(scheme, tensors, seen, b)
    wanted = torch.nn.functional.linear(x.float(), values, None if b is None else b.float())
    assert answer.shape == (5, N)
    torch.testing.assert_close(answer.float(), wanted, atol=0.02 * wanted.abs().max().item(), rtol=0)
    # The same layer on any other machine.
    torch.testing.assert_close(layers.linear(scheme, tensors, x, b).float(), answer.float(), atol=0.5, rtol=0.05)


def test_a_single_row_of_blocks_is_not_read_as_channels(ops: None) -> None:
    scheme = SCHEMES["fp8-block"]
    torch.manual_seed(2)
    tensors, values = PACK["fp8_linear"](torch.randn(256, 128).bfloat16(), scheme)
    assert tensors["weight_scale"].shape == (1, 2)
    x = torch.randn(3, 128)
    torch.testing.assert_close(xpu.linear(scheme, tensors, x, None), x @ values.t(), atol=1e-3, rtol=0)


@pytest.fixture
def registered() -> Iterator[None]:
    """Two of the ops as torch knows them: what a compiler sees of an op is its schema and the shape it gives."""
    library = torch.library.Library("_xpu_C", "DEF")
    for schema in (
        "int4_gemm_w4a16(Tensor A, Tensor B, Tensor? bias, Tensor B_scale, Tensor B_zp, int group_size, Tensor? g_idx)",
        "fp8_gemm_w8a16(Tensor A, Tensor B, Tensor? B_scale, Tensor? bias)",
    ):
        name = schema.partition("(")[0]
        library.define(f"{schema} -> Tensor")
        library.impl(name, lambda a, b, *_: a.new_zeros(a.shape[0], b.shape[1]), "CompositeExplicitAutograd")
    yield
    library._destroy()


@pytest.mark.parametrize("name", ["int4", "int4-asym", "fp8-tensor", "fp8-channel", "fp8-block"])
def test_a_linear_compiles_whole(name: str, registered: None) -> None:
    """vLLM compiles models on Intel GPUs unless told otherwise, and takes no graph break."""
    scheme = SCHEMES[name]
    tensors, _ = PACK[scheme.layout](torch.randn(N, K).bfloat16(), scheme)
    compiled = torch.compile(xpu.linear, fullgraph=True, backend="eager", dynamic=True)
    for rows in (5, 7):
        assert compiled(scheme, tensors, torch.randn(rows, K).bfloat16(), None).shape == (rows, N)


class Constructor:
    """Of `XpuFusedMoe`: what it keeps and what it would convert at the first forward."""

    def __init__(self, **arguments: Any) -> None:
        w13 = arguments["w13"]
        assert w13.is_contiguous() and arguments["w2"].is_contiguous()
        self.is_int4 = w13.dtype == torch.uint8
        self.converts = self.is_int4 and not hasattr(w13, "xpu_fused_moe")
        self.w13, self.w2 = w13, arguments["w2"]
        self.arguments = arguments


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_handed_over_as_stored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    E, H, I = 4, 256, 128
    scheme = EXPERTS[name]
    interface = ModuleType("vllm_xpu_kernels.fused_moe_interface")
    interface.XpuFusedMoe = Constructor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm_xpu_kernels", ModuleType("vllm_xpu_kernels"))
    monkeypatch.setitem(sys.modules, "vllm_xpu_kernels.fused_moe_interface", interface)
    tensors = {
        n: torch.zeros(stored.shape).to(stored.dtype) for n, stored in layers.expert_tensors(scheme, E, H, I).items()
    }
    moe = xpu.fused_moe(scheme, tensors, top_k=2, activation="silu")
    assert not moe.converts, "the first forward must copy nothing"
    for part, held in (("gate_up_proj", moe.w13), ("down_proj", moe.w2)):
        assert held.data_ptr() == tensors[part].data_ptr()
        assert held.dtype == {
            "int4_experts": torch.int8,  # what the C++ takes for int4
            "mxfp4_experts": torch.float4_e2m1fn_x2,
        }.get(scheme.layout, torch.float8_e5m2 if "e5m2" in name else torch.float8_e4m3fn)
    assert moe.arguments["w13_scales"].data_ptr() == tensors["gate_up_proj_scale"].data_ptr()
    assert moe.arguments["num_experts"] == E
    assert moe.is_int4 == (scheme.layout == "int4_experts"), "the constructor takes uint8 for int4"
