"""Results as answers: what a person reads at the end of a command, and the same as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from xpuquant.conversion.cli.output import Answer, Grid
from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.plan.survey import PlannedModule, kind_of
from xpuquant.conversion.report.reports import as_data
from xpuquant.conversion.report.sentences import in_one_line
from xpuquant.conversion.runs.local import Result
from xpuquant.conversion.sizes import size
from xpuquant.conversion.sources.base import Source
from xpuquant.formats.scheme import compact
from xpuquant.formats.weights.base import PIECE_BYTES

_KERNELS = {
    "int4_linear": "int4_gemm_w4a16",
    "int4_experts": "grouped GEMM s4",
    "fp8_linear": "fp8_gemm_w8a16 / fp8_gemm",
    "fp8_experts": "grouped GEMM fp8",
    "mxfp4_linear": "fp4_gemm",
    "mxfp4_experts": "grouped GEMM mxfp4",
    "mxfp8_linear": "fp8_gemm (mx)",
    "mxfp8_experts": "grouped GEMM mxfp8",
    "ct_int4": "int4_gemm_w4a16",
    "ct_fp8": "fp8_gemm_w8a16 / fp8_gemm",
    "ct_mxfp4": "fp4_gemm",
    "ct_mxfp8": "fp8_gemm (mx)",
}

_ON_THE_WAY_BYTES = 16 << 20
"""Per worker: parts made ahead, blocks before the disk."""


def converted(result: Result) -> Answer:
    """The end of `convert`."""
    plan, out = result.plan, result.out
    verification = result.verification
    checked = "not verified (--no-verify)" if verification is None else in_one_line(verification)
    device = "xpu" if plan.options.layout == "xpu" else "auto"
    facts = Grid(
        "",
        ("", ""),
        (
            ("left as is", left_alone(plan)),
            (
                "size",
                f"{size(result.source.nbytes)} → {size(plan.write_bytes)} in {len(plan.shards)} shard(s)",
            ),
            ("verified", checked),
            ("written to", str(out)),
            ("serve", f"vllm serve {out}"),
            ("", f'AutoModelForCausalLM.from_pretrained("{out}", device_map="{device}")'),
        ),
    )
    data = plan_data(plan, result.source) | {
        "out": str(out),
        "shards": {name: {"sha256": f.sha256, "bytes": f.nbytes} for name, f in sorted(result.shards.items())},
        "verification": None if verification is None else as_data(verification),
    }
    notes = [f"note: {note}" for note in plan.notes]
    return Answer([*notes, modules_grid(plan.modules), facts], data)


def planned(plan: Plan, source: Source, jobs: int) -> Answer:
    """`convert --dry-run`."""
    shards = Grid(
        "output shards",
        ("file", "tensors", "size"),
        [(shard.name, str(len(shard.tensors)), size(shard.nbytes)) for shard in plan.shards],
    )
    memory = jobs * (PIECE_BYTES + _ON_THE_WAY_BYTES)
    facts = Grid(
        "",
        ("", ""),
        (
            ("left as is", left_alone(plan)),
            ("reads", size(plan.read_bytes)),
            ("writes", size(plan.write_bytes)),
            ("buffers", f"about {size(memory)} with {jobs} jobs, whatever the size of the model"),
        ),
    )
    notes = [f"note: {note}" for note in plan.notes]
    return Answer([*notes, modules_grid(plan.modules), shards, facts], plan_data(plan, source))


def modules_grid(modules: Iterable[PlannedModule]) -> Grid:
    """Modules per scheme: what they were, what they become, which kernel will run them."""
    rows: dict[tuple[str, str, str], list[PlannedModule]] = {}
    for module in modules:
        scheme = module.conversion.scheme
        becomes = "bf16 (dequantized)" if scheme is None else scheme.label()
        kernel = "bf16 matmul" if scheme is None else _KERNELS.get(scheme.layout, scheme.layout)
        rows.setdefault((kind_of(module.source), becomes, kernel), []).append(module)
    return Grid(
        "modules",
        ("source", "stored as", "XPU kernel", "modules", "size"),
        [(*key, str(len(members)), size(sum(member.nbytes for member in members))) for key, members in rows.items()],
    )


def left_alone(plan: Plan) -> str:
    """What stays unquantized, and why."""
    if not plan.passed:
        return "nothing"
    total = sum(tensor.nbytes for tensor in plan.passed)
    matrices = [tensor.name for tensor in plan.passed if len(tensor.shape) >= 2]
    shown = ", ".join(compact(name.removesuffix(".weight") for name in matrices)[:8])
    return f"{len(plan.passed)} tensors ({size(total)}), not quantized in the source: norms, {shown}"


def plan_data(plan: Plan, source: Source) -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "source": {"name": source.name, "revision": source.revision, "bytes": source.nbytes},
        "options": plan.options.as_dict(),
        "modules": {planned.conversion.name: _module_data(planned) for planned in plan.modules},
        "passed_tensors": [tensor.name for tensor in plan.passed],
        "notes": list(plan.notes),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "output": [
            {
                "file": shard.name,
                "bytes": shard.nbytes,
                "tensors": [
                    {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape} for tensor in shard.tensors
                ],
            }
            for shard in plan.shards
        ],
    }


def _module_data(planned: PlannedModule) -> Mapping[str, Any]:
    scheme = planned.conversion.scheme
    return {
        "source": kind_of(planned.source),
        "scheme": None if scheme is None else scheme.label(),
        "kernel": None if scheme is None else _KERNELS.get(scheme.layout),
        "bytes": planned.nbytes,
        "decisions": list(planned.conversion.facts),
    }
