"""What the XPU kernels are handed: the stored bytes themselves, in the shapes and strides their C++ checks.

There is no Intel GPU here. The ops are stood in for by functions that check what the kernels of a release check and
then compute from what they were handed, as that release does (`tests/support/xpu_stand_ins.py`); the result is compared
with the dequantized weight.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import xpu_stand_ins
from support.models import EXPERTS, PACK, SCHEMES

from xpuquant import layers
from xpuquant import xpu_ops as xpu
from xpuquant.xpu_releases import Release, served

N, K = 256, 384


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
    assert callers.pop("xpuquant/xpu_ops.py") >= {"int4_gemm_w4a16", "fp8_gemm", "XpuFusedMoe"}
    assert not callers


@pytest.fixture(scope="module", params=served(), ids=lambda release: release.version)
def release(request: pytest.FixtureRequest) -> Iterator[Release]:
    """Each release that serves, with stand-ins that behave as it does."""
    with xpu_stand_ins.registered(request.param):
        yield request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_linear_is_handed_over_as_stored(name: str, bias: bool, release: Release) -> None:
    scheme = SCHEMES[name] if SCHEMES[name].group_size >= 0 else replace(SCHEMES[name], group_size=K)
    torch.manual_seed(1)
    tensors, values = PACK[scheme.layout](torch.randn(N, K).bfloat16(), scheme)
    if "scales" in tensors:
        tensors["scales"] = tensors["scales"].bfloat16()
    x, b = torch.randn(5, K).bfloat16(), torch.randn(N).bfloat16() if bias else None
    seen = x.index_select(1, tensors["g_idx"]) if scheme.act_order else x
    answer = xpu.linear(scheme, tensors, seen, b)
    wanted = torch.nn.functional.linear(x.float(), values, None if b is None else b.float())
    assert answer.shape == (5, N)
    # Rounding activations costs 2 to 4 % in FP8 and 16 % in MXFP4; kernels/test_vllm_xpu.py is sharper.
    rounding = {"mxfp4": 0.2, "mxfp8-e5m2": 0.08, "mxfp8": 0.05, "fp8-block": 0.05}.get(name, 2**-7)
    assert (answer.float() - wanted).norm() < rounding * wanted.norm()
    # The same layer on any other machine, where activations are not rounded.
    here = layers.linear(scheme, tensors, x, b).float()
    assert (here - answer.float()).norm() < 2 * rounding * wanted.norm()


@pytest.mark.parametrize("columns", [1, 3])
def test_blocks_of_fewer_rows_and_a_single_column_of_blocks(columns: int, release: Release) -> None:
    scheme = replace(SCHEMES["fp8-block"], block_n=64)
    torch.manual_seed(2)
    tensors, values = PACK["fp8_linear"](torch.randn(576, 128 * columns).bfloat16(), scheme)
    assert tensors["weight_scale"].shape == (columns, 9)
    x = torch.randn(3, 128 * columns).bfloat16()
    wanted = x.float() @ values.t()
    # A single column of blocks is a scale per channel, for which activations are not rounded.
    assert (xpu.linear(scheme, tensors, x, None).float() - wanted).norm() < (
        2**-7 if columns == 1 else 0.05
    ) * wanted.norm()


@pytest.mark.parametrize("release", served()[-1:], indirect=True)  # their schemas are the same
@pytest.mark.parametrize("name", ["int4", "int4-asym", "fp8-tensor", "fp8-channel", "fp8-block", "mxfp4", "mxfp8"])
def test_a_linear_compiles_whole(name: str, release: Release) -> None:
    """vLLM compiles models on Intel GPUs unless told otherwise, and takes no graph break."""
    scheme = SCHEMES[name]
    tensors, _ = PACK[scheme.layout](torch.randn(N, K).bfloat16(), scheme)
    if "scales" in tensors:
        tensors["scales"] = tensors["scales"].bfloat16()
    torch.compiler.reset()
    compiled = torch.compile(xpu.linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 7):
        x = torch.randn(rows, K).bfloat16()
        assert torch.equal(compiled(scheme, tensors, x, None), xpu.linear(scheme, tensors, x, None))


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
