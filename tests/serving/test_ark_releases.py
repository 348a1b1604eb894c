"""ARK's expert kernels by release: what is on record, what is refused, and our call against the released Python."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import EXPERTS, PACK

from xpuquant import ark_ops
from xpuquant import xpu_ops as xpu
from xpuquant.ark_releases import (
    ARK_FAULTS,
    ARK_PACKAGE,
    COUNTS_ROWS,
    ArkRelease,
    ark_release,
    check_ark,
    refusal_of_switches,
    released_ark,
)
from xpuquant.errors import EnvironmentFault, UnsupportedError
from xpuquant.formats.scheme import ARK_LAYOUTS
from xpuquant.xpu_releases import served

CASES = [name for name, scheme in EXPERTS.items() if scheme.layout in ARK_LAYOUTS]
E, N, K = 3, 32, 256


def called(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `moe` gets for a stack of experts that is stored so."""
    scheme = EXPERTS[name]
    packed = [PACK[scheme.layout](torch.randn(N, K).bfloat16(), scheme)[0] for _ in range(E)]
    stacks = {part: torch.stack([one[part] for one in packed]) for part in packed[0]}
    got: list[Any] = []
    monkeypatch.setattr(ark_ops, "ark", lambda: SimpleNamespace(moe=lambda *args, **named: got.append((args, named))))
    scale, zeros = stacks["_scale"].bfloat16(), stacks.get("_zero_point")
    zeros = None if zeros is None else zeros.bfloat16()
    x, rows = torch.randn(7, K).bfloat16(), torch.tensor([4, 0, 3], dtype=torch.int32)
    ark_ops.ark_gemm(scheme, stacks[""], scale, zeros, x, rows)
    ((args, named),) = got
    return args, named


@pytest.mark.parametrize("release", [r for r in released_ark() if r.is_served], ids=lambda release: release.version)
@pytest.mark.parametrize("name", CASES)
def test_the_call_fits_the_released_function(name: str, release: ArkRelease, monkeypatch: pytest.MonkeyPatch) -> None:
    args, named = called(name, monkeypatch)
    signature = inspect.signature(eval(f"lambda {release.operators['moe']}: None"))
    bound = signature.bind(*args, **named).arguments
    assert list(bound)[:3] == ["activations", "weights", "num_tokens_per_expert"]
    assert bound.keys() >= {"scales", "zeros", "weight_bits", "group_size", "asym"}
    # `moe` hands all of it on.
    assert {"zeros", "asym"} <= set(
        inspect.signature(eval(f"lambda {release.operators['moe_gemm_decode']}: 0")).parameters
    )


@pytest.mark.parametrize("name", CASES)
def test_the_released_checks_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the installed wheel's own Python, taken out of it: what is around them calls an Intel GPU."""
    ark = pytest.importorskip("auto_round_kernel")
    check_ark(version(ARK_PACKAGE))
    check = _taken_out(ark)
    args, named = called(name, monkeypatch)
    on_gpu = type("OnGpu", (torch.Tensor,), {"device": property(lambda _: torch.device("xpu"))})
    x, weight, rows = (tensor.as_subclass(on_gpu) for tensor in args)
    found = check(x, weight, rows, **named, api_name="moe")
    assert found[-4:] == (7, N, K, E)
    wrong = {**named, "scales": named["scales"].float()}
    with pytest.raises(ValueError, match="scales dtype must match"):
        check(x, weight, rows, **wrong, api_name="moe")
    # Expert parallelism: rows of other ranks' experts are left at the end.
    fewer = torch.tensor([4, 0, 1], dtype=torch.int32).as_subclass(on_gpu)
    check(x, weight, fewer, **named, api_name="moe")
    monkeypatch.setenv(COUNTS_ROWS, "1")
    with pytest.raises(ValueError, match="total_tokens"):
        check(x, weight, fewer, **named, api_name="moe")


def _taken_out(ark: Any) -> Callable[..., tuple[Any, ...]]:
    names = ("_validate_moe_quant_args", "_check_routing_total", "moe_routing_validation_enabled")
    tree = ast.parse(inspect.getsource(ark))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(functions) == len(names)
    space = {**vars(ark), "cvt_dtype": str}
    exec(compile(ast.Module([*functions], []), "<auto_round_kernel>", "exec"), space)
    checked: Callable[..., tuple[Any, ...]] = space[names[0]]
    return checked


def test_what_is_on_record() -> None:
    known = {release.version: release for release in released_ark()}
    assert [v for v, release in known.items() if "moe" in release.operators] == ["0.15.0", "0.16.0"]
    assert known["0.16.0"].is_served and not known["0.15.0"].is_served
    for kernel in ("MoEDecodeKernelInt4", "MoEDecodeKernelInt8", "MoEDequantKernelInt4Fast", "MoEDequantKernelInt8"):
        assert kernel in known["0.16.0"].zero_points
    assert [[r.version for r in released_ark() if fault.in_release(r)] for fault in ARK_FAULTS] == [
        ["0.15.0"],
        ["0.16.0"],
        ["0.16.0"],
    ]
    assert ark_release("0.16.3") is known["0.16.0"]


@pytest.mark.parametrize(
    ("found", "said"),
    [(None, "is not installed"), ("0.15.0", "0.15.0 is too old"), ("0.17.1", "is newer than this xpuquant knows")],
)
def test_releases_that_are_not_served_with_are_refused(found: str | None, said: str) -> None:
    with pytest.raises(EnvironmentFault, match=said) as error:
        check_ark(found)
    assert "pip install 'auto-round-lib>=0.16,<0.17'" in str(error.value)


@pytest.mark.parametrize("found", ["0.16.0", "0.16.2+xpu"])
def test_releases_that_are_served_with(found: str) -> None:
    check_ark(found)


def test_a_switch_that_refuses_other_ranks_rows_is_said_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = SimpleNamespace(is_xe2_arch=lambda: True)
    monkeypatch.setattr(xpu, "installed", lambda: served()[-1])
    monkeypatch.setattr(xpu, "operators", lambda: arch)
    monkeypatch.setattr(ark_ops, "ark", lambda: None)
    monkeypatch.setenv(COUNTS_ROWS, "yes")
    xpu.check_experts(EXPERTS["uint4"], 8, "silu")
    xpu.check_experts(EXPERTS["int4"], 8, "silu", ep_size=2)  # not ARK's
    with pytest.raises(UnsupportedError, match=f"{COUNTS_ROWS}=yes makes ARK refuse.*unset it"):
        xpu.check_experts(replace(EXPERTS["uint4"]), 8, "silu", ep_size=2)
    assert all(refusal_of_switches(2, {COUNTS_ROWS: value}) is None for value in ("0", "Off", "false", "no"))
    assert refusal_of_switches(2, {}) is None
