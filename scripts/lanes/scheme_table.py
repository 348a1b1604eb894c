"""Scheme × (linear, experts): what it is stored as, what computes that, since when, how exactly, and what was run here.

    scheme_table.py            compare docs/schemes.md with what is made; exit status 1 where they differ
    scheme_table.py --record   write the page's tables

Nothing is written down twice. Layouts, kernels and releases are those of the package, bytes per weight are counted in
the tensors that loaders are told of, and what was run is read out of the tables of cases that the tests are
parametrized with: a case that is taken away takes its entry with it. What shipped device code was executed stands in
`kernel_table.py`. Refusals are those of the layouts' source, each beside the test of its message.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "schemes.md"
for folder in (TESTS, TESTS / "serving", TESTS / "serving" / "vllm_plugin", Path(__file__).parent):
    sys.path.insert(0, str(folder))

import kernel_table  # noqa: E402
import support.layers as by_hand  # noqa: E402
from shipped_table import EXECUTED  # noqa: E402
from support.checkpoints import FIXTURES  # noqa: E402
from support.models import EXPERTS, SCHEMES  # noqa: E402

from xpuquant import layers, xpu_releases  # noqa: E402
from xpuquant.ark_releases import ARK_PACKAGE, released_ark  # noqa: E402
from xpuquant.conversion.options import Options  # noqa: E402
from xpuquant.conversion.plan.survey import survey_modules  # noqa: E402
from xpuquant.conversion.sources.open import open_source  # noqa: E402
from xpuquant.formats.layouts import layouts_by_name  # noqa: E402
from xpuquant.formats.scheme import ARK_LAYOUTS, Scheme  # noqa: E402
from xpuquant.kernels.integers import integer_scheme  # noqa: E402


class Row(NamedTuple):
    """A scheme as people name it, and how one of its linears and its experts are stored; None: refused, see below."""

    scheme: str
    linear: Scheme | None
    experts: Scheme | None


G = 128
ROWS = (
    Row("int4 symmetric; 1 to 3 bits", Scheme("int4_linear", group_size=G), Scheme("int4_experts", group_size=G)),
    Row(
        "int4 asymmetric",
        Scheme("int4_linear", group_size=G, symmetric=False),
        Scheme("uint4_experts", group_size=G, symmetric=False),
    ),
    Row("int4 in act-order, symmetric", Scheme("int4_linear", group_size=G, act_order=True), None),
    Row("int4 in act-order, asymmetric", Scheme("int4_linear", group_size=G, act_order=True, symmetric=False), None),
    Row(
        "5 to 8 bits symmetric, 5 to 7 asymmetric; W8A8 as W8A16; int4 beside 8 bits in a stack",
        Scheme("int8_linear", group_size=G),
        Scheme("int8_experts", group_size=G),
    ),
    Row(
        "8 bits asymmetric",
        Scheme("int8_linear", group_size=G, symmetric=False),
        Scheme("int8_experts", group_size=G, symmetric=False),
    ),
    Row("5 to 8 bits in act-order", Scheme("int8_linear", group_size=G, act_order=True), None),
    Row(
        "FP8 per tensor",
        Scheme("fp8_linear", "tensor", scale_dtype="F32"),
        Scheme("fp8_experts", "tensor", scale_dtype="F32"),
    ),
    Row(
        "FP8 per channel",
        Scheme("fp8_linear", "channel", scale_dtype="F32"),
        Scheme("fp8_channel_experts", "channel", scale_dtype="F32"),
    ),
    Row(
        "FP8 in blocks of 128 × 128",
        Scheme("fp8_linear", "block", 128, 128, scale_dtype="F32"),
        Scheme("fp8_experts", "block", 128, 128, scale_dtype="F32"),
    ),
    Row("FP8 per group; blocks that do not divide experts", None, Scheme("fp8_channel_experts", group_size=G)),
    Row(
        "MXFP4; gpt-oss",
        Scheme("mxfp4_linear", group_size=32, scale_dtype="U8"),
        Scheme("mxfp4_experts", group_size=32, scale_dtype="U8"),
    ),
    Row(
        "MXFP8",
        Scheme("mxfp8_linear", group_size=32, scale_dtype="U8"),
        Scheme("mxfp8_experts", group_size=32, scale_dtype="U8"),
    ),
    Row(
        "NVFP4; W4A4 as W4A16",
        Scheme("nvfp4_linear", group_size=16),
        Scheme("nvfp4_experts", group_size=16),
    ),
)

SIZE = 4096
"""N and K of the matrix whose bytes are counted."""

ROUNDED = {
    "int4_linear": "not known: oneDNN makes the GPU's code",
    "int8_linear": "as int4; the two planes are summed by the kernel",
    "nvfp4_linear": "as int4; the product times the global scale, in float32",
    "fp8_linear": "not known: oneDNN makes the GPU's code",
    "fp8_linear block": "activations, to FP8 per token and 128 columns",
    "mxfp4_linear": "activations, to MXFP4",
    "mxfp8_linear": "activations, to MXFP8",
    "int4_experts": "code · scale, to 16 bits",
    "uint4_experts": "(code − zero point) · scale, to 16 bits, in prefill",
    "int8_experts": "(code − zero point) · scale, to 16 bits, in prefill",
    "fp8_experts": "no weight",
    "fp8_channel_experts": "float32 scales, to 16 bits, once; code · scale, to 16 bits, in prefill",
    "mxfp4_experts": "no weight in bfloat16",
    "mxfp8_experts": "no weight in bfloat16",
    "nvfp4_experts": "no weight; the product times the global scale, in float32",
}
"""Layout → what its kernel rounds besides sums and outputs: shipped-kernels.md has it measured."""

UNLESS = {"int8_linear": "yes; refused where 16 · scale overflows its dtype"}
"""Layout → when the stored values are not the source's; the others' always are."""


SOURCES = ("layouts/xpu/*.py", "layouts/base.py", "layouts/stacks.py", "layouts/members.py", "readers/**/*.py")
"""Where in `formats/` refusals stand; of readers those that speak of kernels."""
_REASONS = re.compile(r"refusal|_no_group|_too_odd|several_dtypes|not_quantized")
"""Functions there that return one."""

REFUSED = {
    "experts in act-order": "act-order experts have no XPU kernel (no expert kernel has a g_idx)",
    "int4 experts in act-order": "act-order experts have no XPU kernel (the grouped GEMM has no g_idx)",
    "an embedding": "an embedding is looked up, not multiplied: no XPU kernel reads quantized rows",
    "an embedding that GPTQModel quantized": (
        "an embedding, which GPTQModel quantizes transposed: no XPU kernel looks it up"
    ),
    "experts with biases (gpt-oss's) and zero points, 8 bits, NVFP4, or FP8 scales per channel or group": (
        "ARK's expert kernels add no bias"
    ),
    "the same without biases, gate and up alternating": (
        "rows that alternate gate and up are written for the grouped GEMM alone"
    ),
    "gpt-oss's experts in FP8 blocks, gate and up apart": "… cannot cover columns that alternate gate and up",
    "experts for ARK of other sizes": "… is […, …]; ARK's expert kernels are given multiples of …",
    "int4 experts of other sizes": "… is […, …]; the grouped GEMM needs N % 8 == 0, K % 32 == 0",
    "MX experts of other sizes": "an expert has […, …]; the grouped GEMM needs N % 8 == 0, K % 32 == 0",
    "MXFP8 experts with N = K/32": "experts of […, …] have square exponents, whose axes the grouped GEMM mistakes",
    "integer experts in other groups": "no group size of … divides the groups of all experts",
    "FP8 experts in other groups": "no group size of … divides the columns of every scale",
    "FP8 experts, said before what ARK lacks, per channel": "the grouped GEMM has no fp8 scales per channel",
    "the same, in blocks of other sizes": "the grouped GEMM has no fp8 blocks of …x… (128x128)",
    "the same, of other sizes": "… need N and K to be multiples of …, an expert has […, …]",
    "experts of a layer in both FP8 types": "experts of one layer have weights of …",
    "experts of a layer of which some are not quantized": "the experts of a layer share one format; unquantized: …",
    "NVFP4 experts of two producers": "of experts of one layer some have a factor for a global scale, some a divisor",
    "int4 and MX linears, K": "K=… is not a multiple of …",
    "integer linears, groups": "groups of … in K=… share no multiple of 32 columns",
    "int4 linears with zero points, N": "zero points need N to be a multiple of 8, N=…",
    "8-bit linears, N and K": "the planes of 8 bits need K % 32 == 0 and N % 8 == 0, not […, …]",
    "NVFP4 linears, K": "NVFP4 needs K to be a multiple of …, K=…",
    "FP8 linears in other blocks, or in groups": (
        "fp8 blocks of … have no XPU kernel for linears (they take 128 columns each)"
    ),
    "FP8 linears in blocks, K": "fp8 blocks need K to be a multiple of …, K=…",
    "FP8 linears in blocks of odd rows": "fp8 blocks of … rows cannot be cut into equal ones of at least … rows, N=…",
    "FP8 of AMD (E4M3FNUZ, E5M2FNUZ)": "… has no XPU kernel (want …)",
    "FP8 convolutions": "… … is no matrix (a convolution?): no XPU kernel",
    "FP8 with a static scale for each column": "… is … …; kernels take one static scale per tensor",
    "FP8 with a static scale of no float type": "… is …; kernels take one static scale per tensor",
    "NVFP4 with several global scales to a matrix": "… has shape …; kernels take one number over all",
    "NVFP4 with scales in a kernel's order": (
        "… has shape …: scales swizzled for Blackwell (tiles of 128x4) have no XPU kernel; take the file that an "
        "engine made them from"
    ),
    "FP8 with zero points": "fp8 with zero points has no XPU kernel",
    "int4 inside FP8": "int4 inside fp8 (AutoRound's W4A-fp8, w_bf16_to_fp8_scale) has no XPU kernel",
    "2:4 sparse": "2:4 sparse weights in the order of Marlin's tiles (marlin-24) have no XPU kernel",
    "bitmask sparse": "sparse (bitmask) weights have no XPU kernel",
    "MXFP6": "MXFP6 has no XPU kernel",
    "MXINT4": "MXINT4 has no XPU kernel",
    "MX in one byte": "an MX format of one byte per element other than FP8 has no XPU kernel",
    "NVFP4 with E5M3 scales": "NVFP4 with E5M3 scales has no XPU kernel",
}
"""What is refused for want of a kernel → the message, `…` for names and sizes."""


def kind(scheme: Scheme) -> tuple[object, ...]:
    """What tells the rows apart; experts without a gate are a row of their own."""
    granularity = scheme.granularity if scheme.layout.startswith("fp8") else ""
    return scheme.layout, granularity, scheme.symmetric, scheme.act_order


def schemes_of(row: Row) -> Iterator[tuple[str, Scheme]]:
    for of, scheme in (("linear", row.linear), ("experts", row.experts)):
        if scheme is not None:
            yield of, scheme


def bytes_per_weight(scheme: Scheme) -> float:
    """Of a matrix `[SIZE, SIZE]`, of experts the two of one expert."""
    tensors = layers.expert_tensors(scheme, 1, SIZE, SIZE) if scheme.experts else None
    tensors = tensors or layers.linear_tensors(scheme, SIZE, SIZE)
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    return total / SIZE**2 / (3 if scheme.experts else 1)


def libraries(scheme: Scheme) -> str:
    """The libraries that serve it, each with the oldest release that does."""
    found = [f"{xpu_releases.PACKAGE} {xpu_releases.since(scheme)}"]
    if scheme.layout in ARK_LAYOUTS:
        found.append(f"{ARK_PACKAGE} {next(release.version for release in released_ark() if release.is_served)}")
    return ", ".join(found)


def by_library(scheme: Scheme, backend: str) -> list[str]:
    """Cases of `tests/kernels/test_backends.py` of that kind that a library for CPUs computes: integers."""
    element = integer_scheme(scheme, SIZE)[0].layout
    if "int" not in element:
        return []
    return [f"{backend}-{case}" for case in by_hand.CASES if _case_kind(case) == kind(scheme)]


@cache
def _case_kind(case: str) -> tuple[object, ...]:
    return kind(next(by_hand.layers(case))[0].scheme)


def device_code(scheme: Scheme) -> list[str]:
    """Operators of the newest releases whose own device code was executed over stored bytes."""
    newest = xpu_releases.served()[-1]
    operators = xpu_releases.operators_of(scheme)
    found = [operator for operator in operators if kernel_table.cell(operator, newest) == "executed"]
    for (layout, operator), (mark, said) in kernel_table.ARK_CALLS.items():
        if layout == scheme.layout and mark in EXECUTED["auto_round_lib"]:
            found.append(operator if said == "executed" else f"{operator} ({said})")
    return found


def _flat(schemes: Any) -> Iterator[Scheme]:
    if isinstance(schemes, Scheme):
        yield schemes
    elif schemes is not None:
        for each in schemes:
            yield from _flat(each)


def under_vllm(scheme: Scheme) -> dict[str, list[str]]:
    """Ranks → cases of `tests/serving/vllm_plugin` whose model has a module of that kind."""
    alone, cut = import_module("test_models"), import_module("test_parallel")

    def having(cases: Mapping[str, Any]) -> list[str]:
        return [
            name
            for name, (_, linear, experts, others, *_) in cases.items()
            if kind(scheme) in {kind(each) for each in _flat([linear, experts, *others.values()])}
        ]

    both = having(cut.CASES)
    expert = [name for name in both if name in cut.EXPERT] if scheme.experts else []
    return {"1": having(alone.CASES), "TP 2": both, "EP 2": expert}


def under_transformers(scheme: Scheme) -> list[str]:
    """Cases of `tests/serving/test_transformers.py` whose model has a module of that kind."""
    module = import_module("test_transformers")
    return [
        module.case_id(case)
        for case in module.CASES
        if kind(scheme) in {kind(each) for each in _flat([SCHEMES.get(case[1]), EXPERTS.get(case[2])])}
        and case[0] != "nemotron_h"
    ]


@cache
def converted() -> Mapping[tuple[object, ...], list[str]]:
    """Kind → fixtures that have a module of it, by their headers."""
    found: dict[tuple[object, ...], list[str]] = {}
    for folder in sorted(FIXTURES.glob("*/config.json")):
        survey = survey_modules(open_source(str(folder.parent)).checkpoint, Options())
        schemes = {module.conversion.scheme for module in survey.planned} - {None}
        for each in {kind(scheme) for scheme in schemes if scheme is not None}:
            found.setdefault(each, []).append(folder.parent.name)
    return found


def _code(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(f"`{name}`" for name in listed[:most]) + more or "–"


def cells(row: Row, of: str, scheme: Scheme) -> list[str]:
    rounded = ROUNDED.get(f"{scheme.layout} {scheme.granularity}", ROUNDED[scheme.layout])
    ranks = "; ".join(f"{ranks}: {_code(cases)}" for ranks, cases in under_vllm(scheme).items() if cases)
    sized = f", g = {scheme.group_size}" if scheme.group_size == G and "int" in scheme.layout else ""
    return [
        row.scheme,
        of,
        f"`{scheme.layout}`",
        layouts_by_name()[scheme.layout].kernel_of(scheme, ""),
        libraries(scheme),
        UNLESS.get(scheme.layout, "yes"),
        rounded,
        f"{bytes_per_weight(scheme):.3f}{sized}",
        _code(by_library(scheme, "onednn")),
        _code(by_library(scheme, "ark")),
        _code(device_code(scheme), 9),
        ranks or "–",
        _code(under_transformers(scheme), 2),
        _code(converted().get(kind(scheme), []), 2),
    ]


def gateless() -> list[str]:
    """The row of experts without a gate: every layout of experts has them."""
    logits = {experts for family, _, experts in import_module("test_transformers").CASES if family == "nemotron_h"}
    alone = import_module("test_expert_ranks").SCHEMES
    schemes = [scheme for row in ROWS for of, scheme in schemes_of(row) if of == "experts"]
    count = [f"{len({kind(EXPERTS[name]) for name in names})} of {len(schemes)} kinds" for names in (logits, alone)]
    activation = "relu2_no_mul"
    assert all(activation in release.activations for release in xpu_releases.served())
    return [
        *("experts without a gate (relu squared), in any of these schemes", "experts", "as there, `up_proj` alone"),
        *("as there", "as there", "yes", "as there", "as there"),
        *("as there", "as there", _code([activation] if activation in EXECUTED["vllm_xpu_kernels"] else [])),
        f"`test_expert_ranks`, 1, TP 2 and EP 2: {count[1]}",
        f"`nemotron_h-int4-…`: {count[0]}",
        "–",
    ]


HEADS = [
    *("scheme", "of", "stored as", "kernel", "from", "exact", "the kernel rounds", "bytes per weight"),
    *("oneDNN, CPU", "ARK, CPU", "shipped device code", "vLLM tokens, CPU", "Transformers logits", "real files"),
]


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main_table() -> str:
    """As Markdown."""
    return _table(HEADS, [*(cells(row, of, scheme) for row in ROWS for of, scheme in schemes_of(row)), gateless()])


def messages() -> set[str]:
    """Every refusal for want of a kernel in the source, `…` for what is filled in."""
    found: set[str] = set()
    for pattern in SOURCES:
        for file in (ROOT / "formats").glob(pattern):
            said = set(_messages(ast.parse(file.read_text())))
            of_kernels = {text for text in said if re.search("XPU kernel|kernels take", text)}
            found |= of_kernels if pattern.startswith("readers") else said
    return found


def _messages(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        nodes: list[ast.expr | None] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            nodes = node.args[:1] if node.func.id in ("Refusal", "UnsupportedError") else []
        elif isinstance(node, ast.FunctionDef) and _REASONS.search(node.name):
            nodes = [child.value for child in ast.walk(node) if isinstance(child, ast.Return)]
        for each in nodes:
            text = _template(each)
            if any(letter.isalpha() for letter in text):
                yield text


def _template(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.IfExp):
        return _template(node.body) or _template(node.orelse)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) or "…" for part in node.values)
    return ""


_TELLING = 24
"""Letters of a message that a test must have in a row, where it has as many that are not filled in."""


def test_of(message: str) -> str | None:
    """The file of tests that has a part of a message."""
    part = max(message.split("…"), key=len)
    length = min(_TELLING, len(part.strip()))
    windows = [part.strip()[at : at + length] for at in range(len(part.strip()) - length + 1)]
    return next((file for file, text in _tests().items() if any(window in text for window in windows)), None)


@cache
def _tests() -> Mapping[str, str]:
    files = sorted((TESTS / "formats").glob("test_*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def refusals_table() -> str:
    """As Markdown."""
    lines = [(what, said, f"`{test_of(said)}`") for what, said in REFUSED.items()]
    return _table(("refused", "because", "test of the message"), lines)


def tables() -> dict[str, str]:
    """Mark on the page → what stands there."""
    return {"schemes": main_table(), "refused": refusals_table()}


def place(page: str, mark: str) -> tuple[int, int]:
    """Where on the page a table begins and ends."""
    begin = f"<!-- {mark}, by scripts/lanes/scheme_table.py --record -->\n"
    start = page.index(begin) + len(begin)
    return start, page.index("<!-- end -->\n", start)


def main(arguments: Sequence[str]) -> int:
    page, status = PAGE.read_text(), 0
    for mark, made in tables().items():
        start, stop = place(page, mark)
        if page[start:stop] == made:
            continue
        if arguments == ["--record"]:
            page = page[:start] + made + page[stop:]
            continue
        print(f"{PAGE.name} has another table of what is {mark}: scripts/lanes/scheme_table.py --record\n{made}")
        status = 1
    if arguments == ["--record"]:
        PAGE.write_text(page)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
