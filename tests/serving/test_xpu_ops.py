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
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support import released_wheels, xpu_stand_ins
from support.ark import moe
from support.models import EXPERTS, PACK, SCHEMES, pack_matrices

from xpuquant import ark_ops, layers
from xpuquant import xpu_ops as xpu
from xpuquant.errors import EnvironmentFault, UnsupportedError
from xpuquant.formats.scheme import ARK_LAYOUTS, Scheme
from xpuquant.xpu_releases import Release, check_release, refusal_of_experts, release_of, served, since

N, K = 256, 384


# Namespaces that vllm-xpu-kernels registers with torch, and what of it this project calls.
NAMESPACES = {"_C", "_moe_C", "_xpu_C", "vllm_xpu_kernels", "fused_moe_interface"}
OPERATORS = {
    *("int4_gemm_w4a16", "int4_gemm_w4a8", "fp8_gemm_w8a16", "fp8_gemm", "fp4_gemm", "XpuFusedMoe"),
    *("remap_hidden_states", "moe_gather", "moe_gemm_prefill", "moe_gemm_decode"),
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


def test_operators_are_named_in_two_modules() -> None:
    """What verifies and what serves make the same calls, because there is one place to make each: ARK's and those
    around them, and all others."""
    root = Path(__file__).parents[2]
    sources = [path for room in ("convert", "formats", "kernels", "xpuquant") for path in (root / room).rglob("*.py")]
    callers = {
        str(path.relative_to(root)): found
        for path in sources
        if (found := set(names(ast.parse(path.read_text()))) & (NAMESPACES | OPERATORS))
    }
    assert len(sources) > 50
    others, arks = callers.pop("xpuquant/xpu_ops.py"), callers.pop("xpuquant/ark_ops.py")
    assert others >= {"int4_gemm_w4a16", "fp8_gemm", "XpuFusedMoe"}
    assert arks >= {"remap_hidden_states", "moe_gather"}
    assert not others & arks & OPERATORS
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


@pytest.mark.parametrize("name", ["mxfp8", "mxfp8-e5m2", "mxfp4"])
def test_a_single_group_of_columns(name: str, release: Release) -> None:
    """K = 32: `fp8_gemm` would read the one column of scales as one scale per token."""
    torch.manual_seed(3)
    tensors, values = PACK[SCHEMES[name].layout](torch.randn(48, 32).bfloat16(), SCHEMES[name])
    assert tensors["weight_scale"].shape == (1, 48)
    x = torch.randn(3, 32).bfloat16()
    wanted = x.float() @ values.t()
    # Of MXFP8 the scale is one per channel, for which activations are not rounded.
    rounding = 0.2 if name == "mxfp4" else 2**-7
    assert (xpu.linear(SCHEMES[name], tensors, x, None).float() - wanted).norm() < rounding * wanted.norm()


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


@pytest.fixture
def wheel(release: Release, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Release:
    """The wheel's own Python, over the stand-ins."""
    root = released_wheels.python_of(release, tmp_path_factory.getbasetemp() / "wheels")
    for name in [name for name in sys.modules if name.startswith("vllm_xpu_kernels")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in released_wheels.package_without_libraries(root).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(xpu, "check_experts", lambda *_: release)
    return release


ROUTES = torch.tensor([[0, 1], [3, 2], [1, 3], [-1, -1], [2, 0]])


@pytest.mark.network
@pytest.mark.parametrize("gate", ["silu", "relu2_no_mul"])
@pytest.mark.parametrize("name", [name for name in EXPERTS if EXPERTS[name].layout not in ARK_LAYOUTS])
def test_the_wheel_s_own_experts_compute_what_is_stored(name: str, gate: str, wheel: Release) -> None:
    """`XpuFusedMoe` of each release, from its constructor to the routed sum; a row of padding gives zeros."""
    E, H, I = 4, 256, 128
    scheme = replace(EXPERTS[name], gated=gate == "silu")
    tensors: dict[str, torch.Tensor] = {}
    torch.manual_seed(3)
    for part, (N, K) in zip(scheme.stacks, ((I * (1 + scheme.gated), H), (H, I)), strict=True):
        stacked = [PACK[scheme.layout](torch.randn(N, K).bfloat16() / 8, scheme)[0] for _ in range(E)]
        for suffix in stacked[0]:
            stack = torch.stack([one[suffix] for one in stacked])
            tensors[part + suffix] = stack.reshape(E) if stack.shape == (E, 1) else stack
    if scheme.layout == "int4_experts":
        tensors |= {n: t.bfloat16() for n, t in tensors.items() if n.endswith("_scale")}
    before = {n: (t.data_ptr(), t.clone().view(torch.uint8)) for n, t in tensors.items()}
    moe = xpu.fused_moe(scheme, tensors, top_k=2, activation=gate)
    for part, held in zip(scheme.stacks, (moe.w13, moe.w2), strict=True):
        assert held.data_ptr() == before[part][0], "nothing is copied"
    x = torch.randn(len(ROUTES), H).bfloat16()
    x[3] = torch.nan  # what padding holds
    weights = torch.rand(ROUTES.shape)
    out = xpu.run_experts(moe, x, weights, ROUTES.int())
    known = x.nan_to_num()
    wanted = layers.experts(scheme, tensors, known, weights, ROUTES, partial(layers.activated, scheme, gate)).float()
    assert (out.float() - wanted).norm() < 2**-6 * wanted.norm()
    assert not out[3].any()
    assert all(torch.equal(t.view(torch.uint8), before[n][1]) for n, t in tensors.items()), "nothing is converted"


@pytest.mark.network
def test_another_way_to_take_int4_is_noticed(wheel: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_xpu_kernels import fused_moe_interface

    class Moved(fused_moe_interface.XpuFusedMoe):  # type: ignore[misc]
        w13: torch.Tensor

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.w13 = self.w13.clone()

    monkeypatch.setattr(fused_moe_interface, "XpuFusedMoe", Moved)
    scheme = EXPERTS["int4"]
    tensors = {n: torch.zeros(s.shape).to(s.dtype) for n, s in layers.expert_tensors(scheme, 4, 256, 128).items()}
    with pytest.raises(EnvironmentFault, match=f"{wheel.version} takes int4 experts otherwise"):
        xpu.fused_moe(scheme, tensors, top_k=2, activation="silu")


GATELESS = replace(EXPERTS["int4"], gated=False)
INTERLEAVED = replace(EXPERTS["mxfp4"], interleaved=True)
NEW, OLD = served()[-1], release_of("0.1.15.4")
REFUSED = [
    (OLD, EXPERTS["int4"], 12, "silu", None, {}, "1, 2, 4, 6, 7, 8, 10 or 16 experts per token, not 12; 0.1.16.1 does"),
    (NEW, EXPERTS["int4"], 5, "silu", None, {}, "10, 12 or 16 experts per token, not 5"),
    (NEW, EXPERTS["int4"], 8, "swigluoai_uninterleave", None, {}, "computes 'swigluoai_uninterleave' experts"),
    (NEW, EXPERTS["int4"], 8, "situ", None, {}, "computes 'situ' experts"),
    (NEW, EXPERTS["int4"], 8, "swigluoai", None, {}, "reads other rows than the stored ones, which are all gate"),
    (NEW, INTERLEAVED, 8, "silu", None, {}, "reads other rows than the stored ones, which alternate"),
    (NEW, INTERLEAVED, 8, "swigluoai", 7.0, {}, "cannot be clamped at 7.0"),
    (NEW, GATELESS, 8, "relu2_no_mul", 7.0, {}, "experts without a gate cannot be clamped at 7.0"),
    (NEW, GATELESS, 8, "silu_no_mul", None, {}, "computes 'silu_no_mul' experts without a gate: relu2_no_mul"),
    (NEW, EXPERTS["int4"], 8, "relu2_no_mul", None, {}, "computes 'relu2_no_mul' experts: silu"),
    (NEW, EXPERTS["int4"], 8, "silu", None, {"VLLM_XPU_FUSED_MOE_USE_REF": "1"}, "USE_REF=1 chooses code"),
    (NEW, EXPERTS["mxfp8"], 8, "silu", None, {"VLLM_XPU_FUSED_MOE_NATIVE_MXFP8": "off"}, "NATIVE_MXFP8=off chooses"),
]


@pytest.mark.parametrize(("release", "scheme", "k", "gate", "limit", "environment", "said"), REFUSED)
def test_what_would_fail_at_the_first_forward_is_said_before(
    release: Release, scheme: Scheme, k: int, gate: str, limit: float | None, environment: dict[str, str], said: str
) -> None:
    reason = refusal_of_experts(release, scheme, k, gate, limit, environment)
    assert said in (reason or "") and "\n" not in (reason or "")


def test_what_the_kernels_take_is_not_refused() -> None:
    for release in served():
        assert refusal_of_experts(release, EXPERTS["int4"], 8, "silu", 7.0, {}) is None
        assert refusal_of_experts(release, GATELESS, 6, "relu2_no_mul", None, {}) is None
        assert refusal_of_experts(release, INTERLEAVED, 4, "swigluoai", None, {}) is None
        # The reference code reads these layouts as they are stored.
        assert (
            refusal_of_experts(release, EXPERTS["mxfp4"], 8, "silu", None, {"VLLM_XPU_FUSED_MOE_USE_REF": "1"}) is None
        )


@pytest.mark.parametrize(
    ("version", "said"),
    [(None, "is not installed"), ("0.1.14.1", "is too old"), ("0.1.17.1", "is newer than this xpuquant knows")],
)
def test_releases_that_are_not_served_with_are_refused(version: str | None, said: str) -> None:
    with pytest.raises(EnvironmentFault, match=said) as error:
        check_release(version)
    assert "pip install 'vllm-xpu-kernels>=0.1.15,<0.1.17'" in str(error.value)


@pytest.mark.parametrize("version", ["0.1.15.4", "0.1.16.2+xpu", "0.1.16.9", "0.1.dev3+gabc"])
def test_releases_that_are_served_with(version: str) -> None:
    check_release(version)


def test_gpus_of_other_generations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xpu, "installed", lambda: NEW)
    for xe2, xe3 in ((False, False), (True, False), (False, True)):
        arch = SimpleNamespace(is_xe2_arch=lambda xe2=xe2: xe2, is_xe3_arch=lambda xe3=xe3: xe3)
        monkeypatch.setattr(xpu, "operators", lambda arch=arch: arch)
        if xe2 or xe3:
            assert xpu.check_experts(EXPERTS["int4"], 8, "silu") is NEW
            with pytest.raises(UnsupportedError, match="not 5"):
                xpu.check_experts(EXPERTS["int4"], 5, "silu")
        else:
            with pytest.raises(EnvironmentFault, match="Xe2 and Xe3"):
                xpu.check_experts(EXPERTS["int4"], 8, "silu")


def test_since_when_a_layout_is_served() -> None:
    assert since(EXPERTS["int4"]) == since(SCHEMES["fp8-block"]) == "0.1.15.1"
    assert since(EXPERTS["int4"], 12) == "0.1.16.1"
    assert since(EXPERTS["int4"], 5) is None
    assert since(Scheme("ct_int4")) is None


def remap_hidden_states(
    *,
    hidden_states: torch.Tensor,
    hidden_states_scales: None,
    remapped_hidden_states: torch.Tensor,
    remapped_hidden_states_scales: None,
    expert_map: torch.Tensor | None,
    rows_per_expert: torch.Tensor,
    unpermuted_row_to_permuted_row: torch.Tensor,
    topk_ids: torch.Tensor,
    total_experts_num: int,
    local_experts_num: int,
) -> None:
    """Rows by expert; what is routed to another rank gets none (vllm-xpu-kernels csrc/moe)."""
    assert rows_per_expert.dtype == unpermuted_row_to_permuted_row.dtype == torch.int32
    assert rows_per_expert.tolist() == [0] * local_experts_num
    places = topk_ids if expert_map is None else expert_map[topk_ids]
    assert len(expert_map) == total_experts_num if expert_map is not None else total_experts_num == local_experts_num
    remapped_hidden_states.fill_(torch.nan)
    at = 0
    for expert in range(local_experts_num):
        for row, slot in (places == expert).nonzero().tolist():
            remapped_hidden_states[at] = hidden_states[row]
            rows_per_expert[expert] += 1
            unpermuted_row_to_permuted_row[row, slot] = at
            at += 1
    unpermuted_row_to_permuted_row[places < 0] = -1


def moe_gather(out: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, _: int) -> None:
    taken = torch.where((places >= 0).unsqueeze(-1), rows[places.clamp(min=0)].float(), 0.0)
    out.copy_((taken * weights.float().unsqueeze(-1)).sum(1))


def relu2_no_mul(out: torch.Tensor, up: torch.Tensor) -> None:
    out.copy_(up.float().relu().square())


def silu_and_mul(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("gate", ["silu", "relu2_no_mul"])
@pytest.mark.parametrize("name", [name for name in EXPERTS if EXPERTS[name].layout in ARK_LAYOUTS])
def test_ark_is_handed_the_stored_experts(name: str, gate: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routed as `XpuFusedMoe` routes; each rank of an expert parallel group adds its part."""
    E, H, I = 4, 256, 128
    scheme = replace(EXPERTS[name], gated=gate == "silu")
    for module in ("vllm_xpu_kernels", "vllm_xpu_kernels.fused_moe_interface"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(ark_ops, "ark", lambda: SimpleNamespace(moe=moe))
    monkeypatch.setattr(xpu, "check_experts", lambda *_: NEW)
    stand_ins = SimpleNamespace(remap_hidden_states=remap_hidden_states, moe_gather=moe_gather)
    monkeypatch.setattr(torch.ops, "_moe_C", stand_ins, raising=False)
    monkeypatch.setattr(
        torch.ops, "_C", SimpleNamespace(silu_and_mul=silu_and_mul, relu2_no_mul=relu2_no_mul), raising=False
    )
    torch.manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    for part, shapes in zip(scheme.stacks, ([(I, H)] * (1 + scheme.gated), [(H, I)]), strict=True):
        packed = [pack_matrices([torch.randn(*each).bfloat16() / 8 for each in shapes], scheme)[0] for _ in range(E)]
        tensors |= {part + end: torch.stack([one[end] for one in packed]) for end in packed[0]}
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {
        n: (stored.shape, stored.dtype) for n, stored in layers.expert_tensors(scheme, E, H, I).items()
    }
    x, weights, ids = torch.randn(6, H).bfloat16(), torch.rand(6, 2), torch.rand(6, E).topk(2).indices
    wanted = layers.experts(scheme, tensors, x, weights, ids, partial(layers.activated, scheme, gate))
    total = torch.zeros(6, H)
    for rank in range(ranks):
        here = slice(rank * E // ranks, (rank + 1) * E // ranks)
        mine = {n: t[here].to(x.dtype) if xpu.cast_when_loaded(scheme, n) else t[here] for n, t in tensors.items()}
        places = torch.full((E,), -1, dtype=torch.int32)
        places[here] = torch.arange(E // ranks, dtype=torch.int32)
        expert_map = places if ranks > 1 else None
        run = xpu.fused_moe(scheme, mine, 2, gate, ep_rank=rank, ep_size=ranks, expert_map=expert_map)
        total += xpu.run_experts(run, x, weights, ids).float()
    torch.testing.assert_close(total, wanted.float(), atol=0.02 * wanted.abs().max().item(), rtol=0)
